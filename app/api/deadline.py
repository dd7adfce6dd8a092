"""How long a request may take: ``X-Request-Deadline-Ms``, or the setting."""

import asyncio
import math
import time
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from fastapi import Request
from starlette.types import Scope

from app.api.dependencies import service_of
from app.errors import DeadlineExceededError, MalformedRequestError
from app.serving.deadlines import Deadlines
from app.settings import Settings

HEADER: Final = "X-Request-Deadline-Ms"
_RAW_HEADER: Final = HEADER.lower().encode()
DEADLINE_PARAMETER: Final[dict[str, Any]] = {
    "name": HEADER,
    "in": "header",
    "description": "Milliseconds until the answer is due; default and bound are the server's.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
"""Of the OpenAPI description; the routes that score read the header themselves."""


def request_deadline(request: Request, settings: Settings) -> float:
    """When the answer is due, on the clock of ``time.monotonic``.

    Raises:
        MalformedRequestError: the header is no number above 0, or above the bound.
    """
    return deadline_of(request.scope, settings)


def deadline_of(scope: Scope, settings: Settings) -> float:
    """As :func:`request_deadline`, for what is no request yet."""
    return time.monotonic() + _milliseconds(scope, settings) / 1000


def in_time(request: Request, deadline: float) -> AbstractAsyncContextManager[None]:
    """A context in which the request's body is read.

    Raises:
        DeadlineExceededError: ``deadline``, on the clock of ``time.monotonic``, came first.
    """
    return _InTime(deadline, service_of(request).deadlines)


class _InTime(AbstractAsyncContextManager[None]):
    """As asyncio's timeout, without a timer of its own, which costs more than reading a body."""

    def __init__(self, deadline: float, deadlines: Deadlines) -> None:
        self._deadline = deadline
        self._deadlines = deadlines
        self._is_expired = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a request is answered in a task"
        self._task, self._cancelling = task, task.cancelling()
        self._deadlines.add(self._deadline, self._expire)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._deadlines.remove(self._deadline, self._expire)
        if not self._is_expired:
            return
        # Somebody else may have cancelled the request as well: that goes on.
        is_ours = self._task.uncancel() <= self._cancelling
        if is_ours and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise DeadlineExceededError("the deadline passed before the body had arrived") from None

    def _expire(self) -> None:
        self._is_expired = True
        self._task.cancel()


def _milliseconds(scope: Scope, settings: Settings) -> float:
    texts = [value.decode("latin-1") for name, value in scope["headers"] if name == _RAW_HEADER]
    if not texts:
        return settings.deadline_ms
    # Two of them are joined, and refused as no number: nobody knows which one is meant.
    text = ", ".join(texts)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # A comparison with NaN is false, so that it is refused too.
    if not 0 < value <= settings.max_deadline_ms:
        raise MalformedRequestError(
            f"{HEADER} is {text[:20]!r}; it must be a number of milliseconds above 0 and at most "
            f"{settings.max_deadline_ms:g}"
        )
    return value
