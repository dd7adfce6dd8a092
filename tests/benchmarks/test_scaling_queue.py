"""The queueing model of a replica against closed forms and against single requests."""

import math

import numpy as np
import pytest

from benchmarks.scaling.batch_queue import BatchQueue, BatchTime, Latency, fit_line
from benchmarks.scaling.events import Rules, simulate

BATCHES = BatchTime(0.002, 0.002, 8, factors=(0.8, 1.8), shares=(0.8, 0.2), waking_s=0.001)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_batches_of_one_are_m_d_1(load: float) -> None:
    """With equal batches of one the mean wait is Pollaczek's, rho / 2 (1 - rho) services."""
    queue = BatchQueue(BatchTime(0.001, 0.0, 1), rate=1000 * load)

    assert queue.busy == pytest.approx(load, rel=1e-4)
    assert queue.mean_batch == pytest.approx(1)
    assert queue.wait.mean == pytest.approx(0.001 * load / 2 / (1 - load), rel=2e-3)
    assert queue.latency.mean == pytest.approx(queue.wait.mean + 0.001, rel=1e-3)


def test_quantiles_of_m_d_1() -> None:
    """P(no wait) is 1 - rho; P(wait <= t) within a service is (1 - rho) exp(rho t / D)."""
    wait = BatchQueue(BatchTime(0.001, 0.0, 1), rate=600).wait

    for moment in (0.25, 0.5, 0.9):
        share = 0.4 * math.exp(0.6 * moment)
        assert wait.quantile(share) == pytest.approx(moment * 1e-3, abs=1e-4)


def test_batches_of_one_of_any_time_are_m_g_1() -> None:
    """The mean wait grows with the second moment of the times: Pollaczek and Khinchine."""
    unscaled, weights = (0.5, 1.0, 4.0), (0.7, 0.2, 0.1125)
    scale = np.dot(unscaled, weights) / sum(weights)
    shares = tuple(weight / sum(weights) for weight in weights)
    factors = tuple(factor / scale for factor in unscaled)
    second = float(np.dot(np.square(factors), shares))

    wait = BatchQueue(BatchTime(0.0, 0.001, 1, factors, shares), rate=600).wait

    assert wait.mean == pytest.approx(0.001 * 0.6 * second / 2 / 0.4, rel=2e-3)


def test_a_longer_first_service_is_welchs() -> None:
    """Time in the system of M/G/1 whose first service after a rest is another (Welch, 1964)."""
    rate, usual, first = 600.0, 0.001, 0.0015
    load, first_load = rate * usual, rate * first
    wait = rate * usual**2 / (2 * (1 - load))
    # Of the arrivals that wait, and of those that come at rest.
    wait += rate * (first**2 - usual**2) / (2 * (1 - load + first_load))
    service = (first * (1 - load) + usual * first_load) / (1 - load + first_load)

    queue = BatchQueue(BatchTime(0.0, usual, 1, waking_s=first - usual), rate=rate)

    assert queue.latency.mean == pytest.approx(wait + service, rel=2e-3)
    assert queue.busy == pytest.approx(first_load / (1 - load + first_load), rel=1e-3)


def test_exponential_times_are_nearly_m_m_1() -> None:
    """With exponential times the time in the system is exponential, of mean 1 / (mu - lambda)."""
    middles = (np.arange(40) + 0.5) / 40
    times = -np.log1p(-middles)
    factors = tuple((times / times.mean()).tolist())

    latency = BatchQueue(BatchTime(0.0, 0.001, 1, factors, (1 / 40,) * 40), rate=500).latency

    # Forty values have a little less variance than the exponential distribution.
    assert latency.mean == pytest.approx(1 / 500, rel=0.05)
    assert latency.quantile(0.5) == pytest.approx(math.log(2) / 500, rel=0.05)


def test_light_traffic_meets_nobody() -> None:
    """At a load near nothing a request takes a batch of one."""
    queue = BatchQueue(BatchTime(0.002, 0.001, 32), rate=0.01)

    assert queue.latency.quantile(0.5) == pytest.approx(0.003, rel=1e-2)
    assert queue.mean_batch == pytest.approx(1, abs=1e-3)


def test_batches_carry_what_arrives() -> None:
    """Images that leave are images that came: batches a second times their mean size."""
    queue = BatchQueue(BATCHES, rate=300)

    rests = queue.waiting[0]
    seconds = BATCHES.a + BATCHES.b * queue.mean_batch + (BATCHES.waking_s + 1 / 300) * rests
    assert queue.mean_batch / seconds == pytest.approx(300, rel=1e-4)
    weights = queue.latency.weights.sum()
    assert weights == pytest.approx(queue.mean_batch, rel=1e-3)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_agrees_with_single_requests(load: float) -> None:
    """Sixty thousand simulated requests have the model's mean, p50 and p99."""
    rate = load * BATCHES.capacity

    outcome = simulate(BATCHES, Rules(), rates=[(30_000 / rate, rate)], seed=5)

    latency = BatchQueue(BATCHES, rate=rate).latency
    p50, p99 = np.quantile(outcome.latencies_s, [0.5, 0.99])
    assert np.mean(outcome.latencies_s) == pytest.approx(latency.mean, rel=0.05)
    assert p50 == pytest.approx(latency.quantile(0.5), rel=0.05)
    assert p99 == pytest.approx(latency.quantile(0.99), rel=0.1)


def test_refuses_what_has_no_balance() -> None:
    """At the capacity a queue grows without bound, and there is nothing to compute."""
    with pytest.raises(ValueError, match="the capacity is"):
        BatchQueue(BATCHES, rate=BATCHES.capacity)


def test_refuses_impossible_times() -> None:
    """Times are positive, factors have mean 1."""
    with pytest.raises(ValueError, match="no batch takes"):
        BatchTime(-0.1, 0.2, 4)
    with pytest.raises(ValueError, match="of mean 1"):
        BatchTime(0.1, 0.2, 4, factors=(1.0, 2.0), shares=(0.5, 0.5))


def test_fits_a_line() -> None:
    """Points on a line give it back; a line that would start below zero starts there."""
    assert fit_line([1, 4, 9], [3, 9, 19]) == pytest.approx((1, 2))
    assert fit_line([1, 2, 4], [0.9, 2.1, 4.4]) == pytest.approx((0, 1.02), abs=0.05)


def test_shares_count_all_weight() -> None:
    """What lies outside the edges counts in the outer bins."""
    latency = Latency(np.array([0.5, 1.5, 9.0]), np.array([1.0, 1.0, 2.0]))

    assert latency.shares(np.array([1.0, 2.0, 3.0])).tolist() == [0.5, 0.5]
