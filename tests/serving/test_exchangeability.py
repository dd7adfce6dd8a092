"""The test of exchangeability: the odds are exact, the bets fair, and changes are found."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from app.serving.exchangeability import (
    ALTERNATIVES,
    Bins,
    ExchangeabilityTest,
    lots,
    quantile_bins,
    tilts,
)


def odds(gaps: Sequence[int], sequence: Sequence[int]) -> Fraction:
    """The urn's chance of a sequence of bins: each image adds a gap to its bin."""
    counts, chance = list(gaps), Fraction(1)
    for index in sequence:
        chance *= Fraction(counts[index], sum(counts))
        counts[index] += 1
    return chance


def test_the_odds_are_those_of_ranks() -> None:
    """Over all orders of 3 calibration and 2 live scores, bins are as frequent as the urn says."""
    found: Counter[tuple[int, ...]] = Counter()
    for ordered in itertools.permutations(range(5)):
        scores = np.array(ordered, dtype=np.float32)
        bins = quantile_bins(scores[:3])
        found[tuple(bins.of(float(score), 0.5) for score in scores[3:])] += 1

    assert bins.gaps == [1, 1, 1, 1]
    assert {pair: Fraction(count, 120) for pair, count in found.items()} == {
        pair: odds(bins.gaps, pair) for pair in itertools.product(range(4), repeat=2)
    }


def test_the_odds_hold_for_equal_scores() -> None:
    """Scores of two values only: lots give every gap the same chance, 1 of 4."""
    chooser = np.random.default_rng(1)
    found: Counter[int] = Counter()
    for seed in range(4_000):
        *calibration, live = chooser.integers(0, 2, 4).astype(np.float32)
        bins = quantile_bins(np.array(calibration), seed=seed)
        found[bins.of(float(live), float(chooser.random()))] += 1

    assert chisquare([found[index] for index in range(4)]).pvalue > 0.01


def test_p_values_are_uniform_and_independent() -> None:
    """A stream forty times longer than the calibration still has uniform p-values."""
    scores = np.random.default_rng(2).normal(size=4_100).astype(np.float32)
    bins, lot = quantile_bins(scores[:100]), lots(3)
    counts, values = list(bins.gaps), []
    for score in scores[100:].tolist():
        index = bins.of(score, lot())
        values.append((sum(counts[:index]) + lot() * counts[index]) / sum(counts))
        counts[index] += 1

    assert kstest(values, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 3 / math.sqrt(len(values))


@pytest.mark.parametrize("gaps", [[2, 1, 3], [1, 1], [5, 40, 5, 50]])
def test_bets_are_fair(gaps: list[int]) -> None:
    """The capital's mean over all streams is 1 after every number of images."""
    for images in (1, 2, 5):
        mean = 0.0
        for sequence in itertools.product(range(len(gaps)), repeat=images):
            test = ExchangeabilityTest(gaps)
            for index in sequence:
                test.observe(index)
            mean += float(odds(gaps, sequence)) * test.capital
        assert mean == pytest.approx(1, abs=1e-12)


def test_tilts_are_densities() -> None:
    """Each alternative's chances of the bins add up to 1, and none of them is 0."""
    gaps = [1, 4, 15, 30, 50]

    rows = np.array(tilts(gaps))

    assert rows.shape == (5, len(ALTERNATIVES))
    assert (rows > 0).all()
    np.testing.assert_allclose(np.array(gaps) @ rows / 100, 1)


def test_a_later_change_is_found_too() -> None:
    """After 50,000 images, 10 % far below the others raise the evidence a hundredfold."""
    bins, lot = quantile_bins(np.arange(1_000, dtype=np.float32)), lots(4)
    chooser = np.random.default_rng(4)
    test = ExchangeabilityTest(bins.gaps)
    for score in (chooser.random(50_000) * 1_000).tolist():
        test.observe(bins.of(score, lot()))
    assert test.largest < 100

    for _ in range(500):
        score = -1.0 if chooser.random() < 0.1 else chooser.random() * 1_000
        test.observe(bins.of(score, lot()))

    assert test.largest >= 100


def test_the_evidence_falls_when_the_change_ends() -> None:
    """However strong a short shift was, the evidence is gone a thousand images after it."""
    bins, lot = quantile_bins(np.arange(5_000, dtype=np.float32)), lots(5)
    test = ExchangeabilityTest(bins.gaps)
    for _ in range(100):
        test.observe(0)
    assert test.capital == pytest.approx(1e30)

    for score in (np.random.default_rng(5).random(1_000) * 5_000).tolist():
        test.observe(bins.of(score, lot()))

    assert test.capital < 10
    assert test.largest == pytest.approx(1e30)


def test_a_shift_from_the_start_is_found_with_few_calibration_scores() -> None:
    """Against 300 calibration scores 10 % far below the others are found from the first image."""
    bins, lot = quantile_bins(np.arange(300, dtype=np.float32)), lots(6)
    chooser, test = np.random.default_rng(6), ExchangeabilityTest(bins.gaps)
    for _ in range(3_000):
        score = -1.0 if chooser.random() < 0.1 else chooser.random() * 300
        test.observe(bins.of(score, lot()))

    assert test.largest >= 100


def test_the_evidence_does_not_sink() -> None:
    """A long stream without a change leaves a reserve to find a later one with."""
    bins, lot = quantile_bins(np.arange(5_000, dtype=np.float32)), lots(7)
    test = ExchangeabilityTest(bins.gaps)
    for score in (np.random.default_rng(7).random(50_000) * 5_000).tolist():
        test.observe(bins.of(score, lot()))

    assert 0.1 < test.capital < 100


def test_few_calibration_scores() -> None:
    """One score makes two bins; equal scores make the usual number."""
    assert quantile_bins(np.zeros(1, dtype=np.float32)).gaps == [1, 1]
    equal = quantile_bins(np.zeros(1_000, dtype=np.float32))
    assert sum(equal.gaps) == 1_001
    assert len(equal.gaps) == 22


def test_bins_are_closed_below() -> None:
    """A score beyond all ends lies in the last bin, one before them in the first."""
    bins = Bins([(1.0, 0.5), (2.0, 0.5)], [1, 1, 1])

    assert [bins.of(score, 0.2) for score in (0.0, 1.0, 1.5, 2.0, 3.0)] == [0, 0, 1, 1, 2]
    assert bins.of(1.0, 0.7) == 1
