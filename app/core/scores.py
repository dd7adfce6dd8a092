"""Scores that tell ID from OOD images: FeatureNorm, the classic ones, and the two together.

Higher always means more in-distribution.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from app.errors import NetworkError

ScoreName = Literal[
    "feature_norm",
    "norm_logit",
    "selected_norm_energy",
    "selected_norm_msp",
    "energy",
    "msp",
]


@dataclass(frozen=True)
class Evidence:
    """What the scores of ``B`` images are computed from.

    Args:
        feature_norms: of the selected block, ``[B]`` float32.
        logits: ``[B, classes]`` float32, unless the network stopped at the block.
        selected_norm_logits: like ``logits``, where the network ends in a linear layer.
    """

    feature_norms: Tensor
    logits: Tensor | None = None
    selected_norm_logits: Tensor | None = None


def selected_norm_logits(
    logits: Tensor, *, features: Tensor, bias: Tensor | None, feature_norms: Tensor
) -> Tensor:
    """The logits had the last feature vector the selected block's FeatureNorm as its length.

    Yu et al., CVPR 2023 (arXiv:2212.02295), section 5: the direction of the vector is kept.

    Args:
        logits: ``[B, classes]``, of the last linear layer.
        features: its input ``[B, D]``.
        bias: its bias ``[classes]``, if it has one.
        feature_norms: ``[B]``.

    Returns:
        ``[B, classes]`` float32; the bias alone where the feature vector is zero.
    """
    lengths = torch.linalg.vector_norm(features.float(), dim=1)
    # The layer is linear: scaling its input scales what it adds to the bias. A zero vector adds
    # nothing, whatever it is divided by.
    scales = (feature_norms / torch.where(lengths > 0, lengths, 1))[:, None]
    offset = 0 if bias is None else bias.float()
    rescaled: Tensor = (logits - offset) * scales + offset
    return rescaled


def energy(logits: Tensor) -> Tensor:
    """The negative free energy at temperature 1: ``[B]`` from logits ``[B, classes]``.

    Liu et al., NeurIPS 2020 (arXiv:2010.03759).
    """
    return torch.logsumexp(logits, dim=1)


def msp(logits: Tensor) -> Tensor:
    """The largest softmax probability: ``[B]`` from logits ``[B, classes]``.

    Hendrycks and Gimpel, ICLR 2017 (arXiv:1610.02136).
    """
    return logits.softmax(dim=1).amax(dim=1)


def _norm_logit(evidence: Evidence) -> Tensor:
    return evidence.feature_norms * energy(_logits(evidence)).clamp_min(0)


SCORES: Final[Mapping[ScoreName, Callable[[Evidence], Tensor]]] = {
    "feature_norm": lambda evidence: evidence.feature_norms,
    "norm_logit": _norm_logit,
    "selected_norm_energy": lambda evidence: energy(_selected_norm_logits(evidence)),
    "selected_norm_msp": lambda evidence: msp(_selected_norm_logits(evidence)),
    "energy": lambda evidence: energy(_logits(evidence)),
    "msp": lambda evidence: msp(_logits(evidence)),
}
"""``[B]`` float32 for each name, from the evidence of a batch."""

SCORES_WITHOUT_LOGITS: Final[frozenset[ScoreName]] = frozenset({"feature_norm"})
"""Those for which a verdict needs the network only up to the selected block."""

SCORES_WITH_HEAD: Final[frozenset[ScoreName]] = frozenset(
    {"selected_norm_energy", "selected_norm_msp"}
)
"""Those that need a network whose logits come out of one linear layer."""


def _logits(evidence: Evidence) -> Tensor:
    assert evidence.logits is not None
    return evidence.logits


def _selected_norm_logits(evidence: Evidence) -> Tensor:
    if evidence.selected_norm_logits is None:
        raise NetworkError("the network has no last linear layer, whose input the score rescales")
    return evidence.selected_norm_logits
