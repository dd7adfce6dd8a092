"""The intervals of a traced request: kept for it alone, from whichever thread they come."""

import asyncio
import threading
import time

import pytest

from app.serving.batcher import Batcher
from app.serving.metrics import Metrics
from app.serving.stages import Interval, intervals, recording


def answer_all(batcher: Batcher[int, int]) -> None:
    """A worker whose forward pass lasts from 100 to 101 seconds."""
    while (batch := batcher.take()) is not None:
        batch.trace(forward_started=100, forward_s=1)
        batch.complete(batch.items)


async def submitted(items: list[int], *, is_background: bool = False) -> list[Interval]:
    """What a traced request learns of its items, two of which fit in a batch."""
    batcher: Batcher[int, int] = Batcher(max_batch_size=2, queue_size=10, clock=lambda: 7)
    worker = threading.Thread(target=answer_all, args=[batcher])
    with recording() as kept:
        submitting = asyncio.create_task(batcher.submit("key", items, is_background=is_background))
        await asyncio.sleep(0)  # all items wait before the worker takes the first
        worker.start()
        async with asyncio.timeout(10):
            await submitting
    batcher.close()
    worker.join()
    return kept


def test_batches() -> None:
    """A request of three items was in two batches: twice it waited, and twice it ran."""
    both = [Interval("queue", 100, 100), Interval("forward", 100, 101)]

    assert asyncio.run(submitted([1, 2, 3])) == both * 2


def test_background() -> None:
    """What a request causes in the background is no part of it."""
    assert asyncio.run(submitted([1], is_background=True)) == []


def test_observed_stages() -> None:
    """A stage that the metrics are told of ends now, and is kept while a request is traced."""
    metrics = Metrics()
    metrics.observe_stage("read", 1)
    with recording() as kept:
        before = time.monotonic()
        metrics.observe_stage("read", 2)
        after = time.monotonic()
    metrics.observe_stage("read", 3)

    [interval] = kept
    assert interval.stage == "read"
    assert before <= interval.ended <= after
    assert interval.ended - interval.started == pytest.approx(2)


def test_nesting() -> None:
    """Outside a traced request there is no list; tasks share their request's."""

    async def found() -> list[Interval] | None:
        return intervals()

    async def in_task() -> list[Interval] | None:
        return await asyncio.create_task(found())

    assert intervals() is None
    with recording() as kept:
        assert asyncio.run(in_task()) is kept
    assert intervals() is None
