"""A fleet's day with a tenfold burst and losses: ``python -m benchmarks.scaling.day``.

The replica is the one that ``python -m benchmarks.scaling.replica`` measured, and the autoscaler
the one of ``deploy/kubernetes`` but for what the tables vary. Traffic rises and falls once a day,
four to one. At its peak comes the burst; one replica is lost in the morning and a third of them in
the evening. Prints which headroom keeps the goal at which delay, and writes
``build/bench/day.json`` and, with the report extra, ``build/bench/day.svg``.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.scaling.autoscaler import Policy
from benchmarks.scaling.events import Rules
from benchmarks.scaling.fleet import Curves, Day, Loss, Plan, simulate
from benchmarks.scaling.replica import DEADLINE_S, Closed, batch_time, read, refusal_s
from benchmarks.server import ROOT

RESULT: Final = ROOT / "build" / "bench" / "day.json"
FIGURE: Final = RESULT.with_suffix(".svg")
DAY_S: Final = 86_400
PEAK: Final = 6.0
"""The day's peak without the burst, in what replicas can carry at most."""
TROUGH: Final = 0.25
BURST: Final = 10.0
BURST_AT_S: Final = 15 * 3600
BURST_S: Final = 600
RAMP_S: Final = 30
LOSSES: Final = (Loss(at_s=10 * 3600, share=0.0), Loss(at_s=18 * 3600, share=1 / 3))
LOSS_WINDOW_S: Final = 300
MOST: Final = 200
P99_S: Final = 0.25
FAILED: Final = 0.001
SHIPPED: Final = 1 / 0.7
STARTS_S: Final = (10.0, 60.0, 180.0)
HEADROOMS: Final = (SHIPPED, 2.0, 3.0, 5.0, 8.0, 12.0)
FAST_SHARE: Final = 9.0
FAST_PERIOD_S: Final = 15.0


@dataclass(frozen=True)
class Case:
    """A day to simulate.

    Args:
        headroom: cores over cores in use that the autoscaler keeps, one over its target.
        start_s: from the wish for a replica to its first answer.
        is_fast: tenfold at once, where the manifest allows twofold a minute.
        burst: times the traffic, for ten minutes.
        seed: of everything drawn.
    """

    headroom: float
    start_s: float
    is_fast: bool = False
    burst: float = BURST
    seed: int = 0

    def policy(self) -> Policy:
        """The shipped one, with this headroom and more replicas."""
        share, usual = 1 / self.headroom, Policy()
        return dataclasses.replace(
            usual,
            most=MOST,
            cores=share,
            busy_devices=min(usual.busy_devices, share),
            up_share=FAST_SHARE if self.is_fast else usual.up_share,
            up_period_s=FAST_PERIOD_S if self.is_fast else usual.up_period_s,
        )


@dataclass(frozen=True)
class Found:
    """What a day came to.

    Args:
        asked: requests.
        failed: share of them without an answer, a retry included.
        failed_in_burst: the same of the burst and the five minutes after it.
        failed_in_losses: the same of the five minutes after each loss.
        p99_s: of all answers.
        calm_p99_s: of those outside the burst and the five minutes after it.
        replica_hours: ready or starting.
        most: ready at once.
    """

    asked: int
    failed: float
    failed_in_burst: float
    failed_in_losses: float
    p99_s: float
    calm_p99_s: float
    replica_hours: float
    most: int

    @property
    def is_good(self) -> bool:
        """Whether the day kept the goal."""
        return self.p99_s <= P99_S and self.failed <= FAILED


def traffic(second: float, *, peak: float, burst: float) -> float:
    """Arrivals a second at a time since midnight."""
    middle, swing = (1 + TROUGH) / 2, (1 - TROUGH) / 2
    phase = 2 * math.pi * (second - BURST_AT_S) / DAY_S
    usual = peak * (middle + swing * math.cos(phase))
    into, left = second - BURST_AT_S, BURST_AT_S + BURST_S - second
    share = max(0.0, min(1.0, into / RAMP_S, left / RAMP_S))
    return usual * (1 + share * (burst - 1))


@cache
def replica(file: Path) -> tuple[Curves, Rules]:
    """The measured one, as the fleet needs it."""
    result = read(file)
    full = Closed(**result["closed"][-1])
    curves = Curves(batch_time(result), forward_share=min(1.0, full.forward_s / full.batch_s))
    return curves, Rules(deadline_s=DEADLINE_S, refusal_s=refusal_s(result))


def plan(case: Case, capacity: float) -> Plan:
    """The day of a case."""
    peak = PEAK * capacity
    start = traffic(0, peak=peak, burst=1) / capacity
    return Plan(
        rate=lambda second: traffic(second, peak=peak, burst=case.burst),
        seconds=DAY_S,
        start_s=case.start_s,
        policy=case.policy(),
        replicas=max(2, math.ceil(start * case.headroom)),
        losses=LOSSES,
        seed=case.seed,
    )


