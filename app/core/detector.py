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

Score = Callable[[Tensor, Tensor | None], Tensor]

SCORES: Final[Mapping[ScoreName, Score]] = {
    "feature_norm": lambda feature_norms, logits: feature_norms,
}
"""Each score, higher meaning more in-distribution, from FeatureNorms ``[B]`` and logits."""

SCORES_WITHOUT_LOGITS: Final[frozenset[ScoreName]] = frozenset({"feature_norm"})
"""Those for which a verdict needs the network only up to the selected block."""


@dataclass(frozen=True)
class Verdicts:
    """What one batch of ``B`` images was judged to be; all on the CPU."""

    feature_norms: NDArray[np.float32]
    scores: NDArray[np.float32]
    p_values: NDArray[np.float64]
    is_ood: NDArray[np.bool_]


@dataclass(frozen=True)
class Detections(Verdicts):
    """Verdicts and the classifier's logits ``[B, classes]``."""

    logits: NDArray[np.float32]


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
        self._score_name = score
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
        logits, norms = self._norms.run(self._inputs(images))
        verdicts = self._judge(norms[self._block.name], logits)
        return Detections(**vars(verdicts), logits=logits.cpu().numpy())

    @torch.inference_mode()
    def judge(self, images: Tensor) -> Verdicts:
        """The verdicts of :meth:`detect` without the logits.

        Where the score needs none, the network runs only up to the selected block.
        """
        if self._score_name not in SCORES_WITHOUT_LOGITS:
            return self.detect(images)
        norms = self._norms.run_to_last_block(self._inputs(images))
        return self._judge(norms[self._block.name], None)

    def _inputs(self, images: Tensor) -> Tensor:
        return self._preprocessing.normalise(images.to(self._device))

    def _judge(self, feature_norms: Tensor, logits: Tensor | None) -> Verdicts:
        scores = SCORES[self._score_name](feature_norms, logits).cpu().numpy()
        return Verdicts(
            feature_norms=feature_norms.cpu().numpy(),
            scores=scores,
            p_values=p_values(scores, self._calibration_scores),
            is_ood=scores < self._threshold,
        )
