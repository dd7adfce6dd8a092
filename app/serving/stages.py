"""The stages of a request, and when those of one request began and ended, for a trace to show.

Metrics take every stage in; the intervals are kept only while a request is traced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, Literal, get_args

Stage = Literal["read", "decode", "queue", "forward", "total"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)


@dataclass(frozen=True, slots=True)
class Interval:
    """One stage of one request, on the clock of ``time.monotonic``."""

    stage: Stage
    started: float
    ended: float


_recorded: ContextVar[list[Interval] | None] = ContextVar("recorded_stages", default=None)


@contextmanager
def recording() -> Iterator[list[Interval]]:
    """The list that :func:`intervals` finds in this context and in the tasks started from it."""
    kept: list[Interval] = []
    token = _recorded.set(kept)
    try:
        yield kept
    finally:
        _recorded.reset(token)


def intervals() -> list[Interval] | None:
    """Where to keep an interval of the request of this context; None when it is not traced."""
    return _recorded.get()
