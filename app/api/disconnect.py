"""Work for a client that may go away."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

DEPARTURE: Final = "normgate.departure"
"""Extension of a scope: a function that takes what to call when the client goes away, or None."""

Result = TypeVar("Result")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client goes away first.

    The request's body must have been read. The work begins at once, in the request's own task:
    what it finds full, nobody who came later has filled.

    Raises:
        ClientDisconnect: the client went away.
    """
    task = asyncio.current_task()
    assert task is not None, "a request is answered in a task"
    is_gone = is_over = False

    def cancel() -> None:
        nonlocal is_gone
        # It may have been due already when the work ended, and be told twice.
        if not (is_over or is_gone):
            is_gone = True
            task.cancel()

    unwatch = _watch(request, cancel)
    try:
        return await work
    except asyncio.CancelledError:
        # Somebody else may have cancelled the request as well: that goes on.
        if is_gone and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        is_over = True
        unwatch()


def _watch(request: Request, on_departure: Callable[[], None]) -> Callable[[], Any]:
    """Have ``on_departure`` called when the client goes away, until the result is called."""
    if watch := request.scope.get("extensions", {}).get(DEPARTURE):
        watch(on_departure)
        return partial(watch, None)
    # Other servers tell it to a task alone that waits for it.
    watching = asyncio.ensure_future(_disconnected(request))
    watching.add_done_callback(lambda ended: None if ended.cancelled() else on_departure())
    return watching.cancel


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
