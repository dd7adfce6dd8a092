"""The lag of the event loop: seen while it lasts, and gone when it is over."""

import asyncio
import threading
import time

from app.serving.lag import LoopLag

DEADLINE_S = 10


def test_a_blocked_loop_is_seen() -> None:
    """While something keeps the loop, the lag grows, for other threads to see; then it falls."""
    lag, seen = LoopLag(), threading.Event()

    def block() -> None:
        end = time.monotonic() + DEADLINE_S
        while lag.seconds < 0.2:
            assert time.monotonic() < end
        seen.set()

    async def scenario() -> None:
        watching = asyncio.ensure_future(lag.watch())
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.sleep(0)
            assert lag.seconds < 0.2
            block()
            assert seen.is_set()
            while lag.seconds >= 0.2:  # noqa: ASYNC110 - the lag is what is waited for
                await asyncio.sleep(0)
        watching.cancel()

    asyncio.run(scenario())


def test_an_unwatched_loop_has_no_lag() -> None:
    """Before anybody measures, nothing is refused for it."""
    assert LoopLag().seconds == 0
