"""The autoscaler's rules, and that they are those of the shipped manifest."""

import math

import pytest

from benchmarks.scaling.autoscaler import Autoscaler, Load, Policy
from benchmarks.scaling.bottlenecks import scaled_object

POLICY = Policy(most=100)


def load(cores: float = 0.0, *, wait_s: float = 0.0, ready: int = 4) -> Load:
    """What the triggers see; nothing by default."""
    return Load(wait_s=wait_s, busy_devices=0.0, cores=cores, ready=ready)


def test_policy_is_the_manifests() -> None:
    """The defaults are what deploy/kubernetes ships."""
    spec, policy = scaled_object(), Policy()
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    up, down = behavior["scaleUp"], behavior["scaleDown"]
    targets = {
        trigger.get("name", trigger["type"]): float(
            trigger["metadata"].get("threshold") or trigger["metadata"]["value"]
        )
        for trigger in spec["triggers"]
    }

    assert spec["pollingInterval"] == policy.every_s
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (policy.fewest, policy.most)
    assert up["stabilizationWindowSeconds"] == 0
    assert up["policies"] == [
        {
            "type": "Percent",
            "value": 100 * policy.up_share,
            "periodSeconds": policy.up_period_s,
        }
    ]
    assert down["stabilizationWindowSeconds"] == policy.down_window_s
    assert down["policies"] == [
        {"type": "Pods", "value": policy.down_pods, "periodSeconds": policy.down_period_s}
    ]
    assert targets["queue-wait"] == policy.wait_s
    assert targets["busy-devices"] == policy.busy_devices
    assert targets["cpu"] == 100 * policy.cores


@pytest.mark.parametrize(("cores", "wanted"), [(2.8, 4), (3.0, 4), (3.5, 5), (4.0, 6)])
def test_asks_for_what_the_cores_need(cores: float, wanted: int) -> None:
    """Cores in use over 0.7, rounded up; nothing within a tenth of it."""
    assert Autoscaler(POLICY).look(0, load(cores), replicas=4) == wanted


def test_waiting_multiplies_the_ready() -> None:
    """A wait of 0.375 s asks for one and a half times the replicas that are ready."""
    assert Autoscaler(POLICY).look(0, load(wait_s=0.375, ready=4), replicas=4) == 6
    assert Autoscaler(POLICY).look(0, load(wait_s=0.75, ready=2), replicas=4) == 6


def test_at_most_twice_as_many_in_a_minute() -> None:
    """Whatever the wait: doubled at once, and again when a minute has gone."""
    autoscaler, replicas = Autoscaler(POLICY), 4
    seen = []
    for now_s in range(0, 121, 15):
        replicas = autoscaler.look(now_s, load(wait_s=9, ready=replicas), replicas=replicas)
        seen.append(replicas)

    assert seen == [8, 8, 8, 8, 16, 16, 16, 16, 32]


def test_falls_by_one_a_minute_after_five() -> None:
    """Five minutes of less load come first, then a replica a minute leaves."""
    autoscaler, replicas, left_at = Autoscaler(POLICY), 6, []
    autoscaler.look(0, load(cores=4.2), replicas=6)
    for now_s in range(15, 700, 15):
        wanted = autoscaler.look(now_s, load(cores=1.4), replicas=replicas)
        if wanted != replicas:
            left_at.append((now_s, wanted))
        replicas = wanted

    assert left_at == [(315, 5), (375, 4), (435, 3), (495, 2)]


def test_keeps_within_its_bounds() -> None:
    """Never fewer than the least nor more than the most."""
    policy = Policy(fewest=3, most=5)

    assert Autoscaler(policy).look(0, load(cores=math.pi * 9, wait_s=9), replicas=4) == 5
    assert Autoscaler(policy).look(0, load(), replicas=3) == 3
