"""Work for a client that may go away."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

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
    watching = asyncio.ensure_future(_disconnected(request))
    is_gone = is_over = False

    def cancel(watching: "asyncio.Task[None]") -> None:
        nonlocal is_gone
        # It may have been due already when the work ended.
        if not is_over and not watching.cancelled():
            is_gone = True
            task.cancel()

    watching.add_done_callback(cancel)
    try:
        return await work
    except asyncio.CancelledError:
        # Somebody else may have cancelled the request as well: that goes on.
        if is_gone and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        is_over = True
        watching.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
