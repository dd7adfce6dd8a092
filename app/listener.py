"""Accepts connections: all that wait, whenever one does.

uvloop accepts one a turn of the event loop. Under load a turn is long, and clients that open
connections faster than that wait in the kernel, where no deadline counts.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final

_AT_ONCE: Final = 256
_PAUSE_S: Final = 1.0
"""When the system has no file descriptor left."""

logger = logging.getLogger(__name__)


class Listener:
    """A listening socket, with the interface of ``asyncio.Server`` that uvicorn uses.

    Args:
        listening: bound and listening.
        make_protocol: makes the protocol of a new connection.
    """

    def __init__(
        self, listening: socket.socket, make_protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        self._listening = listening
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[object]] = set()
        listening.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Accept no more."""
        self._loop.remove_reader(self._listening)

    async def wait_closed(self) -> None:
        """Return once what was accepted is connected."""
        await asyncio.gather(*self._connecting, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, _ = self._listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                logger.exception("no connection can be accepted for %g s", _PAUSE_S)
                self._loop.remove_reader(self._listening)
                self._loop.call_later(_PAUSE_S, self._resume)
                return
            accepted.setblocking(False)
            self._connect(accepted)

    def _connect(self, accepted: socket.socket) -> None:
        # The loop keeps only weak references to tasks.
        task: asyncio.Task[object] = self._loop.create_task(
            self._loop.connect_accepted_socket(self._make_protocol, accepted)
        )
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def _resume(self) -> None:
        if self._listening.fileno() != -1:
            self._loop.add_reader(self._listening, self._accept)
