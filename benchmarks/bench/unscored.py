"""``normgate`` whose detectors only classify: the same server, to price the OOD score.

No hook reads a block, nothing is compared with the calibration; the answers carry constants where
a verdict would be. The engine is the one that the service would choose by default.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app import cli
from app.core.cores import passes_at_once, threads_a_pass, usable_cores
from app.core.cuda_graphs import CudaRecorder
from app.core.detector import Detections, Detector
from app.core.engines import EngineName, TorchEngine
from app.core.onnx_graph import INPUT
from app.core.recorded_engine import RecordedEngine
from app.store import LoadedBundle
from benchmarks.bench.detectors import has_onnxruntime, logits_session


class Classifier:
    """What the workers need of a detector, from the logits alone.

    Args:
        logits: of images ``[B, 3, crop, crop]`` uint8.
        engine: its name.
        beside: the same for passes beside others.
        passes: that may run at once.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        *,
        engine: EngineName,
        beside: "Classifier | None" = None,
        passes: int = 1,
    ) -> None:
        self._logits = logits
        self._beside = beside
        self.engine = engine
        self.passes = passes

    @property
    def beside(self) -> "Classifier":
        """The classifier for passes beside others."""
        return self._beside or self

    @torch.inference_mode()
    def detect(self, images: Tensor) -> Detections:
        """The logits; every image is ``id`` and scores one."""
        logits = self._logits(images).cpu().numpy()
        ones, nothing = np.ones(len(images), np.float32), np.zeros(len(images), np.bool_)
        return Detections(
            feature_norms=ones,
            scores=ones,
            p_values=ones.astype(np.float64),
            is_ood=nothing,
            is_uncertain=nothing,
            thresholds=ones,
            logits=logits,
        )

    judge = detect


def on_torch(loaded: LoadedBundle, detector: Detector) -> Classifier:
    """The network alone, as torch runs it."""
    network, preprocessing = detector.network, loaded.bundle.preprocessing
    device = next(network.parameters()).device

    def logits(images: Tensor) -> Tensor:
        found: Tensor = network(preprocessing.normalise(images.to(device))).float()
        return found

    return Classifier(logits, engine="torch")


class _NetworkAlone(TorchEngine):
    """Gives the logits, and the first of them for a FeatureNorm."""

    def __init__(self, loaded: LoadedBundle, network: nn.Module) -> None:
        bundle = loaded.bundle
        block, preprocessing = bundle.norm_ratios.selected, bundle.preprocessing
        super().__init__(network, block=block, preprocessing=preprocessing)
        self._network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits = self._network(self._normalise(images)).float()
        return logits[:, 0].contiguous(), logits

    def forward_to_block(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.forward(images)[:1]


def on_cuda_graphs(loaded: LoadedBundle, *, device: str, batch_size: int) -> Classifier:
    """The network alone, recorded."""
    side = loaded.bundle.preprocessing.crop
    recorder = CudaRecorder(torch.device(device), size=batch_size, side=side)
    network = loaded.detector(device=device).network
    engine = RecordedEngine(_NetworkAlone(loaded, network), recorder)
    passes = recorder.passes
    return Classifier(lambda images: engine.run(images).logits, engine=engine.name, passes=passes)


def on_onnxruntime(loaded: LoadedBundle) -> Classifier:
    """The network alone, as ONNX Runtime runs it."""
    threads = threads_a_pass(loaded.bundle.preprocessing.crop)
    passes = passes_at_once(usable_cores())
    beside = None
    if min(passes, threads) > 1:
        logits = _by_session(loaded, threads=threads - passes + 1)
        beside = Classifier(logits, engine="onnxruntime", passes=passes)
    logits = _by_session(loaded, threads=threads)
    return Classifier(logits, engine="onnxruntime", beside=beside, passes=passes)


def main() -> int:
    """Run ``normgate`` with such detectors."""
    detector = LoadedBundle.detector
    convert, record = LoadedBundle.on_onnxruntime, LoadedBundle.on_cuda_graphs

    def restore() -> None:
        LoadedBundle.detector = detector  # type: ignore[method-assign]
        LoadedBundle.on_onnxruntime = convert  # type: ignore[method-assign]
        LoadedBundle.on_cuda_graphs = record  # type: ignore[method-assign]

    def unchanged(loaded: LoadedBundle, found: Classifier, **options: Any) -> Classifier:
        return found

    def recorded(loaded: LoadedBundle, found: Classifier, **options: Any) -> Classifier:
        restore()
        try:
            return on_cuda_graphs(loaded, **options)
        finally:
            replace()

    def replace() -> None:
        LoadedBundle.detector = classifier  # type: ignore[assignment, method-assign]
        # What runs on ONNX Runtime does so already.
        LoadedBundle.on_onnxruntime = unchanged  # type: ignore[assignment, method-assign]
        LoadedBundle.on_cuda_graphs = recorded  # type: ignore[assignment, method-assign]

    def classifier(loaded: LoadedBundle, *, device: str = "cpu") -> Classifier:
        restore()
        try:
            if device == "cpu" and has_onnxruntime(loaded):
                return on_onnxruntime(loaded)
            return on_torch(loaded, loaded.detector(device=device))
        finally:
            replace()

    replace()
    return cli.main()


def _by_session(loaded: LoadedBundle, *, threads: int) -> Callable[[Tensor], Tensor]:
    session = logits_session(loaded, threads=threads)

    def logits(images: Tensor) -> Tensor:
        [found] = session.run(None, {INPUT: images.numpy()})
        return torch.from_numpy(found)

    return logits


if __name__ == "__main__":
    sys.exit(main())
