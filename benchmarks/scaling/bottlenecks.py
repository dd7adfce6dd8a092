"""What gives way first in a fleet of 10 to 10,000: ``python -m benchmarks.scaling.bottlenecks``.

Arithmetic on what ``python -m benchmarks.scaling.replica`` measured and on what the shipped
manifests say. Limits of other software are assumptions of the kind that its makers publish; each is
named where it stands. Also prints what a million images cost.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.scaling.batch_queue import BatchQueue
from benchmarks.scaling.replica import RESULT, batch_time, read
from benchmarks.server import ROOT

FLEETS: Final = (10, 100, 1_000, 10_000)
LOAD: Final = 0.7
"""Share of its capacity that a replica is given."""
WATCH_S: Final = 30.0
"""NORMGATE_WATCH_S of a fleet that follows a pointer; an assumption, it is off by default."""
PRICE: Final = 0.04
"""Of a core-hour, in dollars; an assumption, to be replaced by yours."""
LINK_BYTES: Final = 10e9 / 8
"""A second of a link of 10 Gbit/s, of one balancer or one store."""
SERIES: Final = 2_000_000
"""That one Prometheus holds with some 8 GiB; an assumption."""
STORE_REQUESTS: Final = 5_500
"""Reads a second that S3 publishes for one prefix."""
NGINX_CONNECTIONS: Final = 4_096
"""worker_connections of deploy/nginx/replicas.conf; a request in flight takes two."""
FALSE_ALARMS: Final = 1.0
"""Of drift, that a fleet without drift may be expected to raise in all."""
ROLLOUT_S: Final = 3_600.0
"""In which a release should be out."""
_MIN_READY_S: Final = 5.0
_PROBE_S: Final = 5.0
_DRIFT_BOUND: Final = 0.01
"""NORMGATE_DRIFT_FALSE_ALARM_BOUND, of each replica."""
_SCALED_OBJECT: Final = ROOT / "deploy/kubernetes/components/autoscaling/scaledobject.yaml"


@dataclass(frozen=True)
class Resource:
    """Something a fleet uses up.

    Args:
        name: with its unit.
        of: how much a fleet of so many takes.
        limit: beyond which it gives way.
        remedy: what to change then.
    """

    name: str
    of: Callable[[int], float]
    limit: float
    remedy: str

    def use(self, replicas: int) -> float:
        """Share of the limit."""
        return self.of(replicas) / self.limit

    @property
    def breaks_at(self) -> int:
        """The smallest fleet that exceeds the limit, of those up to ten million."""
        low, high = 1, 10_000_000
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.use(middle) > 1 else (middle + 1, high)
        return low


def resources(result: dict[str, Any], scaled: dict[str, Any]) -> list[Resource]:
    """What a fleet of the measured replica uses.

    Args:
        result: of the measurement.
        scaled: the spec of the shipped ScaledObject.
    """
    time = batch_time(result)
    rate = LOAD * time.capacity
    in_flight = rate * BatchQueue(time, rate=rate).latency.mean
    moved = result["request_bytes"] + result["answer_bytes"]
    start_s = statistics.median(result["ready_s"])
    one_pod_s = math.ceil(start_s / _PROBE_S) * _PROBE_S + _MIN_READY_S
    return [
        Resource(
            "replicas allowed by the ScaledObject",
            lambda replicas: replicas,
            scaled["maxReplicaCount"],
            "maxReplicaCount",
        ),
        Resource(
            "drift alarms to expect without drift",
            lambda replicas: _DRIFT_BOUND * replicas,
            FALSE_ALARMS,
            "the bound of a replica: 0.01 over the replicas",
        ),
        Resource(
            "rollout with maxSurge 1, s",
            lambda replicas: one_pod_s * replicas,
            ROLLOUT_S,
            "maxSurge in percent",
        ),
        Resource(
            "scale-down by half at a pod a minute, s",
            lambda replicas: 60.0 * replicas / 2,
            ROLLOUT_S,
            "a Percent policy beside the Pods one",
        ),
        Resource(
            "connections of one nginx in balance",
            lambda replicas: 2 * in_flight * replicas,
            NGINX_CONNECTIONS,
            "worker_connections; several balancers; Envoy beside each client",
        ),
        Resource(
            "connections of one nginx, all queues full",
            lambda replicas: 2 * 1024 * replicas,
            NGINX_CONNECTIONS,
            "NORMGATE_QUEUE_SIZE to the wait you accept; worker_connections",
        ),
        Resource(
            "bytes a second through one balancer",
            lambda replicas: rate * moved * replicas,
            LINK_BYTES,
            "several balancers, clients on the pods' addresses",
        ),
        Resource(
            "series of one Prometheus",
            lambda replicas: result["series"] * replicas,
            SERIES,
            "drop buckets by metricRelabelings, shard by hashmod, sums by recording rules",
        ),
        Resource(
            "store requests a second, pointer watched",
            lambda replicas: 2 * replicas / WATCH_S,
            STORE_REQUESTS,
            "a longer NORMGATE_WATCH_S; a cache in front",
        ),
        Resource(
            "bytes a second when all fetch a new bundle",
            lambda replicas: result["bundle_bytes"] * replicas / WATCH_S,
            LINK_BYTES,
            "a longer NORMGATE_WATCH_S, a cache a node, or the bundle in the image",
        ),
    ]


def core_seconds_per_million(result: dict[str, Any]) -> dict[str, float]:
    """Core-seconds a million images, by how they were measured."""
    cores = result["cores"]
    full, everywhere = result["closed"][-1], result["all_cores"]
    return {
        "one core, all of its time": 1e6 / full["rate"],
        "one core, the server's processor time": 1e6 * full["cpu_s"],
        f"{cores} cores shared with the load generator, processor time": 1e6 * everywhere["cpu_s"],
    }


def price_per_million(core_s: float, *, load: float, price: float = PRICE) -> float:
    """Dollars a million images, where replicas are given this share of their capacity."""
    return core_s / 3600 * price / load


def scaled_object(file: Path = _SCALED_OBJECT) -> dict[str, Any]:
    """The spec of the shipped ScaledObject."""
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))["spec"]
    return found


def print_resources(found: Sequence[Resource], console: Console) -> None:
    """A row a resource, in the order in which they give way; a star where the limit is passed."""
    table = Table(title=f"at {LOAD:.0%} of the capacity; * beyond the limit")
    for heading in ("", *(f"{fleet:,}" for fleet in FLEETS), "limit", "passed at", "then"):
        table.add_column(heading, justify="left" if heading in ("", "then") else "right")
    for resource in sorted(found, key=lambda resource: resource.breaks_at):
        cells = [
            f"{resource.of(fleet):,.4g}{'*' if resource.use(fleet) > 1 else ''}" for fleet in FLEETS
        ]
        table.add_row(
            resource.name,
            *cells,
            f"{resource.limit:,.4g}",
            f"{resource.breaks_at:,}",
            resource.remedy,
        )
    console.print(table)


def print_cost(result: dict[str, Any], console: Console) -> None:
    """A row a measurement."""
    table = Table(title=f"a million images; example price {PRICE} dollars a core-hour, assumed")
    for heading in ("measured on", "core-seconds", "dollars, always busy", f"at {LOAD:.0%} load"):
        table.add_column(heading, justify="right")
    for name, core_s in core_seconds_per_million(result).items():
        prices = [price_per_million(core_s, load=load) for load in (1.0, LOAD)]
        table.add_row(name, f"{core_s:,.0f}", *(f"{price:.4f}" for price in prices))
    console.print(table)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replica", type=Path, default=RESULT, metavar="FILE")
    result, console = read(parser.parse_args().replica), Console(width=160)
    print_cost(result, console)
    print_resources(resources(result, scaled_object()), console)


if __name__ == "__main__":
    main()
