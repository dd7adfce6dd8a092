"""How far apart two sets of scores lie, with bootstrap intervals; ID counts as positive."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

MetricName = Literal["auroc", "fpr95", "aupr_in", "aupr_out", "fpr95_ood_positive"]
Scores = NDArray[np.float64]
Weights = NDArray[np.float64]

RECALL: Final = 0.95
METRICS: Final[tuple[MetricName, ...]] = (
    "auroc",
    "fpr95",
    "aupr_in",
    "aupr_out",
    "fpr95_ood_positive",
)
_CHUNK: Final = 50


@dataclass(frozen=True)
class Resamples:
    """How often each image occurs in each bootstrap resample; the first row is all images once.

    Args:
        inside: ``[1 + R, N]`` counts of the ID images.
        outside: ``[1 + R, M]`` counts of the OOD images.
    """

    inside: NDArray[np.uint16]
    outside: NDArray[np.uint16]


def draw_counts(images: int, *, resamples: int, seed: Sequence[int]) -> NDArray[np.uint16]:
    """``[1 + resamples, images]``: once all images, then draws with replacement."""
    generator = np.random.default_rng(seed)
    counts = np.ones((1 + resamples, images), dtype=np.uint16)
    for row in counts[1:]:
        row[:] = np.bincount(generator.integers(0, images, images), minlength=images)
    return counts


def measure(
    inside: ArrayLike,
    outside: ArrayLike,
    *,
    resamples: Resamples | None = None,
    nearest_recall: bool = False,
) -> Mapping[MetricName, Scores]:
    """Every metric, on all images and on each resample of them.

    Args:
        inside: ``[N]`` scores of ID images, higher meaning more in-distribution.
        outside: ``[M]`` scores of OOD images.
        resamples: which images to count; all of them once by default.
        nearest_recall: ``fpr95`` is read where the share of ID kept is nearest to 95 %, as in
            the code of the paper's authors, rather than where it is at least that.

    Returns:
        ``[1 + R]`` for each metric, all in [0, 1]: ``auroc``, ties counting half; ``fpr95``, the
        share of OOD images accepted when 95 % of ID are kept (the paper's); ``aupr_in`` and
        ``aupr_out``, the area under precision over recall, by trapezoids, with ID or OOD as
        positive; ``fpr95_ood_positive``, the share of ID images refused when 95 % of OOD are
        caught (pytorch-ood's and OpenOOD's FPR95).
    """
    id_scores, ood_scores = (np.asarray(scores, dtype=np.float64) for scores in (inside, outside))
    if resamples is None:
        resamples = Resamples(
            *(np.ones((1, scores.size), dtype=np.uint16) for scores in (id_scores, ood_scores))
        )
    steps = _Steps.of(id_scores, ood_scores)
    parts = [
        _curves(
            steps,
            resamples.inside[start : start + _CHUNK],
            resamples.outside[start : start + _CHUNK],
            nearest_recall=nearest_recall,
        )
        for start in range(0, len(resamples.inside), _CHUNK)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """The chance that an ID image scores above an OOD image, ties counting half."""
    return float(measure(inside, outside)["auroc"][0])


def fpr95(inside: ArrayLike, outside: ArrayLike) -> float:
    """Share of OOD images accepted at the highest threshold that keeps 95 % of ID images."""
    return float(measure(inside, outside)["fpr95"][0])


@dataclass(frozen=True)
class _Steps:
    """All scores in falling order, and the last place of each group of equals."""

    order: NDArray[np.int64]
    is_inside: NDArray[np.bool_]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, inside: Scores, outside: Scores) -> "_Steps":
        scores = np.concatenate([inside, outside])
        order = np.argsort(-scores, kind="stable")
        falling = scores[order]
        ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
        return cls(order, order < inside.size, ends)


def _curves(
    steps: _Steps,
    inside: NDArray[np.uint16],
    outside: NDArray[np.uint16],
    *,
    nearest_recall: bool,
) -> dict[MetricName, Scores]:
    """The metrics of some resamples, from the counts kept at every threshold."""
    counts = np.concatenate([inside, outside], axis=1)[:, steps.order]
    kept_id = _cumulative(np.where(steps.is_inside, counts, 0), steps.ends)
    kept_ood = _cumulative(np.where(steps.is_inside, 0, counts), steps.ends)
    id_total, ood_total = inside.shape[1], outside.shape[1]
    recall, accepted = kept_id / id_total, kept_ood / ood_total
    cut = _first(np.round(kept_id - RECALL * id_total, 6) >= 0)
    if nearest_recall:
        cut = _nearest(recall)
    # From below: an image refused is one that is not kept.
    caught = ood_total - _shifted(kept_ood)
    last = recall.shape[1] - 1 - _first(np.round(caught - RECALL * ood_total, 6)[:, ::-1] >= 0)
    refused = 1 - _shifted(kept_id) / id_total
    return {
        "auroc": np.asarray(np.trapezoid(_from_zero(recall), _from_zero(accepted), axis=1)),
        "fpr95": _at(accepted, cut),
        "aupr_in": _area(kept_id, kept_ood),
        "aupr_out": _area(caught[:, ::-1], (id_total - _shifted(kept_id))[:, ::-1]),
        "fpr95_ood_positive": _at(refused, last),
    }


def _cumulative(counts: NDArray[np.uint16], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(counts, axis=1, dtype=np.int64)[:, ends]


def _area(true: NDArray[np.int64], false: NDArray[np.int64]) -> Scores:
    """Under precision over recall; precision is 1 at recall 0."""
    with np.errstate(invalid="ignore"):
        precision = np.where(true + false > 0, true / (true + false), 1.0)
    recall = true / true[:, -1:]
    from_one = np.concatenate([np.ones_like(precision[:, :1]), precision], axis=1)
    return np.asarray(np.trapezoid(from_one, _from_zero(recall), axis=1))


def _from_zero(values: Scores) -> Scores:
    return np.concatenate([np.zeros_like(values[:, :1]), values], axis=1)


def _shifted(kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """What is kept strictly above each threshold."""
    return np.concatenate([np.zeros_like(kept[:, :1]), kept[:, :-1]], axis=1)


def _first(holds: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.asarray(np.argmax(holds, axis=1))


def _nearest(recall: Scores) -> NDArray[np.int64]:
    """Where recall is nearest to 95 %: the lowest such threshold, as in the authors' code.

    Thresholds below the one that keeps every ID image are not looked at.
    """
    full = _first(recall >= 1)
    distance = np.abs(recall - RECALL)
    distance[np.arange(recall.shape[1]) > full[:, None]] = np.inf
    return np.asarray(recall.shape[1] - 1 - np.argmin(distance[:, ::-1], axis=1))


def _at(values: Scores, places: NDArray[np.int64]) -> Scores:
    return values[np.arange(len(values)), places]
