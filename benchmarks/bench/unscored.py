"""``normgate`` whose detectors only classify: the same server, to price the OOD score.

No hook reads a block, nothing is compared with the calibration; the answers carry constants where
a verdict would be.
"""

import sys

import numpy as np
import torch
from torch import Tensor

from app import cli
from app.core.detector import Detections, Detector
from app.store import LoadedBundle


class Classifier:
    """What the workers need of a detector, from the logits alone."""

    def __init__(self, detector: Detector, loaded: LoadedBundle) -> None:
        self._network = detector.network
        self._preprocessing = loaded.bundle.preprocessing
        self._device = next(self._network.parameters()).device

    @torch.inference_mode()
    def detect(self, images: Tensor) -> Detections:
        """The logits; every image is ``id`` and scores one."""
        logits = self._network(self._preprocessing.normalise(images.to(self._device))).float()
        ones, nothing = np.ones(len(images), np.float32), np.zeros(len(images), np.bool_)
        return Detections(
            feature_norms=ones,
            scores=ones,
            p_values=ones.astype(np.float64),
            is_ood=nothing,
            is_uncertain=nothing,
            thresholds=ones,
            logits=logits.cpu().numpy(),
        )

    judge = detect


def main() -> int:
    """Run ``normgate`` with such detectors."""
    checked = LoadedBundle.detector

    def classifier(loaded: LoadedBundle, *, device: str = "cpu") -> Classifier:
        return Classifier(checked(loaded, device=device), loaded)

    LoadedBundle.detector = classifier  # type: ignore[assignment, method-assign]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
