"""One replica as a queue: how long requests take at a load, and what it can carry.

Requests arrive as a Poisson process and a server that is free takes all that wait, at most
``batch_limit``, as NormGate's workers do (``NORMGATE_MAX_WAIT_MS`` of 0, the default: a free one
never waits for company). A batch of ``n`` takes ``a + b * n`` seconds, times a factor drawn anew
for each; one that finds the server at rest takes ``waking_s`` more. With ``batch_limit`` 1 this is
M/G/1, with Welch's exceptional first service. Beyond it there is no closed form for the quantiles
of the time in the system, so they come from the chain embedded at the ends of batches, solved
numerically: exact but for the cut of the state space and the grid of arrival moments.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import poisson

Array = NDArray[np.float64]

_MOMENTS: Final = 12
"""Moments within a batch's service at which an arrival is looked at."""
_CUT: Final = 1e-7
"""Of the stationary probability that may lie in the last state that is kept."""
_MOST_STATES: Final = 4096
_BINS: Final = 6000
_SPAN: Final = (1e-3, 1e4)
"""The bins of a distribution of times, in mean batches of one and of as many as there can be."""


@dataclass(frozen=True)
class BatchTime:
    """Seconds that a batch takes.

    Args:
        a: whatever its size.
        b: more for each image.
        batch_limit: most images in a batch.
        factors: multiples of ``a + b * n``, of mean 1.
        shares: how likely each is; their sum is 1.
        waking_s: more for a batch that finds the server at rest, whose caches are others' by then.
    """

    a: float
    b: float
    batch_limit: int
    factors: tuple[float, ...] = (1.0,)
    shares: tuple[float, ...] = (1.0,)
    waking_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no server is.

        Raises:
            ValueError: a time or a factor is not positive, or a mean or a sum is not 1.
        """
        if self.a < 0 or self.b < 0 or self.a + self.b <= 0 or self.batch_limit < 1:
            raise ValueError(
                f"no batch takes {self.a} + {self.b} n seconds, n <= {self.batch_limit}"
            )
        if min(self.factors) <= 0 or abs(np.dot(self.factors, self.shares) - 1) > 1e-6:
            raise ValueError(f"factors must be positive and of mean 1, got {self.factors}")
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares must be positive and of sum 1, got {self.shares}")

    def seconds(self, images: int) -> float:
        """Mean of a batch of so many, at work."""
        return self.a + self.b * images

    @property
    def lone_s(self) -> float:
        """Mean of a batch of one that finds the server at rest."""
        return self.seconds(1) + self.waking_s

    @property
    def capacity(self) -> float:
        """Images a second when batches are full."""
        return self.batch_limit / self.seconds(self.batch_limit)


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """``a`` and ``b`` of ``a + b * n``, each error counted as a share of the seconds; ``a`` >= 0.

    Args:
        sizes: mean images a batch.
        seconds: mean seconds a batch, of the same batches: the mean of a line is the line's.
    """
    x, y = np.asarray(sizes, float), np.asarray(seconds, float)
    columns = np.stack([1 / y, x / y], axis=1)
    (a, b), *_ = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)
    if a < 0:
        return 0.0, float(np.sum(x / y) / np.sum((x / y) ** 2))
    return float(a), float(b)


@dataclass(frozen=True)
class Latency:
    """A distribution of seconds: values ascending, with their weights."""

    seconds: Array
    weights: Array

    def quantile(self, share: float) -> float:
        """Below this lies ``share`` of the weight."""
        sums = np.cumsum(self.weights)
        place = np.searchsorted(sums, share * sums[-1])
        return float(self.seconds[min(place, len(sums) - 1)])

    @property
    def mean(self) -> float:
        """In seconds."""
        return float(np.average(self.seconds, weights=self.weights))

    def shares(self, edges: Array) -> Array:
        """Of the weight between each two edges; what lies outside counts in the outer bins."""
        inside = np.clip(self.seconds, edges[0], np.nextafter(edges[-1], 0))
        counts, _ = np.histogram(inside, edges, weights=self.weights)
        found: Array = counts / self.weights.sum()
        return found


class BatchQueue:
    """The queue at one load.

    Args:
        time: of batches.
        rate: arrivals a second, below the capacity.

    Raises:
        ValueError: the rate is not positive or not below the capacity.
    """

    def __init__(self, time: BatchTime, *, rate: float) -> None:
        if not 0 < rate < time.capacity:
            raise ValueError(f"{rate:g} arrivals/s; the capacity is {time.capacity:g}")
        self._time = time
        self._rate = rate

    @cached_property
    def waiting(self) -> Array:
        """Probability of each number of requests waiting at the end of a batch.

        Raises:
            ValueError: too near the capacity for the states that are kept.
        """
        states = 8 * self._time.batch_limit
        while states <= _MOST_STATES:
            found = self._stationary(states)
            if found[-1] < _CUT:
                return found
            states *= 2
        raise ValueError(
            f"{self._rate:g} arrivals/s are too near the capacity, {self._time.capacity:g}"
        )

    @cached_property
    def mean_batch(self) -> float:
        """Images a batch."""
        return float(self.waiting @ self._sizes(len(self.waiting)))

    @cached_property
    def busy(self) -> float:
        """Share of the time in which a batch runs."""
        rests = float(self.waiting[0])
        seconds = self._time.a + self._time.b * self.mean_batch + self._time.waking_s * rests
        return seconds / (seconds + rests / self._rate)

    @cached_property
    def latency(self) -> Latency:
        """Of a request, from its arrival to the end of its batch."""
        return self._of_arrivals(includes_service=True)

    @cached_property
    def wait(self) -> Latency:
        """Of a request, from its arrival to the start of its batch."""
        return self._of_arrivals(includes_service=False)

    def _sizes(self, states: int) -> NDArray[np.int64]:
        """The batch after each number waiting; after none, the first to arrive goes alone."""
        return np.clip(np.arange(states), 1, self._time.batch_limit)

    def _stationary(self, states: int) -> Array:
        matrix = np.zeros((states, states))
        sizes = self._sizes(states)
        matrix[0] = self._arrivals(self._time.lone_s, states)
        arrived = {
            size: self._arrivals(self._time.seconds(size), states)
            for size in range(1, self._time.batch_limit + 1)
        }
        for waiting in range(1, states):
            left = waiting - sizes[waiting]
            matrix[waiting, left:] = arrived[int(sizes[waiting])][: states - left]
        # What would lie beyond the last state counts in it.
        matrix[:, -1] += np.clip(1 - matrix.sum(axis=1), 0, None)
        equations = np.vstack([matrix.T[:-1] - np.eye(states)[:-1], np.ones(states)])
        found: Array = np.linalg.solve(equations, np.eye(states)[-1])
        return np.clip(found, 0, None)

    def _arrivals(self, seconds: float, states: int) -> Array:
        """Probability of each number of arrivals while a batch of this mean time runs."""
        means = self._rate * seconds * np.asarray(self._time.factors)
        likely: Array = np.asarray(poisson.pmf(np.arange(states), means[:, None]))
        found: Array = np.asarray(self._time.shares) @ likely
        return found

    def _of_arrivals(self, *, includes_service: bool) -> Latency:
        """Of all arrivals, each weighed by how many there are of it between two ends of batches."""
        times = _Times(self._time)
        # Those that find the server free: one for each time that it becomes so.
        lone = self._time.lone_s * np.asarray(self._time.factors) * includes_service
        times.add(lone, self.waiting[0] * np.asarray(self._time.shares))
        for batch_s, left_shares in self._batches():
            if left_shares.sum() > _CUT / self._time.batch_limit:
                self._during(times, batch_s, left_shares, includes_service)
        return times.latency()

    def _batches(self) -> Iterator[tuple[float, Array]]:
        """The mean time of each kind of batch, with its probability by the number left behind."""
        limit, waiting = self._time.batch_limit, self.waiting
        yield self._time.lone_s, waiting[:1]
        for size in range(1, limit):
            yield self._time.seconds(size), waiting[size : size + 1]
        yield self._time.seconds(limit), waiting[limit:]

    def _during(
        self, times: "_Times", batch_s: float, left_shares: Array, includes_service: bool
    ) -> None:
        """Add those that arrive while a batch of this mean time runs."""
        of_factor = zip(self._time.factors, self._time.shares, strict=True)
        for factor, factor_share in of_factor:
            total = batch_s * factor
            weight = factor_share * self._rate * total / _MOMENTS
            for moment in (np.arange(_MOMENTS) + 0.5) / _MOMENTS * total:
                ahead = np.convolve(left_shares, _likely(self._rate * moment))
                seconds, shares = self._behind(ahead, total - moment, includes_service)
                times.add(seconds, weight * shares)

    def _behind(self, ahead: Array, rest_s: float, includes_service: bool) -> tuple[Array, Array]:
        """Of one behind so many, with these probabilities, ``rest_s`` before a batch ends."""
        limit = self._time.batch_limit
        numbers = np.flatnonzero(ahead > _CUT * ahead.sum())
        full, place = np.divmod(numbers, limit)
        # Its batch has all who stand with it and who come until that starts, as far as there is
        # room; the full batches before it count by their mean.
        until_s = rest_s + full * self._time.seconds(limit)
        if not includes_service:
            return until_s, ahead[numbers]
        behind, behind_shares = _likely_each(self._rate * until_s, most=limit - 1)
        own = np.minimum(place[:, None] + 1 + behind, limit)
        service = (self._time.a + self._time.b * own)[:, :, None] * np.asarray(self._time.factors)
        seconds = until_s[:, None, None] + service
        weights = (ahead[numbers, None] * behind_shares)[:, :, None] * np.asarray(self._time.shares)
        return seconds.ravel(), weights.ravel()


class _Times:
    """Weighted times, gathered in fine bins."""

    def __init__(self, time: BatchTime) -> None:
        low, high = _SPAN
        span = low * time.seconds(1), high * time.seconds(time.batch_limit)
        self._edges = np.geomspace(*span, _BINS)
        self._weights, self._sums = np.zeros(_BINS + 1), np.zeros(_BINS + 1)

    def add(self, seconds: Array, weights: Array) -> None:
        bins = np.searchsorted(self._edges, seconds)
        self._weights += np.bincount(bins, weights, _BINS + 1)
        self._sums += np.bincount(bins, weights * seconds, _BINS + 1)

    def latency(self) -> Latency:
        kept = self._weights > 0
        return Latency(self._sums[kept] / self._weights[kept], self._weights[kept])


def _likely(mean: float) -> Array:
    """Probability of 0, 1, ... arrivals, but for a millionth."""
    found: Array = poisson.pmf(np.arange(int(poisson.ppf(1 - 1e-6, mean)) + 1), mean)
    return found


def _likely_each(means: Array, *, most: int) -> tuple[NDArray[np.int64], Array]:
    """Numbers of arrivals ``[N]`` and their shares ``[M, N]`` for ``M`` means.

    Numbers above ``most`` count as it.
    """
    last = min(most, int(poisson.ppf(1 - 1e-6, means.max())))
    numbers = np.arange(last + 1, dtype=np.int64)
    shares: Array = np.asarray(poisson.pmf(numbers, means[:, None]))
    shares[:, -1] += 1 - shares.sum(axis=1)
    return numbers, shares
