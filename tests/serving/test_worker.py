"""The workers: one a device, fed from one queue, outliving whatever a batch does to them."""

import asyncio
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.core.detector import Detections, Verdicts
from app.errors import ForwardError, SettingsError
from app.serving.batcher import Batcher
from app.serving.metrics import Metrics
from app.serving.pool import LoadedModel
from app.serving.statistics import ModelStatistics
from app.serving.worker import (
    SpareWorker,
    Work,
    Worker,
    batches_of,
    compute_on,
    computes_in_turn,
    device_names,
    has_spare,
    splits,
)

DEADLINE_S = 10
IMAGE = torch.zeros(3, 2, 2, dtype=torch.uint8)


class OneDetector:
    """Scores every image 1, after it has been let go; fails where it is told to."""

    passes = 2

    def __init__(self, *, held: bool = False, fails: bool = False) -> None:
        self.asked: list[tuple[str, int]] = []
        self._may_run, self._fails = threading.Event(), fails
        if not held:
            self._may_run.set()

    def release(self) -> None:
        """Let it go."""
        self._may_run.set()

    @property
    def beside(self) -> "OneDetector":
        """Itself: it needs no core."""
        return self

    def judge(self, images: Tensor) -> Verdicts:
        """Verdicts without logits."""
        self.asked.append(("judge", len(images)))
        return self._verdicts(len(images))

    def detect(self, images: Tensor) -> Detections:
        """Verdicts with logits."""
        self.asked.append(("detect", len(images)))
        verdicts = self._verdicts(len(images))
        return Detections(**vars(verdicts), logits=np.zeros((len(images), 2), dtype=np.float32))

    def _verdicts(self, count: int) -> Verdicts:
        assert self._may_run.wait(DEADLINE_S)
        if self._fails:
            raise RuntimeError("out of memory")
        ones = np.ones(count, dtype=np.float32)
        return Verdicts(
            feature_norms=ones,
            scores=ones,
            p_values=ones.astype(np.float64),
            is_ood=ones.astype(np.bool_),
            is_uncertain=np.zeros(count, dtype=np.bool_),
            thresholds=ones,
        )


def model_of(**detectors: OneDetector) -> LoadedModel:
    """A loaded model with a detector for each device."""
    parts: Any = {"bundle": None, "metrics": None, "drift": None, "statistics": ModelStatistics()}
    return LoadedModel(detectors=detectors, batch_size=8, **parts)  # type: ignore[arg-type]


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario to its end, or fail."""
    asyncio.run(asyncio.wait_for(scenario, DEADLINE_S))


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until the condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is a thread's state
            await asyncio.sleep(0)


def test_a_gate_asks_for_verdicts_alone() -> None:
    """A gate's images and full ones travel apart, and only full ones come with logits."""

    async def scenario() -> None:
        batcher: Batcher[Tensor, Any] = Batcher(max_batch_size=8, queue_size=8)
        detector = OneDetector()
        model = model_of(cpu=detector)
        waiting = [
            asyncio.ensure_future(batcher.submit(Work(model, is_gate=is_gate), [IMAGE]))
            for is_gate in (True, False, True)
        ]
        await until(lambda: batcher.depth == 3)
        worker = Worker("cpu", batcher, Metrics())
        worker.start()
        answers = [answer for [answer] in await asyncio.gather(*waiting)]
        batcher.close()
        worker.join()
        assert sorted(detector.asked) == [("detect", 1), ("judge", 2)]
        assert [answer.logits is None for answer in answers] == [True, False, True]
        assert all(answer.is_ood and answer.score == 1 for answer in answers)

    run(scenario())


