"""Is the live stream still like the calibration images? A test that never tires.

The null hypothesis is that calibration and live scores are exchangeable. Under it every new score
is equally likely to fall into each gap between the scores so far, so that the gaps a bin holds
give the exact chance of the next score to fall into it, whatever the distribution of the scores
(a Pólya urn that starts with the gaps between the calibration scores). Bets at these odds are
fair: the capital is a martingale that starts at 1, and by Ville's inequality the chance that it
*ever* reaches ``1 / bound`` is at most ``bound``. A fixed calibration set gives no such odds: it
is only a sample, and a test that takes it for the distribution alarms surely in the end.

Ranks, not scores, are bet on, as by conformal test martingales: Vovk, *Testing randomness
online*, Statistical Science 36, 2021; Vovk et al., *Retrain or not retrain: conformal test
martingales for change-point detection*, COPA 2021. That the odds of binned ranks are known lets
the bets be placed on the bins themselves, without the random p-values.

So that a change is found whenever it comes, the capital is spread over all times at which bets
may begin, as in the Shiryaev-Roberts procedure, by weights that sum to 1.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

QUANTILES: Final = (
    *(0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99),
)
"""Of the calibration scores: where one bin ends. Finer where OOD images fall."""
_PATIENCE: Final = 1_000
"""After so many images two fifths of the capital have been put to use."""
_LEARNT_FROM: Final = 100
_LEARNT_STAKE: Final = 0.2
"""Of the capital, staked from the first image on another urn, which counts the calibration scores
as so few gaps and soon follows the live images: it finds what differs from the start, or slowly."""
_RICH: Final = 1e30
"""What a bet makes beyond this is given away: the evidence falls soon after a shift ends."""

Cdf = Callable[[float], float]


def _low(exponent: float) -> Cdf:
    return lambda u: u**exponent


def _high(exponent: float) -> Cdf:
    return lambda u: 1 - (1 - u) ** exponent


def _ends(exponent: float) -> Cdf:
    return lambda u: (u**exponent + 1 - (1 - u) ** exponent) / 2


def _middle(u: float) -> float:
    return u * u * (3 - 2 * u)


ALTERNATIVES: Final[Sequence[tuple[float, Cdf]]] = (
    *((0.02, _low(0.1)), (0.1, _low(0.1)), (0.4, _low(0.1)), (0.3, _low(0.4)), (1, _low(0.4))),
    *((0.1, _high(0.1)), (0.3, _high(0.4)), (1, _high(0.4))),
    *((0.5, _ends(0.4)), (0.5, _middle)),
)
"""What is bet on: a share of the scores, and how their ranks among calibration scores lie."""


@dataclass(frozen=True)
class Bins:
    """Ranges of scores, each with the number of gaps between calibration scores that it holds.

    A score that equals a bin's end falls to either side by lot, as it does among calibration
    scores that are equal: the odds are exact for any distribution.
    """

    ends: Sequence[tuple[float, float]]
    """Ascending: a calibration score, and its lot among its equals."""
    gaps: Sequence[int]
    """One more than ``ends``; their sum is one more than the calibration scores."""

    def of(self, score: float, lot: float) -> int:
        """The bin of a score, given a uniform ``lot`` in [0, 1)."""
        return bisect_left(self.ends, (score, lot))


def quantile_bins(scores: NDArray[np.float32], *, seed: int = 0) -> Bins:
    """Bins that end at the ``QUANTILES`` of the calibration scores; fewer where these are few.

    Args:
        scores: ``[N]``, finite, at least one.
        seed: of the lots.
    """
    lots = np.random.default_rng(seed).random(len(scores))
    order = np.lexsort((lots, scores))
    ranks = sorted({round(quantile * (len(scores) + 1)) for quantile in QUANTILES} - {0})
    ranks = [rank for rank in ranks if rank <= len(scores)]
    ends = [(float(scores[index]), float(lots[index])) for index in order[np.array(ranks) - 1]]
    gaps = [after - before for before, after in pairwise([0, *ranks, len(scores) + 1])]
    return Bins(ends, gaps)


class ExchangeabilityTest:
    """Capital won by bets against exchangeability. Its memory is fixed.

    Args:
        gaps: of the bins, see :class:`Bins`.
    """

    def __init__(self, gaps: Sequence[int]) -> None:
        self._tilts = tilts(gaps)
        self._sums = [
            math.fsum(gap * row[k] for gap, row in zip(gaps, self._tilts, strict=True))
            for k in range(len(ALTERNATIVES))
        ]
        self._gaps = float(sum(gaps))
        self._counts = list(map(float, gaps))
        self._learnt_gaps = min(_LEARNT_FROM, self._gaps / 2)
        self._learnt = [self._learnt_gaps * gap / self._gaps for gap in gaps]
        self._stakes = [0.0] * len(ALTERNATIVES)
        self._learnt_stake, self._reserve = _LEARNT_STAKE, 1 - _LEARNT_STAKE
        self._capital = self._largest = 1.0
        self.images = 0

    @property
    def capital(self) -> float:
        """The evidence now: 1 at the start, and fair bets all along."""
        return self._capital

    @property
    def largest(self) -> float:
        """The largest capital since the start."""
        return self._largest

    def observe(self, index: int) -> float:
        """The capital after the next image, whose score lies in bin ``index``."""
        self.images += 1
        reserve = (1 - _LEARNT_STAKE) / (1 + math.log1p(self.images / _PATIENCE))
        # Staked before the image is seen: bets that begin with it.
        fresh = (self._reserve - reserve) / len(self._stakes)
        self._reserve = reserve
        tilt, gaps = self._tilts[index], self._gaps
        # Each bet pays its tilt of the bin, over the mean of its tilts at the odds of now.
        self._stakes = [
            (stake + fresh) * own * gaps / total
            for stake, own, total in zip(self._stakes, tilt, self._sums, strict=True)
        ]
        self._learn(index)
        # The new score splits a gap of its bin in two.
        self._sums = [total + own for total, own in zip(self._sums, tilt, strict=True)]
        self._gaps = gaps + 1
        capital = reserve + sum(self._stakes) + self._learnt_stake
        if capital > _RICH:
            self._stakes = [stake * _RICH / capital for stake in self._stakes]
            self._learnt_stake *= _RICH / capital
            capital = _RICH
        self._capital = capital
        if capital > self._largest:
            self._largest = capital
        return capital

    def _learn(self, index: int) -> None:
        """Settle the bet on what the live images so far have been."""
        learnt = self._learnt[index] / self._learnt_gaps
        self._learnt_stake *= learnt * self._gaps / self._counts[index]
        self._learnt[index] += 1
        self._learnt_gaps += 1
        self._counts[index] += 1


def tilts(gaps: Sequence[int]) -> list[tuple[float, ...]]:
    """``[bins][ALTERNATIVES]``: how much likelier each alternative makes each bin at the start."""
    whole = sum(gaps)
    ends = [0.0, *(float(end) / whole for end in np.cumsum(gaps))]
    return [
        tuple(
            1 - share + share * (cdf(high) - cdf(low)) / (high - low) for share, cdf in ALTERNATIVES
        )
        for low, high in pairwise(ends)
    ]


def lots(seed: int = 0) -> Callable[[], float]:
    """Uniform numbers in [0, 1), the same ones for a seed."""
    return random.Random(seed).random
