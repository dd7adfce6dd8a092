"""A calibrated classifier: logits, FeatureNorm, p-value and verdict from one forward pass."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.core.blocks import Block
from app.core.engines import Engine, EngineName, TorchEngine
from app.core.images import Preprocessing
from app.core.precision import Dtype
from app.core.recorded_engine import RecordedEngine, Recorder
from app.core.scores import (
    SCORES,
    SCORES_WITH_HEAD,
    SCORES_WITHOUT_LOGITS,
    Evidence,
    ScoreName,
    selected_norm_logits,
)
from app.core.threshold import p_values
from app.errors import EngineError, NetworkError

BATCH_TOLERANCE: Final[Mapping[Dtype, float]] = {"float32": 1e-4, "bfloat16": 5e-3}
"""Largest relative difference of one image's score between batches of different size.

Convolution kernels are chosen by batch size and sum in another order; bfloat16 then rounds to
8 bits.
"""
ENGINE_TOLERANCE: Final[Mapping[Dtype, float]] = {"float32": 1e-4, "bfloat16": 5e-3}
"""Largest relative difference of one image's score between two engines."""
LOGIT_TOLERANCE: Final[Mapping[Dtype, float]] = {"float32": 1e-3, "bfloat16": 3e-2}
"""Largest difference of a logit between two engines, relative to the largest of its image."""


Verdict = Literal["id", "uncertain", "ood"]


@dataclass(frozen=True)
class Verdicts:
    """What one batch of ``B`` images was judged to be; all on the CPU.

    ``thresholds`` are those the scores were compared with: the bundle's, or the predicted
    class's. ``is_uncertain`` marks scores at or above them that fall short of the second level.
    """

    feature_norms: NDArray[np.float32]
    scores: NDArray[np.float32]
    p_values: NDArray[np.float64]
    is_ood: NDArray[np.bool_]
    is_uncertain: NDArray[np.bool_]
    thresholds: NDArray[np.float32]

    @property
    def verdicts(self) -> list[Verdict]:
        """``"ood"``, ``"uncertain"`` or ``"id"`` for each image."""
        return [
            "ood" if is_ood else "uncertain" if is_uncertain else "id"
            for is_ood, is_uncertain in zip(self.is_ood, self.is_uncertain, strict=True)
        ]


@dataclass(frozen=True)
class Detections(Verdicts):
    """Verdicts and the classifier's logits ``[B, classes]``."""

    logits: NDArray[np.float32]


@dataclass(frozen=True)
class ClassLevels:
    """Levels for each predicted class (Mondrian conformal prediction).

    Args:
        thresholds: ``[classes]`` float32; NaN for a class that uses the one for all classes.
        uncertain_below: the same for the second level, if there is one.
        calibration_classes: ``[N]``, the predicted class of each calibration score.
    """

    thresholds: NDArray[np.float32]
    uncertain_below: NDArray[np.float32] | None
    calibration_classes: NDArray[np.int64]