@pytest.mark.parametrize("side", [32, 700])
def test_a_batch_holds_its_images(side: int) -> None:
    """The detector is given the images in order, whatever their size."""
    images = [torch.randint(256, (3, side, side), dtype=torch.uint8) for _ in range(3)]
    seen: list[Tensor] = []

    class Watching(OneDetector):
        def detect(self, images: Tensor) -> Detections:
            seen.append(images)
            return super().detect(images)

    async def scenario() -> None:
        batcher: Batcher[Tensor, Any] = Batcher(max_batch_size=8, queue_size=8)
        worker = Worker("cpu", batcher, Metrics())
        worker.start()
        await batcher.submit(Work(model_of(cpu=Watching())), images)
        batcher.close()
        worker.join()

    run(scenario())
    assert torch.equal(torch.cat(seen), torch.stack(images))


def test_a_pass_has_all_cores_only_where_nobody_else_wants_one() -> None:
    """Other images on their way, even before they are decoded, make a pass take its share."""
    shared = OneDetector()

    class Sharing(OneDetector):
        beside = shared

    async def scenario() -> None:
        batcher: Batcher[Tensor, Any] = Batcher(max_batch_size=2, queue_size=8)
        alone = Sharing()
        work = Work(model_of(cpu=alone))
        worker = Worker("cpu", batcher, Metrics())
        worker.start()
        await batcher.submit(work, [IMAGE] * 2)
        assert (alone.asked, shared.asked) == ([("detect", 2)], [])
        with batcher.places(1):
            await batcher.submit(work, [IMAGE])
        assert shared.asked == [("detect", 1)]
        await batcher.submit(work, [IMAGE] * 3)
        assert (alone.asked[1:], shared.asked[1:]) == ([("detect", 1)], [("detect", 2)])
        batcher.close()
        worker.join()

    run(scenario())


def test_devices_share_one_queue() -> None:
    """While one device is busy, the other takes what waits."""

    async def scenario() -> None:
        batcher: Batcher[Tensor, Any] = Batcher(max_batch_size=1, queue_size=8)
        slow, fast = OneDetector(held=True), OneDetector()
        model = model_of(slow=slow, fast=fast)
        workers = [Worker(device, batcher, Metrics()) for device in ("slow", "fast")]
        workers[0].start()
        stuck = asyncio.ensure_future(batcher.submit(Work(model), [IMAGE]))
        await until(lambda: bool(slow.asked))
        workers[1].start()
        assert len(await batcher.submit(Work(model), [IMAGE] * 3)) == 3
        assert not stuck.done()
        slow.release()
        await stuck
        batcher.close()
        for worker in workers:
            worker.join()
        assert (len(slow.asked), len(fast.asked)) == (1, 3)

    run(scenario())


def test_a_failing_batch_is_answered_and_the_worker_lives() -> None:
    """The waiters of a failed batch are told, without internals; the next batch is answered."""

    async def scenario() -> None:
        batcher: Batcher[Tensor, Any] = Batcher(max_batch_size=8, queue_size=8)
        worker = Worker("cpu", batcher, Metrics())
        worker.start()
        with pytest.raises(ForwardError, match="failed on this batch"):
            await batcher.submit(Work(model_of(cpu=OneDetector(fails=True))), [IMAGE])
        assert len(await batcher.submit(Work(model_of(cpu=OneDetector())), [IMAGE])) == 1
        batcher.close()
        worker.join()

    run(scenario())


def test_the_heartbeat() -> None:
    """A worker is well while it waits and while it works, until one batch takes too long."""

    async def scenario() -> None:
        batcher: Batcher[Tensor, Any] = Batcher(max_batch_size=8, queue_size=8)
        detector = OneDetector(held=True)
        worker = Worker("cpu", batcher, Metrics())
        assert not worker.makes_progress(heartbeat_s=60)
        worker.start()
        assert worker.makes_progress(heartbeat_s=0)
        waiting = asyncio.ensure_future(batcher.submit(Work(model_of(cpu=detector)), [IMAGE]))
        await until(lambda: bool(detector.asked))
        assert worker.makes_progress(heartbeat_s=60)
        await until(lambda: not worker.makes_progress(heartbeat_s=0.01))
        detector.release()
        await waiting
        await until(lambda: worker.makes_progress(heartbeat_s=0.01))
        batcher.close()
        worker.join()
        assert not worker.makes_progress(heartbeat_s=60)

    run(scenario())


