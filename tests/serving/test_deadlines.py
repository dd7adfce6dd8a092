"""Deadlines: called when they have come, never before, and not at all once they are removed."""

import asyncio
import math
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any

from app.serving.deadlines import Deadlines

DEADLINE_S = 10


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario to its end, or fail."""
    asyncio.run(asyncio.wait_for(scenario, DEADLINE_S))


def test_each_is_called_once_its_time_has_come() -> None:
    """In the order of their deadlines, those that had passed already first."""

    async def scenario() -> None:
        deadlines, begun = Deadlines(), time.monotonic()
        called: list[tuple[int, bool]] = []
        over = asyncio.Event()

        def note(tenths: int) -> None:
            called.append((tenths, time.monotonic() >= begun + tenths / 10))

        for tenths in (2, -1, 1):
            deadlines.add(begun + tenths / 10, partial(note, tenths))
        deadlines.add(begun + 0.3, over.set)

        await over.wait()

        assert called == [(-1, True), (1, True), (2, True)]

    run(scenario())


def test_neighbours_share_a_timer() -> None:
    """Thousands that come in a second have no more than a hundred."""

    async def scenario() -> None:
        deadlines, due = Deadlines(), 100 * DEADLINE_S + time.monotonic() // 1
        for i in range(1000):
            deadlines.add(due + i / 100_000, partial(print, i))
        assert len(deadlines._timers) <= 2

    run(scenario())


def test_what_was_removed_is_not_called() -> None:
    """Its neighbour of the same hundredth of a second is."""

    async def scenario() -> None:
        deadlines, due = Deadlines(), time.monotonic() + 0.05
        called: list[str] = []
        removed, over = called.clear, asyncio.Event()
        deadlines.add(due, removed)
        deadlines.add(due, over.set)
        called.append("not removed")
        deadlines.remove(due, removed)

        await over.wait()

        assert called == ["not removed"]
        deadlines.remove(due, over.set)  # has been called: nothing is left to remove

    run(scenario())


def test_what_is_met_or_never_comes_keeps_no_timer() -> None:
    """Thousands a second would wait for deadlines that nobody watches any more."""

    async def scenario() -> None:
        loop, deadlines = asyncio.get_running_loop(), Deadlines()
        due = time.monotonic() + DEADLINE_S
        deadlines.add(math.inf, loop.stop)
        deadlines.remove(math.inf, loop.stop)
        deadlines.add(due, loop.stop)
        timers = list(deadlines._timers.values())
        deadlines.remove(due, loop.stop)

        assert [timer.cancelled() for timer in timers] == [True]
        assert (deadlines._due, deadlines._timers) == ({}, {})

    run(scenario())
