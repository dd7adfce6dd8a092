"""The metrics: by hand, and against scikit-learn and pytorch-ood on random and tied scores."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_ood.metrics import functional as pytorch_ood_metrics
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve

from app.offline.metrics import METRICS, Resamples, auroc, draw_counts, fpr95, measure

Scores = NDArray[np.float64]


def wide(scores: Sequence[float]) -> Scores:
    """Scores as the metrics take them."""
    return np.asarray(scores, dtype=np.float64)


def random_scores(seed: int, *, is_tied: bool) -> tuple[Scores, Scores]:
    """ID and OOD scores that overlap, with many ties or with none."""
    generator = np.random.default_rng(seed)
    inside, outside = generator.normal(1, 1, 200), generator.normal(0, 1.5, 137)
    return (inside.round(), outside.round()) if is_tied else (inside, outside)


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        ([2, 3], [0, 1], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 3], [0, 2], 0.75),
        ([1, 1], [1, 1, 1], 0.5),
        ([1, 2], [1, 0], 0.875),
        ([5], [5, 4, 4, 6], 0.625),
    ],
)
def test_auroc_by_hand(inside: Sequence[float], outside: Sequence[float], expected: float) -> None:
    """The share of pairs in which ID scores higher, a tie counting half."""
    assert auroc(wide(inside), wide(outside)) == pytest.approx(expected, abs=1e-12)


def test_auroc_is_the_share_of_pairs() -> None:
    """On many scores with ties it is the mean over all pairs."""
    generator = np.random.default_rng(0)
    inside = generator.integers(3, 13, 200).astype(np.float64)
    outside = generator.integers(0, 10, 300).astype(np.float64)
    difference = inside[:, None] - outside[None]

    assert auroc(inside, outside) == pytest.approx(
        np.mean((difference > 0) + 0.5 * (difference == 0)), abs=1e-12
    )


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        # Of 1..20 the highest threshold that keeps 19 is 2.
        (range(1, 21), [1.9, 2, 2.1, 0], 0.5),
        (range(1, 21), [0, 1], 0.0),
        (range(1, 21), [30, 40], 1.0),
        # Of 10 images 95 % are kept only when all 10 are.
        (range(1, 11), [0.5, 1, 1.5, 9], 0.75),
        # Ties at the threshold are all kept, ID and OOD.
        ([1] * 19 + [2], [1, 1, 0, 2], 0.75),
        ([7], [7, 6], 0.5),
    ],
)
def test_fpr95_by_hand(inside: Sequence[float], outside: Sequence[float], expected: float) -> None:
    """The share of OOD at or above the highest threshold that keeps 95 % of ID."""
    assert fpr95(wide(inside), wide(outside)) == expected


def test_fpr95_takes_id_as_positive() -> None:
    """As in the paper: a few low ID scores cost nothing, a few high OOD scores count as such.

    With OOD as positive (OpenOOD) the same scores would give 1.0: to catch 95 % of the OOD
    images the threshold has to lie above every ID image.
    """
    inside, outside = wide([0] * 5 + [10] * 95), wide([1] * 90 + [20] * 10)

    assert fpr95(inside, outside) == 0.1


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_agreement_with_scikit_learn(seed: int, is_tied: bool) -> None:
    """AUROC, both AUPR and both FPR95 are read off scikit-learn's curves."""
    inside, outside = random_scores(seed, is_tied=is_tied)
    scores = np.concatenate([inside, outside])
    is_inside = np.repeat([True, False], [inside.size, outside.size])

    measured = measure(inside, outside)

    false_rates, true_rates, _ = roc_curve(is_inside, scores, drop_intermediate=False)
    ood_false_rates, ood_true_rates, _ = roc_curve(~is_inside, -scores, drop_intermediate=False)
    expected = {
        "auroc": roc_auc_score(is_inside, scores),
        "fpr95": false_rates[np.flatnonzero(true_rates >= 0.95)[0]],
        "aupr_in": auc(*precision_recall_curve(is_inside, scores)[1::-1]),
        "aupr_out": auc(*precision_recall_curve(~is_inside, -scores)[1::-1]),
        "fpr95_ood_positive": ood_false_rates[np.flatnonzero(ood_true_rates >= 0.95)[0]],
    }
    assert {name: float(values[0]) for name, values in measured.items()} == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("is_tied", [False, True])
def test_agreement_with_pytorch_ood(is_tied: bool) -> None:
    """Its outlier scores are ours with the sign turned; its FPR95 is ``fpr95_ood_positive``."""
    inside, outside = random_scores(7, is_tied=is_tied)
    outlier = -torch.from_numpy(np.concatenate([inside, outside]))
    labels = torch.tensor([0] * inside.size + [-1] * outside.size)

    measured = measure(inside, outside)

    expected = {
        "auroc": pytorch_ood_metrics.auroc(outlier, labels),
        "aupr_in": pytorch_ood_metrics.aupr(outlier, labels, positive="id"),
        "aupr_out": pytorch_ood_metrics.aupr(outlier, labels, positive="ood"),
        "fpr95_ood_positive": pytorch_ood_metrics.fpr_at_tpr(outlier, labels, 0.95),
    }
    for name, value in expected.items():
        assert measured[name][0] == pytest.approx(float(value), abs=1e-12)  # type: ignore[index]


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        # Of 11 images 10 (0.909) are nearer than 11, from 2 down to 1.5.
        (range(1, 12), [1.5, 2.5, 0.5], 2 / 3),
        # Of 8 images 8 (1.0) are nearer than 7 (0.875), from 1 on; nothing below counts.
        (range(1, 9), [1.5, 2.5, 0.5], 2 / 3),
        # Of 20 images 19 are 95 % from 2 down to 1.9; ours is read at 2.
        (range(1, 21), [1.9, 2, 2.1, 0], 0.75),
    ],
)
def test_fpr95_at_the_nearest_recall(
    inside: Sequence[float], outside: Sequence[float], expected: float
) -> None:
    """The authors' convention: the lowest threshold whose recall is nearest to 95 %."""
    measured = measure(wide(inside), wide(outside), nearest_recall=True)

    assert measured["fpr95"][0] == pytest.approx(expected)


def test_a_resample_is_the_images_it_names() -> None:
    """Counting an image twice or not at all is repeating it or leaving it out."""
    inside, outside = random_scores(3, is_tied=True)
    resamples = Resamples(
        draw_counts(inside.size, resamples=4, seed=[0]),
        draw_counts(outside.size, resamples=4, seed=[1]),
    )

    measured = measure(inside, outside, resamples=resamples)

    for row in range(5):
        repeated = measure(
            np.repeat(inside, resamples.inside[row]), np.repeat(outside, resamples.outside[row])
        )
        for name in METRICS:
            assert measured[name][row] == pytest.approx(repeated[name][0], abs=1e-12)


def test_draws() -> None:
    """The first row is every image once; each other row counts as many draws as images."""
    counts = draw_counts(50, resamples=20, seed=[3])

    assert counts[0].tolist() == [1] * 50
    assert (counts.sum(axis=1) == 50).all()
    assert (counts[1:].max(axis=1) > 1).all()
    np.testing.assert_array_equal(counts, draw_counts(50, resamples=20, seed=[3]))
