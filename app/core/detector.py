"""A calibrated classifier: logits, FeatureNorm, p-value and verdict from one forward pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.core.blocks import Block, BlockNorms
from app.core.images import Preprocessing
from app.core.threshold import p_values

ScoreName = Literal["feature_norm"]

BATCH_TOLERANCE: Final = 1e-4
"""Largest relative difference of one image's score between batches of different size, in fp32.

Convolution kernels are chosen by batch size and sum in another order.
"""

Score = Callable[[Tensor, Tensor], Tensor]

SCORES: Final[Mapping[ScoreName, Score]] = {
    "feature_norm": lambda feature_norms, logits: feature_norms,
}
"""Each score, higher meaning more in-distribution, from FeatureNorms ``[B]`` and logits."""


@dataclass(frozen=True)
class Detections:
    """What one batch of ``B`` images gave; all on the CPU."""

    logits: NDArray[np.float32]
    feature_norms: NDArray[np.float32]
    scores: NDArray[np.float32]
    p_values: NDArray[np.float64]
    is_ood: NDArray[np.bool_]


class Detector:
    """Classifier and out-of-distribution detector in one forward pass.

    Calibration, evaluation and serving all score through this class. One instance serves one
    thread at a time.

    Args:
        network: in evaluation mode, on its device.
        block: the selected block.
        preprocessing: turns uint8 images into the network's input.
        score: which score the threshold is for.
        threshold: a score below it is OOD.
        calibration_scores: ``[N]`` float32, sorted, ascending.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        block: Block,
        preprocessing: Preprocessing,
        score: ScoreName,
        threshold: float,
        calibration_scores: NDArray[np.float32],
    ) -> None:
        self._norms = BlockNorms(network, [block])
        self._block = block
        self._preprocessing = preprocessing
        self._score = SCORES[score]
        self._threshold = np.float32(threshold)
        self._calibration_scores = calibration_scores
        self._device = next(network.parameters()).device

    @torch.inference_mode()
    def detect(self, images: Tensor) -> Detections:
        """Logits, scores, p-values and verdicts.

        Args:
            images: ``[B, 3, crop, crop]`` uint8 on the CPU, from ``Preprocessing``.

        Returns:
            One entry an image, in order. A score depends on the batch it travelled in by less
            than ``BATCH_TOLERANCE``, relatively.
        """
        inputs = self._preprocessing.normalise(images.to(self._device))
        logits, norms = self._norms.run(inputs)
        feature_norms = norms[self._block.name]
        scores = self._score(feature_norms, logits).cpu().numpy()
        return Detections(
            logits=logits.cpu().numpy(),
            feature_norms=feature_norms.cpu().numpy(),
            scores=scores,
            p_values=p_values(scores, self._calibration_scores),
            is_ood=scores < self._threshold,
        )
