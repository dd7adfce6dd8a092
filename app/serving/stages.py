"""When the stages of one request began and ended, for a trace to show.

Metrics count every stage anyway; this list exists only while a request is traced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from app.serving.metrics import Stage


@dataclass(frozen=True, slots=True)
class Interval:
    """One stage of one request, on the clock of ``time.monotonic``."""

    stage: Stage
    started: float
    ended: float


_recorded: ContextVar[list[Interval] | None] = ContextVar("recorded_stages", default=None)


@contextmanager
def recording() -> Iterator[list[Interval]]:
    """The list that :func:`record` fills in this context and in the tasks started from it."""
    intervals: list[Interval] = []
    token = _recorded.set(intervals)
    try:
        yield intervals
    finally:
        _recorded.reset(token)


def record(stage: Stage, started: float, ended: float) -> None:
    """Keep an interval where the request is traced; does nothing where it is not."""
    intervals = _recorded.get()
    if intervals is not None:
        intervals.append(Interval(stage, started, ended))
