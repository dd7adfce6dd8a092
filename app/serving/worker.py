"""The threads that run the network, a few a device, all fed from one batcher."""

import logging
import sys
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.core.cores import (
    MOST_PASSES,
    compute_behind_others,
    compute_patiently,
    current_core,
    keep_off,
    usable_cores,
)
from app.core.detector import Detections, Verdict, Verdicts
from app.errors import ForwardError, SettingsError
from app.serving.batcher import Batch, Batcher
from app.serving.metrics import Metrics
from app.serving.pool import LoadedModel

logger = logging.getLogger(__name__)

_SMALL_BATCH_BYTES: Final = 2**20
"""Copied in about a tenth of a millisecond, while nothing else runs in the interpreter."""


class Detection(NamedTuple):
    """One image's share of :class:`Verdicts`, with its logits where they were asked for."""

    feature_norm: float
    score: float
    p_value: float
    verdict: Verdict
    threshold: float
    """The one the score was compared with."""
    logits: NDArray[np.float32] | None = None
    prediction: tuple[int, float] | None = None
    """Index of the largest logit, and its softmax; NaN where that is infinite, or any is NaN."""

    @property
    def is_ood(self) -> bool:
        """Whether the classifier was not trained for images like this one."""
        return self.verdict == "ood"


class Work(NamedTuple):
    """What is asked of a batch; the key that batches are made by."""

    model: LoadedModel
    is_gate: bool = False
    """Verdicts alone: the network runs only as far as they need."""


def batch_size_of(key: Hashable) -> int:
    """Most images of a batch of that :class:`Work`."""
    assert isinstance(key, Work)
    return key.model.batch_size


def batches_of(key: Hashable, device: str) -> int:
    """Most batches of that :class:`Work` at once on a device, parts of them aside."""
    assert isinstance(key, Work)
    if device == "cpu" and key.model.has_tiny_images:
        return 1
    return key.model.detectors[device].passes


def computes_in_turn(device: str) -> bool:
    """Whether a device computes one batch after the other, while others travel to it."""
    return device != "cpu"


def splits(key: Hashable, device: str) -> bool:
    """Whether a batch of that :class:`Work` may leave a part to a spare thread of a device."""
    assert isinstance(key, Work)
    may_split = device == "cpu" and key.model.has_tiny_images
    return may_split and key.model.detectors[device].passes > 1


ImageBatcher = Batcher[Tensor, Detection]


class Worker:
    """A thread that takes batches and answers them on one device, until the batcher is closed.

    Args:
        device: that it runs them on; other threads may run some there too.
        batcher: hands out the batches.
        metrics: told of every batch.
        number: of the thread, among those of its device.
        spare: the device's spare thread, where it has one.
    """

    def __init__(
        self,
        device: str,
        batcher: ImageBatcher,
        metrics: Metrics,
        *,
        number: int = 0,
        spare: "SpareWorker | None" = None,
    ) -> None:
        self._spare = spare
        self._device = device
        self._batcher = batcher
        self._metrics = metrics
        self._busy_since: float | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"worker-{device}.{number}", daemon=True
        )

    def start(self) -> None:
        """Begin to take batches."""
        self._thread.start()

    def join(self) -> None:
        """Return once the closed batcher is empty and the last batch answered."""
        self._thread.join()

    def makes_progress(self, *, heartbeat_s: float) -> bool:
        """Whether the thread lives and has not been busy with one batch for ``heartbeat_s``."""
        since = self._busy_since
        is_stuck = since is not None and time.monotonic() - since > heartbeat_s
        return self._thread.is_alive() and not is_stuck

    def _begin(self) -> None:
        compute_patiently()

    def _take(self) -> Batch[Tensor, Detection] | None:
        return self._batcher.take(self._device)

    def _run(self) -> None:
        self._begin()
        # No batch may outlive its turn: it would keep a model that was let go in memory.
        while self._answer_next():
            pass

    def _answer_next(self) -> bool:
        batch = self._take()
        if batch is None:
            return False
        self.answer(batch)
        return True

    def answer(self, batch: Batch[Tensor, Detection]) -> None:
        """Run a batch in the calling thread, and end it."""
        with self._busy():
            try:
                detections = self._detect(batch)
            except Exception:
                logger.exception("batch of %d images failed on %s", len(batch.items), self._device)
                batch.fail(ForwardError("the network failed on this batch"))
            else:
                batch.complete(detections)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _detect(self, batch: Batch[Tensor, Detection]) -> list[Detection]:
        work = batch.key
        assert isinstance(work, Work)
        for wait_s in batch.waits_s:
            self._metrics.observe_stage("queue", wait_s)
        started = time.monotonic()
        if self._spare is not None and splits(work, self._device):
            self._spare.keep_off(current_core())
        detector = work.model.detectors[self._device]
        if not batch.is_alone:
            detector = detector.beside
        run = detector.judge if work.is_gate else detector.detect
        verdicts = run(_stacked(batch.items))
        forward_s = time.monotonic() - started
        work.model.statistics.observe_batch(waits_s=batch.waits_s, forward_s=forward_s)
        self._metrics.observe_stage("forward", forward_s)
        batch.trace(forward_started=started, forward_s=forward_s)
        self._metrics.batch_size.observe(len(batch.items))
        return _each(verdicts)


