"""The threads that run the network: one a device, all fed from one batcher."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.core.detector import Detections
from app.errors import ForwardError, SettingsError
from app.serving.batcher import Batch, Batcher
from app.serving.metrics import Metrics
from app.serving.pool import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Detection:
    """One image's share of :class:`Detections`."""

    logits: NDArray[np.float32]
    feature_norm: float
    score: float
    p_value: float
    is_ood: bool


ImageBatcher = Batcher[Tensor, Detection]


class Worker:
    """A thread that takes batches and answers them on one device, until the batcher is closed."""

    def __init__(self, device: str, batcher: ImageBatcher, metrics: Metrics) -> None:
        self._device = device
        self._batcher = batcher
        self._metrics = metrics
        self._thread = threading.Thread(target=self._run, name=f"worker-{device}", daemon=True)

    def start(self) -> None:
        """Begin to take batches."""
        self._thread.start()

    def join(self) -> None:
        """Return once the closed batcher is empty and the last batch answered."""
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._batcher.take()) is not None:
            try:
                batch.complete(self._detect(batch))
            except Exception:
                logger.exception("batch of %d images failed on %s", len(batch.items), self._device)
                batch.fail(ForwardError("the network failed on this batch"))

    def _detect(self, batch: Batch[Tensor, Detection]) -> list[Detection]:
        model = batch.key
        assert isinstance(model, LoadedModel)
        for wait_s in batch.waits_s:
            self._metrics.observe_stage("queue", wait_s)
        started = time.monotonic()
        detections = model.detectors[self._device].detect(torch.stack(list(batch.items)))
        self._metrics.observe_stage("forward", time.monotonic() - started)
        self._metrics.batch_size.observe(len(batch.items))
        return _each(detections)


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
    return names


def _each(detections: Detections) -> list[Detection]:
    columns = zip(
        detections.logits,
        detections.feature_norms.tolist(),
        detections.scores.tolist(),
        detections.p_values.tolist(),
        detections.is_ood.tolist(),
        strict=True,
    )
    return [Detection(*row) for row in columns]
