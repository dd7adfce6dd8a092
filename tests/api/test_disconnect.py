"""Work for a client that may go away, by whatever way the server tells it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fastapi import Request
from starlette.requests import ClientDisconnect

from app.api.disconnect import DEPARTURE, unless_disconnected

DEADLINE_S = 10


class Client:
    """A client and its server, which tells of departures by an extension or by a message."""

    def __init__(self, *, has_extension: bool) -> None:
        self._has_left = asyncio.Event()
        self.on_departure: Callable[[], None] | None = None
        extensions = {DEPARTURE: self._watch} if has_extension else {}
        scope = {"type": "http", "headers": [], "extensions": extensions}
        self.request = Request(scope, self._receive)

    def leave(self) -> None:
        """Go away."""
        self._has_left.set()
        if self.on_departure is not None:
            self.on_departure()

    def _watch(self, on_departure: Callable[[], None] | None) -> None:
        self.on_departure = on_departure

    async def _receive(self) -> dict[str, Any]:
        await self._has_left.wait()
        return {"type": "http.disconnect"}


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario to its end, or fail."""
    asyncio.run(asyncio.wait_for(scenario, DEADLINE_S))


@pytest.mark.parametrize("has_extension", [True, False])
def test_a_client_that_stays(has_extension: bool) -> None:
    """The result is the work's, and nobody watches the client any more."""

    async def scenario() -> None:
        client, tasks = Client(has_extension=has_extension), asyncio.all_tasks()
        assert await unless_disconnected(client.request, asyncio.sleep(0, "result")) == "result"
        assert client.on_departure is None
        client.leave()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == tasks

    run(scenario())


@pytest.mark.parametrize("has_extension", [True, False])
def test_a_client_that_leaves(has_extension: bool) -> None:
    """The work is cancelled, and the request ends as one whose client went away."""

    async def scenario() -> None:
        client, ended = Client(has_extension=has_extension), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        # Twice, as a server may tell it that sees the connection closing and then closed.
        for _ in range(2):
            asyncio.get_running_loop().call_soon(client.leave)
        with pytest.raises(ClientDisconnect):
            await unless_disconnected(client.request, work())
        assert ended.is_set()

    run(scenario())


@pytest.mark.parametrize("has_extension", [True, False])
def test_somebody_else_cancels(has_extension: bool) -> None:
    """A request that is cancelled for another reason ends as a cancelled one."""

    async def scenario() -> None:
        client = Client(has_extension=has_extension)
        waiting = asyncio.Event().wait()
        task = asyncio.ensure_future(unless_disconnected(client.request, waiting))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())
