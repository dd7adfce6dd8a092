"""Cost, bottlenecks and fit of the replica, on figures made up."""

from typing import Any

import pytest

from benchmarks.scaling.bottlenecks import (
    Resource,
    core_seconds_per_million,
    price_per_million,
    resources,
    scaled_object,
)
from benchmarks.scaling.replica import Overload, batch_time, spread


@pytest.fixture
def result() -> dict[str, Any]:
    """A replica with batches of 2 + 2 n milliseconds; a lone request's times hardly vary."""
    loops = [
        {
            "clients": clients,
            "rate": clients / (0.002 + 0.002 * clients),
            "p50_ms": 1.0,
            "mean_batch": float(clients),
            "forward_s": 0.001,
            "cpu_s": 0.002,
            "times_s": [0.004] * 100 if clients == 1 else [],
        }
        for clients in (1, 4, 32)
    ]
    return {
        "closed": loops,
        "open": [{"load": 0.05, "rate": 20, "p50_ms": [5.0], "p99_ms": [9.0], "failures": 0}],
        "all_cores": loops[-1] | {"cpu_s": 0.003},
        "cores": 2,
        "ready_s": [7.0, 8.0],
        "request_bytes": 1000,
        "answer_bytes": 1000,
        "bundle_bytes": 3_000_000,
        "series": 200,
    }


def test_fit_is_the_line(result: dict[str, Any]) -> None:
    """The model's batch time is the line that the loops lie on."""
    time = batch_time(result)

    assert (time.a, time.b) == pytest.approx((0.002, 0.002))
    assert time.factors == pytest.approx([1] * 7)
    assert time.waking_s == pytest.approx(0.001)


def test_spread_keeps_the_tail() -> None:
    """The slowest hundredth has a part of its own; the mean is 1."""
    factors = spread([1.0] * 990 + [11.0] * 10)

    assert factors[-1] == pytest.approx(10)
    assert factors[0] == pytest.approx(1 / 1.1)


def test_cost_is_time_over_answers(result: dict[str, Any]) -> None:
    """A million images in full batches of 32 take a core 1e6 * 66 ms / 32."""
    found = core_seconds_per_million(result)

    assert list(found.values()) == pytest.approx([1e6 * 0.066 / 32, 2000, 3000])
    assert price_per_million(3600, load=0.5, price=0.04) == pytest.approx(0.08)


def test_a_refusal_costs_what_answers_lost() -> None:
    """A tenth of the answers lost to 1,000 refusals a second: 0.1 ms each."""
    full = Overload(offered=1500, goodput=450, refused=1000, statuses={}, p99_ms=0)

    assert full.refusal_s(500) == pytest.approx(1e-4)


def test_resources_give_way_in_proportion(result: dict[str, Any]) -> None:
    """What the manifests and the measured replica say, times the replicas."""
    found = {each.name: each for each in resources(result, scaled_object())}

    assert found["series of one Prometheus"].of(1000) == 200_000
    assert found["series of one Prometheus"].breaks_at == 10_001
    assert found["replicas allowed by the ScaledObject"].breaks_at == 11
    # Ready at the second probe, 10 s, and 5 s of minReadySeconds.
    assert found["rollout with maxSurge 1, s"].of(100) == 1500
    rate = 0.7 * 32 / 0.066  # a second
    assert found["bytes a second through one balancer"].of(10) == pytest.approx(rate * 20_000)


def test_a_resource_breaks_beyond_its_limit() -> None:
    """The last that fits is at the limit."""
    resource = Resource("cups", of=lambda replicas: 2.0 * replicas, limit=100, remedy="wash up")

    assert resource.use(50) == 1
    assert resource.breaks_at == 51