class SpareWorker(Worker):
    """Takes parts of batches of tiny images, and gives way to the other threads.

    The event loop has a good part as much to do for each as the network: a second thread for the
    network takes more from it than it gives, unless it gives way.
    """

    def __init__(self, device: str, batcher: ImageBatcher, metrics: Metrics) -> None:
        super().__init__(device, batcher, metrics, number=MOST_PASSES)
        self._kept_off: int | None = None

    def keep_off(self, core: int | None) -> None:
        """Run on other cores than this one from now on, which another thread needs."""
        thread = self._thread.native_id
        if core is None or core == self._kept_off or thread is None:
            return
        self._kept_off = core
        keep_off(core, thread)

    def _begin(self) -> None:
        compute_behind_others()

    def _take(self) -> Batch[Tensor, Detection] | None:
        return self._batcher.take_part(self._device)


def compute_on(threads: int | None) -> None:
    """Spread torch's forward passes on the CPU over so many threads; all cores but one by default.

    With as many as there are cores they would wait for each other, spinning, whenever the event
    loop or a decoder has one: a forward pass can take twenty times as long.
    """
    torch.set_num_threads(threads or max(1, usable_cores() - 1))


def has_spare(device: str) -> bool:
    """Whether a device should have a :class:`SpareWorker`: where threads can give way."""
    return device == "cpu" and sys.platform == "linux"


def device_names(setting: str) -> Sequence[str]:
    """The devices a ``DEVICES`` setting names; ``auto`` is every GPU, or else the CPU.

    Raises:
        SettingsError: a GPU is named that this machine does not have.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if setting == "auto":
        return gpus or ["cpu"]
    names = ["cuda:0" if name.strip() == "cuda" else name.strip() for name in setting.split(",")]
    missing = [name for name in names if name != "cpu" and name not in gpus]
    if missing:
        raise SettingsError(
            f"NORMGATE_DEVICES names {', '.join(missing)}; this machine has {len(gpus)} GPUs"
        )
    # A device named twice is one.
    return list(dict.fromkeys(names))


def _stacked(images: Sequence[Tensor]) -> Tensor:
    if len(images) * images[0].nbytes > _SMALL_BATCH_BYTES:
        return torch.stack(list(images))
    # Not by torch or numpy: they let the interpreter's lock go, and may then wait for it for much
    # longer than it takes to copy.
    joined = bytearray().join([image.numpy().data for image in images])
    batch = np.frombuffer(joined, dtype=np.uint8).reshape(len(images), *images[0].shape)
    return torch.from_numpy(batch)


def _each(verdicts: Verdicts) -> list[Detection]:
    nothing = [None] * len(verdicts.scores)
    logits = verdicts.logits if isinstance(verdicts, Detections) else None
    columns = zip(
        verdicts.feature_norms.tolist(),
        verdicts.scores.tolist(),
        verdicts.p_values.tolist(),
        verdicts.verdicts,
        verdicts.thresholds.tolist(),
        nothing if logits is None else logits,
        nothing if logits is None else _predictions(logits),
        strict=True,
    )
    return [Detection(*row) for row in columns]


def _predictions(logits: NDArray[np.float32]) -> list[tuple[int, float]]:
    """The most probable label of each image and its probability; of all at once."""
    best = logits.argmax(axis=1)
    largest = logits[np.arange(len(best)), best]
    with np.errstate(invalid="ignore"):
        exponentials = np.exp(logits.astype(np.float64) - largest[:, None])
    return list(zip(best.tolist(), (1 / exponentials.sum(axis=1)).tolist(), strict=True))