def run(case: Case, file: Path) -> tuple[Found, Day]:
    """One day."""
    curves, rules = replica(file)
    day = simulate(plan(case, curves.time.capacity), curves, rules)
    end_s = BURST_AT_S + BURST_S + LOSS_WINDOW_S
    after_losses = [slice(int(loss.at_s), int(loss.at_s) + LOSS_WINDOW_S) for loss in LOSSES]
    calm = day.without_minutes(slice(BURST_AT_S // 60, end_s // 60))
    found = Found(
        asked=int(day.asked.sum()),
        failed=day.failed(),
        failed_in_burst=day.failed(slice(BURST_AT_S, end_s)),
        failed_in_losses=max(day.failed(seconds) for seconds in after_losses),
        p99_s=day.p_s(0.99),
        calm_p99_s=calm.p_s(0.99),
        replica_hours=day.replica_hours,
        most=int(day.ready.max()),
    )
    return found, day


def found(case: Case, file: Path) -> Found:
    """The same without the seconds; for another process to do."""
    return run(case, file)[0]


def cases() -> dict[str, list[Case]]:
    """The tables."""
    return {
        "no burst": [
            Case(headroom, start_s, burst=1.0)
            for headroom in (1.1, SHIPPED, 2.0)
            for start_s in (STARTS_S[0], STARTS_S[-1])
        ],
        "tenfold burst, at most twofold in a minute, as shipped": [
            Case(headroom, start_s) for headroom in HEADROOMS for start_s in STARTS_S
        ],
        "tenfold burst, tenfold at once": [
            Case(headroom, start_s, is_fast=True)
            for headroom in (SHIPPED, 3.0)
            for start_s in STARTS_S
        ],
    }


def spare(curves: Curves, headroom: float) -> float:
    """Capacity over load where so large a part of the cores is in use.

    More than the headroom: small batches use more of a core an image than full ones.
    """
    loads = np.arange(101) / 100
    busy = [curves.at(load).busy for load in loads]
    return float(1 / np.interp(1 / headroom, busy, loads))


def print_table(
    title: str, rows: Sequence[tuple[Case, Found]], curves: Curves, console: Console
) -> None:
    """A row a day."""
    table = Table(title=title)
    for heading in (
        *(
            "cores' target",
            "capacity / load",
            "start s",
            "failed",
            "in burst",
            "after losses",
            "p99 ms",
            "calm p99 ms",
        ),
        *("replica-hours", "most", "goal"),
    ):
        table.add_column(heading, justify="right")
    for case, day in rows:
        table.add_row(
            f"{1 / case.headroom:.0%}",
            f"{spare(curves, case.headroom):.1f}",
            f"{case.start_s:.0f}",
            *(f"{x:.3%}" for x in (day.failed, day.failed_in_burst, day.failed_in_losses)),
            *(f"{1000 * seconds:.0f}" for seconds in (day.p99_s, day.calm_p99_s)),
            f"{day.replica_hours:.0f}",
            str(day.most),
            "kept" if day.is_good else "-",
        )
    console.print(table)


def draw(day: Day, file: Path) -> None:
    """Requests, answers and replicas around the burst; nothing without the report extra."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    seconds = slice(BURST_AT_S - 300, BURST_AT_S + 1800)
    minutes = [(second - BURST_AT_S) / 60 for second in range(seconds.start, seconds.stop)]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 4.5))
    above.plot(minutes, day.asked[seconds], label="asked", linewidth=0.8)
    above.plot(minutes, day.answered[seconds], label="answered", linewidth=0.8)
    above.set_ylabel("requests/s")
    above.legend()
    below.plot(minutes, day.ready[seconds], label="ready", linewidth=0.8)
    below.plot(minutes, day.replicas[seconds], label="wanted", linewidth=0.8)
    below.set_ylabel("replicas")
    below.set_xlabel("minutes since the burst began")
    below.legend()
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    """Print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replica", type=Path, default=ROOT / "build" / "bench" / "replica.json")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    curves, rules = replica(arguments.replica)
    console, results = Console(width=120), dict[str, list[dict[str, Any]]]()
    console.print(
        f"a replica carries {curves.time.capacity:.0f} requests/s; a refusal costs "
        f"{1e6 * rules.refusal_s:.0f} us; goal: p99 <= {1000 * P99_S:.0f} ms and at most "
        f"{FAILED:.1%} without an answer"
    )
    with ProcessPoolExecutor(arguments.processes) as pool:
        for title, wanted in cases().items():
            days = list(pool.map(found, wanted, [arguments.replica] * len(wanted)))
            print_table(title, list(zip(wanted, days, strict=True)), curves, console)
            results[title] = [
                asdict(case) | asdict(day) for case, day in zip(wanted, days, strict=True)
            ]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(run(Case(SHIPPED, STARTS_S[1]), arguments.replica)[1], FIGURE)


if __name__ == "__main__":
    main()