def test_a_waiting_worker_holds_no_model() -> None:
    """Once its last batch is answered, a worker keeps nothing of the model in memory."""

    async def scenario() -> None:
        batcher: Batcher[Tensor, Any] = Batcher(
            max_batch_size=8, queue_size=8, splits=lambda key, device: True
        )
        workers = [Worker("cpu", batcher, Metrics()), SpareWorker("cpu", batcher, Metrics())]
        for worker in workers:
            worker.start()
        model = model_of(cpu=OneDetector())
        gone = weakref.ref(model)
        await batcher.submit(Work(model), [IMAGE] * 8)
        del model
        await until(lambda: not gc.collect() and gone() is None)
        batcher.close()
        for worker in workers:
            worker.join()

    run(scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no spare thread")
@pytest.mark.parametrize("has_tiny_images", [True, False])
def test_a_spare_thread_is_kept_off_the_core_of_a_batch(has_tiny_images: bool) -> None:
    """Where batches leave parts to it; else it may run anywhere."""
    cores = os.sched_getaffinity(0)

    async def scenario() -> None:
        batcher: Batcher[Tensor, Any] = Batcher(max_batch_size=8, queue_size=8)
        spare = SpareWorker("cpu", batcher, Metrics())
        workers = [Worker("cpu", batcher, Metrics(), spare=spare), spare]
        for worker in workers:
            worker.start()
        model = replace(model_of(cpu=OneDetector()), has_tiny_images=has_tiny_images)
        await batcher.submit(Work(model), [IMAGE] * 4)
        assert spare._thread.native_id is not None
        kept_off = cores - os.sched_getaffinity(spare._thread.native_id)
        assert len(kept_off) == (1 if has_tiny_images and len(cores) > 1 else 0)
        batcher.close()
        for worker in workers:
            worker.join()

    run(scenario())


@pytest.mark.parametrize(
    ("device", "has_tiny_images", "batches", "may_split", "in_turn"),
    [
        ("cpu", True, 1, True, False),
        ("cpu", False, 2, False, False),
        ("gpu", True, 2, False, True),
        ("gpu", False, 2, False, True),
    ],
)
def test_how_batches_share_a_device(
    device: str, has_tiny_images: bool, batches: int, may_split: bool, in_turn: bool
) -> None:
    """Those of tiny images share the CPU as parts of one, and a GPU as all others do."""
    detectors = {"cpu": OneDetector(), "gpu": OneDetector()}
    work = Work(replace(model_of(**detectors), has_tiny_images=has_tiny_images))

    assert batches_of(work, device) == batches
    assert splits(work, device) == may_split
    assert computes_in_turn(device) == in_turn


def test_devices_are_named() -> None:
    """``cpu`` is always there; a GPU that is not there is told with its name."""
    assert list(device_names("cpu")) == ["cpu"]
    with pytest.raises(SettingsError, match=r"cuda:99; this machine has \d+ GPUs"):
        device_names("cuda:99")


@pytest.mark.parametrize(
    ("device", "platform", "has"),
    [("cpu", "linux", True), ("cpu", "darwin", False), ("cuda:0", "linux", False)],
)
def test_a_spare_thread_is_where_threads_can_give_way(
    monkeypatch: pytest.MonkeyPatch, device: str, platform: str, has: bool
) -> None:
    """Elsewhere it would take from the event loop more than it gives."""
    monkeypatch.setattr(sys, "platform", platform)
    assert has_spare(device) == has


def test_a_core_is_left_to_the_event_loop() -> None:
    """By default a forward pass takes all cores but one, and always one at least."""
    before = torch.get_num_threads()
    try:
        compute_on(3)
        assert torch.get_num_threads() == 3
        compute_on(None)
        assert torch.get_num_threads() >= 1
    finally:
        torch.set_num_threads(before)


def test_a_device_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would else have twice as many threads as its detectors are for."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert list(device_names("cuda,cuda:1,cuda:0")) == ["cuda:0", "cuda:1"]
