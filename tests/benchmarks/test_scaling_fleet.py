"""The simulated fleet: against the queueing model, against single requests, and conserving both."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.scaling.autoscaler import Policy
from benchmarks.scaling.batch_queue import BatchQueue, BatchTime
from benchmarks.scaling.day import BURST_AT_S, BURST_S, Case, spare, traffic
from benchmarks.scaling.events import Outcome, Rules
from benchmarks.scaling.events import simulate as simulate_requests
from benchmarks.scaling.fleet import EDGES, Curves, Day, Loss, Plan, later, simulate

TIME = BatchTime(0.001, 0.001, 8, factors=(0.8, 1.8), shares=(0.8, 0.2))
RULES = Rules(queue_size=1000, refusal_s=0.0001)
OVERLOAD = [(8.0, 0.5), (8.0, 3.0), (10.0, 0.5)]
"""Seconds, and the load in them."""


@pytest.fixture(scope="module")
def curves() -> Curves:
    """Of a small replica."""
    return Curves(TIME, forward_share=0.5)


def phases(second: float) -> float:
    """Arrivals a second of the overload."""
    for seconds, load in OVERLOAD:
        if second < seconds:
            return load * TIME.capacity
        second -= seconds
    return 0.0


def fixed(
    rate: Callable[[float], float], *, seconds: int, replicas: int = 1, seed: int = 0
) -> Plan:
    """A fleet that never changes."""
    policy = Policy(fewest=replicas, most=replicas)
    return Plan(rate, seconds, start_s=5, policy=policy, replicas=replicas, seed=seed)


def assert_conserved(day: Day) -> None:
    """Every request has come to one end, and none asked a third time."""
    ends = day.answered.sum() + day.refused.sum() + day.broken.sum()
    assert ends == day.asked.sum()
    assert day.refused.sum() + day.broken.sum() <= day.retried.sum() <= day.asked.sum()


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_constant_load_is_the_queueing_model(curves: Curves, load: float) -> None:
    """One replica under a constant load: nothing is refused, and the times are the model's."""
    rate = load * TIME.capacity

    day = simulate(fixed(lambda _: rate, seconds=600), curves, RULES)

    latency = BatchQueue(TIME, rate=rate).latency
    assert day.failed() == 0
    assert day.p_s(0.5) == pytest.approx(latency.quantile(0.5), rel=0.1)
    # The load of a second varies round its mean.
    assert day.p_s(0.99) == pytest.approx(latency.quantile(0.99), rel=0.15)
    assert_conserved(day)


def test_overload_is_that_of_single_requests(curves: Curves) -> None:
    """Three times the capacity for a while: as many answers, refusals, retries and seconds."""
    rates = [(seconds, load * TIME.capacity) for seconds, load in OVERLOAD]
    outcomes = [simulate_requests(TIME, RULES, rates=rates, seed=seed) for seed in range(2)]
    days = [simulate(fixed(phases, seconds=26, seed=seed), curves, RULES) for seed in range(2)]

    def of_requests(count: Callable[[Outcome], int]) -> float:
        return float(np.mean([count(outcome) for outcome in outcomes]))

    def of_days(count: Callable[[Day], int]) -> float:
        return float(np.mean([count(day) for day in days]))

    answered = of_requests(lambda outcome: len(outcome.latencies_s))
    assert of_days(lambda day: int(day.answered.sum())) == pytest.approx(answered, rel=0.05)
    refused = of_requests(lambda outcome: outcome.refused)
    assert of_days(lambda day: int(day.refused.sum())) == pytest.approx(refused, rel=0.1)
    retried = of_requests(lambda outcome: outcome.retried)
    assert of_days(lambda day: int(day.retried.sum())) == pytest.approx(retried, rel=0.1)
    p90 = np.mean([np.quantile(outcome.latencies_s, 0.9) for outcome in outcomes])
    assert np.mean([day.p_s(0.9) for day in days]) == pytest.approx(p90, rel=0.15)


def test_single_requests_are_conserved() -> None:
    """Answered or refused in the end, each once."""
    rates = [(4.0, 3 * TIME.capacity)]

    outcome = simulate_requests(TIME, RULES, rates=rates, seed=1)
    unretried = simulate_requests(TIME, RULES, rates=rates, seed=1, retries=0)

    assert len(outcome.latencies_s) + outcome.refused == outcome.asked
    assert 0 < outcome.refused < outcome.retried
    assert unretried.retried == 0
    assert len(unretried.latencies_s) + unretried.refused == unretried.asked


def test_waits_for_company() -> None:
    """With a longest wait a lone request waits it out, and with company only until it is full."""
    lone = simulate_requests(TIME, Rules(max_wait_s=0.5), rates=[(50.0, 0.05)], seed=2)
    full = simulate_requests(TIME, Rules(max_wait_s=5), rates=[(20.0, 60.0)], seed=2)

    assert min(lone.waits_s) == pytest.approx(0.5)
    assert np.mean(full.waits_s) < 1


