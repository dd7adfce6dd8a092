"""The tail of a queue that nothing disturbs, for a server's to be held against.

Requests arrive as a Poisson process, each takes the same time on one of several cores, and the
first to come is the first to go (M/D/c): no machine is as regular, no order as fair. A server can
have a lower p99 / p50 only where larger batches make it faster, or where all wait for longer.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

_REQUESTS: Final = 2_000_000


def tail(*, cores: int, load: float, seed: int = 0) -> float:
    """p99 / p50 of the time from arrival to answer, simulated to about one in a hundred.

    Args:
        cores: that serve.
        load: share of the time that they are busy, below 1.
        seed: of the arrivals.
    """
    gaps = np.random.default_rng(seed).exponential(1 / (load * cores), _REQUESTS)
    arrivals = np.cumsum(gaps)
    # All services being alike, every core serves each cores-th request.
    times = np.concatenate([_times(arrivals[core::cores]) for core in range(cores)])
    p50, p99 = np.percentile(times, (50, 99))
    return float(p99 / p50)


def _times(arrivals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Until the answers of one core, which takes 1 for each; Lindley's recursion, solved."""
    ahead = np.arange(len(arrivals)) - arrivals
    return 1 + ahead - np.minimum.accumulate(ahead)
