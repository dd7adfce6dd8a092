"""How long a request may take: ``X-Request-Deadline-Ms``, or the setting."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import Request
from starlette.types import Scope

from app.errors import DeadlineExceededError, MalformedRequestError
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


@asynccontextmanager
async def in_time(deadline: float) -> AsyncIterator[None]:
    """A context in which a body is read.

    Raises:
        DeadlineExceededError: ``deadline``, on the clock of ``time.monotonic``, came first.
    """
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            yield
    except TimeoutError:
        raise DeadlineExceededError("the deadline passed before the body had arrived") from None


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
