"""How late the event loop runs, the part of a request's wait that no queue of ours shows."""

import asyncio
import time
from typing import Final

_PERIOD_S: Final = 0.05


class LoopLag:
    """Seconds between the moment something is due on the event loop and the moment it runs.

    A loop with more to do than it has time for works its sockets off in turn: what arrives waits
    in them as long as one turn takes.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._due = 0.0

    @property
    def seconds(self) -> float:
        """The latest measurement, or more when the next one is overdue by more."""
        return max(self._seconds, time.monotonic() - self._due) if self._due else 0.0

    async def watch(self) -> None:
        """Measure for ever."""
        while True:
            self._due = time.monotonic() + _PERIOD_S
            await asyncio.sleep(_PERIOD_S)
            self._seconds = max(0.0, time.monotonic() - self._due)