class Detector:
    """Classifier and out-of-distribution detector in one forward pass.

    Calibration, evaluation and serving all score through this class. It runs on torch until
    :meth:`on_engine` gives one on another engine. One instance serves ``passes`` threads at a
    time, which on torch is one.

    Args:
        network: in evaluation mode, on its device.
        block: the selected block.
        preprocessing: turns uint8 images into the network's input.
        score: which score the threshold is for.
        threshold: a score below it is OOD.
        calibration_scores: ``[N]`` float32, sorted, ascending.
        head: name of the linear layer that gives the logits, for scores in ``SCORES_WITH_HEAD``.
        uncertain_below: a score that is not OOD but below this is uncertain; none by default.
        class_levels: levels of single predicted classes, which go before those for all.

    Raises:
        NetworkError: the score needs a head and none was named.
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
        head: str | None = None,
        uncertain_below: float | None = None,
        class_levels: ClassLevels | None = None,
    ) -> None:
        if score in SCORES_WITH_HEAD and head is None:
            raise NetworkError(f"score {score} needs the name of the network's last linear layer")
        has_head = score in SCORES_WITH_HEAD and head is not None
        self._network: nn.Module | None = network
        self._engine: Engine = TorchEngine(
            network, block=block, preprocessing=preprocessing, head=head if has_head else None
        )
        self._head_bias = _bias(network, head) if has_head and head is not None else None
        self._score_name = score
        self._threshold = np.float32(threshold)
        self._uncertain_below = None if uncertain_below is None else np.float32(uncertain_below)
        self._calibration_scores = calibration_scores
        self._class_levels = class_levels
        self.passes = 1
        self._beside: Self | None = None

    @property
    def network(self) -> nn.Module:
        """The classifier, on its device.

        Raises:
            NetworkError: this detector runs on another engine than torch.
        """
        if self._network is None:
            raise NetworkError(f"a detector on {self._engine.name} has no torch network")
        return self._network

    @property
    def engine(self) -> EngineName:
        """What runs the network."""
        return self._engine.name

    @property
    def beside(self) -> Self:
        """The detector for passes beside others: each has its share of the cores.

        This one's passes have them all, where the engine was made so.
        """
        return self._beside or self

    def on_engine(self, engine: Engine, *, beside: Engine | None = None, passes: int = 1) -> Self:
        """A detector with the same levels on another engine; the torch network is let go of.

        Whether it agrees with this one is for :func:`check_agreement` to say.

        Args:
            engine: its outputs lie on the CPU.
            beside: for passes beside others; the same by default.
            passes: that may run at once.
        """
        other = copy.copy(self)
        other.passes = passes
        other._engine, other._network = engine, None
        other._head_bias = None if self._head_bias is None else self._head_bias.cpu()
        other._beside = None if beside is None else self.on_engine(beside, passes=passes)
        return other

    def recorded(self, recorder: Recorder) -> Self:
        """A detector like this one whose forward passes are recorded once and then replayed.

        Args:
            recorder: of this detector's device.

        Raises:
            UnfitEngineError: what the network does depends on the images' values.
        """
        assert isinstance(self._engine, TorchEngine)
        engine = RecordedEngine(self._engine, recorder)
        return self.on_engine(engine, passes=recorder.passes)

    @torch.inference_mode()
    def detect(self, images: Tensor) -> Detections:
        """Logits, scores, p-values and verdicts.

        Args:
            images: ``[B, 3, crop, crop]`` uint8 on the CPU, from ``Preprocessing``.

        Returns:
            One entry an image, in order. A score depends on the batch it travelled in by less
            than ``BATCH_TOLERANCE``, relatively.
        """
        outputs = self._engine.run(images)
        return self.judge_outputs(outputs.feature_norms, outputs.logits, outputs.features)

    @torch.inference_mode()
    def judge(self, images: Tensor) -> Verdicts:
        """The verdicts of :meth:`detect` without the logits.

        Where the verdict needs none, the network runs only up to the selected block.
        """
        if self._score_name not in SCORES_WITHOUT_LOGITS or self._class_levels is not None:
            return self.detect(images)
        return self._judge(Evidence(self._engine.run_to_block(images)), None)

    @torch.inference_mode()
    def judge_outputs(
        self, feature_norms: Tensor, logits: Tensor, features: Tensor | None
    ) -> Detections:
        """The detections of images that the network has already seen.

        Args:
            feature_norms: of the selected block, ``[B]``.
            logits: ``[B, classes]`` float32.
            features: the head's input ``[B, D]``, for the scores that need it.
        """
        rescaled = None
        if self._score_name in SCORES_WITH_HEAD and features is not None:
            rescaled = selected_norm_logits(
                logits, features=features, bias=self._head_bias, feature_norms=feature_norms
            )
        evidence = Evidence(feature_norms, logits, rescaled)
        found = logits.cpu().numpy()
        return Detections(**vars(self._judge(evidence, found)), logits=found)

    def _judge(self, evidence: Evidence, logits: NDArray[np.float32] | None) -> Verdicts:
        scores = SCORES[self._score_name](evidence).cpu().numpy()
        thresholds = np.full_like(scores, self._threshold)
        values = p_values(scores, self._calibration_scores)
        uncertain_below = None
        if self._uncertain_below is not None:
            uncertain_below = np.full_like(scores, self._uncertain_below)
        if self._class_levels is not None and logits is not None:
            levels, classes = self._class_levels, logits.argmax(axis=1)
            thresholds = _own_or(levels.thresholds[classes], thresholds)
            if uncertain_below is not None and levels.uncertain_below is not None:
                uncertain_below = _own_or(levels.uncertain_below[classes], uncertain_below)
            self._within_classes(values, scores, classes)
        # A network that overflows on an image was not trained for images like it.
        is_finite = np.isfinite(scores)
        values[~is_finite] = 1 / (self._calibration_scores.size + 1)
        is_ood = ~is_finite | (scores < thresholds)
        return Verdicts(
            feature_norms=evidence.feature_norms.cpu().numpy(),
            scores=scores,
            p_values=values,
            is_ood=is_ood,
            is_uncertain=_uncertain(scores, uncertain_below, is_ood),
            thresholds=thresholds,
        )

    def _within_classes(
        self,
        values: NDArray[np.float64],
        scores: NDArray[np.float32],
        classes: NDArray[np.int64],
    ) -> None:
        """Replace the p-values of images whose predicted class has its own threshold."""
        levels = self._class_levels
        assert levels is not None
        for label in np.unique(classes):
            if not np.isnan(levels.thresholds[label]):
                own = self._calibration_scores[levels.calibration_classes == label]
                values[classes == label] = p_values(scores[classes == label], own)


@torch.inference_mode()
def check_agreement(
    detector: Detector, reference: Detector, images: Tensor, *, dtype: Dtype = "float32"
) -> None:
    """Return when two detectors score some images alike, together, and the first by itself.

    A score may differ by ``ENGINE_TOLERANCE`` of itself or of the threshold, whichever is larger
    (scores that are logarithms pass through zero), a logit by ``LOGIT_TOLERANCE`` of its image's
    largest, a FeatureNorm by ``ENGINE_TOLERANCE`` of the largest; the verdict of an image whose
    score is further from its threshold is the same.

    Args:
        detector: on the engine in question.
        reference: on the engine that the threshold was set with.
        images: ``[B, 3, crop, crop]`` uint8.
        dtype: what both compute in; the tolerances are its.

    Raises:
        EngineError: they differ; the message says by how much.
    """
    together, truth = detector.detect(images), reference.detect(images)
    alone, first = detector.detect(images[:1]), slice(0, 1)
    limit = ENGINE_TOLERANCE[dtype]
    for run, found, rows in (
        ("in a batch", together, slice(None)),
        ("alone", alone, first),
        ("at the block", detector.judge(images), slice(None)),
        ("alone at the block", detector.judge(images[:1]), first),
    ):
        scale = _score_scale(truth.scores[rows], truth.thresholds[rows])
        _check(f"a score {run}", found.scores, truth.scores[rows], scale, "itself", limit=limit)
    for found, rows in ((together, slice(None)), (alone, first)):
        logits, norms = truth.logits[rows], truth.feature_norms[rows]
        scale = np.abs(logits).max(axis=1, keepdims=True)
        largest = "the largest"
        _check("a logit", found.logits, logits, scale, largest, limit=LOGIT_TOLERANCE[dtype])
        # Whatever the score is, the answers tell the norm too.
        scale = norms.max(keepdims=True)
        _check("a FeatureNorm", found.feature_norms, norms, scale, largest, limit=limit)


def _score_scale(
    scores: NDArray[np.float32], thresholds: NDArray[np.float32]
) -> NDArray[np.float32]:
    finite = np.where(np.isfinite(thresholds), np.abs(thresholds), 0)
    return np.maximum(np.abs(scores), finite)


def _check(
    name: str,
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    scale: NDArray[np.float32],
    of: str,
    *,
    limit: float,
) -> None:
    """Return when no difference is more than ``limit`` of the scale."""
    if found.shape != expected.shape:
        raise EngineError(f"an output has shape {found.shape}; torch's has {expected.shape}")
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    difference = float((np.abs(found - expected) / scale).max())
    # Not "above": a score that is no number is above nothing.
    if not difference <= limit:
        raise EngineError(
            f"{name} differs from torch's by {difference:.2g} of {of}; the limit is {limit:g}"
        )


def _bias(network: nn.Module, head: str) -> Tensor | None:
    bias = cast("Tensor | None", network.get_submodule(head).bias)
    return None if bias is None else bias.detach()


def _own_or(own: NDArray[np.float32], for_all: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.isnan(own), for_all, own)


def _uncertain(
    scores: NDArray[np.float32],
    below: NDArray[np.float32] | None,
    is_ood: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    if below is None:
        return np.zeros_like(is_ood)
    return ~is_ood & (scores < below)