def test_losses_are_conserved_and_replaced(curves: Curves) -> None:
    """A third of nine replicas is lost: some requests break, few fail, and nine are back."""
    plan = Plan(
        rate=lambda _: 5 * TIME.capacity,
        seconds=120,
        start_s=20,
        policy=Policy(fewest=9, most=9),
        replicas=9,
        losses=[Loss(at_s=30.5, share=1 / 3)],
    )

    day = simulate(plan, curves, RULES)

    assert day.ready[[29, 31, 60, 65]].tolist() == [9, 6, 6, 9]
    # Ten seconds in which a third of the requests breaks, and a third of those twice.
    assert day.broken.sum() == pytest.approx(10 * 5 * TIME.capacity / 9, rel=0.2)
    assert day.retried.sum() == pytest.approx(10 * 5 * TIME.capacity / 3, rel=0.2)
    assert_conserved(day)


def test_no_replica_answers_nothing(curves: Curves) -> None:
    """While all are gone every request breaks, and is told so twice."""
    plan = Plan(
        rate=lambda _: 10.0,
        seconds=40,
        start_s=1000,
        policy=Policy(fewest=2, most=2),
        replicas=2,
        losses=[Loss(at_s=9.5, share=1.0)],
    )

    day = simulate(plan, curves, RULES)

    assert day.answered[10:].sum() == 0
    assert day.broken.sum() > 250
    assert_conserved(day)


def test_a_burst_is_grown_into(curves: Curves) -> None:
    """Four times the load: refused at first, and no more once the replicas have come."""
    plan = Plan(
        rate=lambda second: (8.0 if second >= 300 else 2.0) * TIME.capacity,
        seconds=1200,
        start_s=20,
        policy=Policy(most=40),
        replicas=3,
    )

    day = simulate(plan, curves, RULES)

    assert day.failed(slice(0, 300)) == 0
    assert day.failed(slice(310, 360)) > 0.2
    assert day.failed(slice(900, 1200)) == 0
    assert day.ready[900] > 8
    assert_conserved(day)


def test_a_day_is_reproducible(curves: Curves) -> None:
    """The same seed, the same day; another, another."""
    days = [simulate(fixed(phases, seconds=26, seed=seed), curves, RULES) for seed in (3, 3, 4)]

    assert np.array_equal(days[0].answered, days[1].answered)
    assert np.array_equal(days[0].latencies, days[1].latencies)
    assert not np.array_equal(days[0].asked, days[2].asked)


@pytest.mark.parametrize(
    ("rules", "most"),
    [
        (Rules(queue_size=50), 50),
        # (n + 8) / capacity may be half of a second.
        (Rules(queue_size=1000, deadline_s=1.0), math.floor(0.5 * TIME.capacity - 8) + 1),
    ],
)
def test_the_door(rules: Rules, most: int) -> None:
    """So many are let in: what the queue holds, or what is in time for the deadline."""
    assert rules.most_waiting(TIME) == most
    assert rules.has_room(TIME, most - 1)
    assert not rules.has_room(TIME, most)


def test_retry_after_is_the_queue() -> None:
    """Whole seconds until the queue is worked off, at least one."""
    assert Rules().retry_after_s(TIME, 0) == 1
    assert Rules().retry_after_s(TIME, 200) == math.ceil(208 / TIME.capacity)


def test_later_moves_all_of_it() -> None:
    """Two seconds are added, and no request is lost."""
    latencies = np.zeros(len(EDGES) - 1)
    latencies[100], latencies[300] = 0.25, 0.75

    moved = later(latencies, 2)

    assert moved.sum() == pytest.approx(1)
    middles = np.sqrt(EDGES[:-1] * EDGES[1:])
    assert moved @ middles == pytest.approx(latencies @ middles + 2, rel=0.03)


def test_traffic_has_a_burst_at_its_peak() -> None:
    """Ten times the peak for ten minutes, and a quarter of it twelve hours away."""

    def rate(second: float) -> float:
        return traffic(second, peak=100, burst=10)

    assert rate(BURST_AT_S) == pytest.approx(100)
    assert rate(BURST_AT_S + BURST_S / 2) == pytest.approx(1000, rel=1e-2)
    assert rate(BURST_AT_S + BURST_S) == pytest.approx(100, rel=1e-2)
    assert rate(BURST_AT_S - 12 * 3600) == pytest.approx(25)


def test_spare_capacity_is_more_than_the_target_says(curves: Curves) -> None:
    """Small batches fill a core sooner than full ones: half in use is less than half full."""
    assert spare(curves, 1.0) == pytest.approx(1, abs=0.05)
    assert spare(curves, 2.0) > 2.2


def test_a_case_changes_the_policy_alone() -> None:
    """The target and the pace of growth are the case's, all else is shipped."""
    policy = Case(headroom=4.0, start_s=10, is_fast=True).policy()

    assert (policy.cores, policy.busy_devices) == (0.25, 0.25)
    assert (policy.up_share, policy.up_period_s) == (9.0, 15.0)
    assert (policy.fewest, policy.wait_s) == (2, 0.25)
