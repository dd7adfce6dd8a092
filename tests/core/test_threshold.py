"""Thresholds, p-values and their promises against the definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from app.core.threshold import (
    Guarantee,
    conformal_rank,
    fit_class_thresholds,
    fit_threshold,
    p_values,
    pac_rank,
    realised_rate,
)
from app.errors import CalibrationError

FINITE = st.floats(-1e3, 1e3, width=32)


@pytest.mark.parametrize(
    ("n", "alpha", "k"),
    [(19, 0.05, 1), (20, 0.05, 1), (39, 0.05, 2), (999, 0.1, 100), (99, 0.29, 29), (99, 0.07, 7)],
)
def test_conformal_rank(n: int, alpha: float, k: int) -> None:
    """K is floor(alpha (n + 1)) of the decimal as written, not of its binary neighbour."""
    assert conformal_rank(n, alpha=alpha) == k


def test_too_few_for_conformal() -> None:
    """Where k would be 0 the message says how many images are needed."""
    with pytest.raises(CalibrationError, match=r"18 threshold images .* at least 19 are needed"):
        conformal_rank(18, alpha=0.05)


@pytest.mark.parametrize(("n", "k"), [(59, 1), (1000, 39), (5000, 225)])
def test_pac_rank(n: int, k: int) -> None:
    """The figures of the design for alpha = delta = 0.05."""
    assert pac_rank(n, alpha=0.05, delta=0.05) == k


@pytest.mark.parametrize("n", [59, 100, 333])
def test_pac_rank_by_the_binomial(n: int) -> None:
    """BetaCDF(alpha; k, n + 1 - k) is the chance of k or more successes in n at rate alpha."""
    k = pac_rank(n, alpha=0.05, delta=0.05)

    assert binom.sf(k - 1, n, 0.05) >= 0.95
    assert binom.sf(k, n, 0.05) < 0.95


def test_too_few_for_pac() -> None:
    """58 images carry no PAC threshold at 0.05 and 0.05: 0.95 ** 58 is above 0.05."""
    assert 0.95**58 > 0.05 >= 0.95**59
    with pytest.raises(CalibrationError, match="at least 59 are needed"):
        pac_rank(58, alpha=0.05, delta=0.05)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan])
def test_rates_out_of_bounds(rate: float) -> None:
    """Alpha and delta must lie strictly between 0 and 1."""
    with pytest.raises(CalibrationError, match="alpha is"):
        conformal_rank(100, alpha=rate)
    with pytest.raises(CalibrationError, match="delta is"):
        pac_rank(100, alpha=0.05, delta=rate)


def test_threshold_is_the_kth_smallest() -> None:
    """Of the scores 1 to 39 at alpha 0.05, the second smallest, in any order of the scores."""
    scores = np.random.default_rng(0).permutation(np.arange(1, 40))

    threshold = fit_threshold(scores, alpha=0.05)

    assert (threshold.value, threshold.n, threshold.k) == (2.0, 39, 2)
    assert threshold.delta is None


def test_scores_must_be_finite() -> None:
    """A NaN among the scores is refused with its count."""
    with pytest.raises(CalibrationError, match="1 of 100 scores"):
        fit_threshold([math.nan, *range(99)])


@given(
    st.lists(FINITE, min_size=30, max_size=60),
    st.lists(FINITE, min_size=1, max_size=20),
    st.sampled_from([0.05, 0.1, 0.3]),
)
def test_p_values(calibration: list[float], scores: list[float], alpha: float) -> None:
    """(1 + #{calibration <= s}) / (n + 1), and at most alpha exactly when the verdict is OOD."""
    ordered = np.sort(np.array(calibration, dtype=np.float32))
    threshold = fit_threshold(ordered, alpha=alpha)

    found = p_values(scores, ordered)

    expected = [(1 + sum(c <= s for c in ordered)) / (len(ordered) + 1) for s in scores]
    assert found.tolist() == pytest.approx(expected)
    assert (found <= alpha).tolist() == [score < threshold.value for score in scores]


@pytest.mark.parametrize(("guarantee", "bound"), [("conformal", 0.05), ("pac", 0.05)])
def test_false_alarms(guarantee: Guarantee, bound: float) -> None:
    """Over 2,000 calibrations on uniform scores, where a threshold t has false-alarm rate t.

    Conformal: the mean rate is at most alpha. PAC: at most delta of the rates exceed alpha.
    """
    generator = np.random.default_rng(0)
    rates = np.array(
        [fit_threshold(generator.random(200), guarantee=guarantee).value for _ in range(2_000)]
    )

    if guarantee == "conformal":
        assert rates.mean() == pytest.approx(10 / 201, abs=0.002)
    else:
        assert (rates > bound).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2_000)


def test_realised_rate_interval() -> None:
    """The interval holds 95 % of simulated false-alarm rates."""
    generator = np.random.default_rng(1)
    rates = np.sort(generator.random((4_000, 100)), axis=1)[:, 4]

    interval = realised_rate(100, k=5)

    inside = ((interval.low <= rates) & (rates <= interval.high)).mean()
    assert inside == pytest.approx(0.95, abs=0.015)


def test_thresholds_of_classes() -> None:
    """A class's threshold is that of its own scores; a class with too few has none."""
    generator = np.random.default_rng(0)
    scores = np.sort(generator.normal(size=400).astype(np.float32))
    classes = generator.choice(3, size=400, p=[0.6, 0.3, 0.1])

    found = fit_class_thresholds(scores, classes, alpha=0.05)

    # k = floor(0.05 (n + 1)) reaches 5 from n = 99 on.
    counts = np.bincount(classes)
    assert counts[0] > counts[1] > 99 > counts[2]
    assert found.keys() == {0, 1}
    for label, threshold in found.items():
        assert threshold == fit_threshold(scores[classes == label], alpha=0.05)


def test_false_alarms_of_classes() -> None:
    """Each class with its own threshold keeps alpha among its images, however its scores lie."""
    generator = np.random.default_rng(1)
    classes, fresh_classes = generator.integers(0, 3, (2, 6000))
    scores, fresh = (
        (generator.normal(size=6000) + 3 * labels).astype(np.float32)
        for labels in (classes, fresh_classes)
    )
    order = np.argsort(scores)

    found = fit_class_thresholds(scores[order], classes[order], alpha=0.1)

    for label, threshold in found.items():
        rate = np.mean(fresh[fresh_classes == label] < threshold.value)
        # About 2,000 images set the threshold and 2,000 measure it.
        assert rate == pytest.approx(0.1, abs=4 * np.sqrt(2 * 0.1 * 0.9 / 2000))
    assert found.keys() == {0, 1, 2}
