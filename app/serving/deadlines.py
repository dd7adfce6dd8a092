"""Calls at deadlines, for many at once: thousands a second come, and nearly all are met."""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Final

_TICKS_A_SECOND: Final = 100
_ROUNDING_S: Final = 0.002
"""uvloop's timers are in whole milliseconds, and may be early by more than one."""


class Deadlines:
    """Calls back after a deadline, by little more than a hundredth of a second, in the event loop.

    Those of one hundredth share a timer, which costs more than all else here. To be used in one
    event loop.

    Args:
        clock: in seconds, the one deadlines are on.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: dict[int, set[Callable[[], None]]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def add(self, deadline: float, on_time: Callable[[], None]) -> None:
        """Have ``on_time`` called, unless it is removed before.

        Args:
            deadline: may have passed; never, where it is infinite.
            on_time: equal to no other that waits for a deadline.
        """
        if deadline == math.inf:
            return
        tick = _tick(deadline)
        due = self._due.get(tick)
        if due is None:
            due = self._due[tick] = set()
            left_s = max(0.0, tick / _TICKS_A_SECOND - self._clock()) + _ROUNDING_S
            self._timers[tick] = asyncio.get_running_loop().call_later(left_s, self._call, tick)
        due.add(on_time)

    def remove(self, deadline: float, on_time: Callable[[], None]) -> None:
        """Call what was added no more, if it has not been called yet."""
        if deadline == math.inf:
            return
        tick = _tick(deadline)
        due = self._due.get(tick)
        if due is None:
            return
        due.discard(on_time)
        if not due:
            del self._due[tick]
            self._timers.pop(tick).cancel()

    def _call(self, tick: int) -> None:
        del self._timers[tick]
        for on_time in self._due.pop(tick):
            on_time()


def _tick(deadline: float) -> int:
    return math.ceil(deadline * _TICKS_A_SECOND)
