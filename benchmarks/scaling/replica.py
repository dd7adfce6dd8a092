"""One replica measured, and the model of it: ``python -m benchmarks.scaling.replica``.

The server has one core and the load generator another, so that neither slows the other down: a
replica of one core, on which HTTP, decoding and the network take turns. Closed loops of more and
more clients keep that core busy with larger and larger batches; the line through their mean times
is the model's ``a + b * n``, and how much a lone request's time varies its spread. Then requests
arrive as a Poisson process. At a twentieth of the capacity nearly all find the server at rest: how
much longer they take than a lone client's is the model's ``waking_s``. At the other loads the model
must tell p50 and p99, which it has not seen. Last, a server with all cores, the load generator
among them. Either is also asked for three times more than it can do; the one with a core of its own
tells what a refusal costs.

Writes ``build/bench/replica.json``.
"""

import argparse
import json
import os
import statistics
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.bench.startup import ready_s
from benchmarks.load import Answer, closed_loop, goodput, open_loop, percentile_ms, post
from benchmarks.overload import Case, bundled_case
from benchmarks.scaling.batch_queue import BatchQueue, BatchTime, fit_line
from benchmarks.server import ROOT, Server, serving
from benchmarks.server_metrics import CPU, Metrics, fetch, samples

RESULT: Final = ROOT / "build" / "bench" / "replica.json"
CLIENTS: Final = (1, 2, 4, 8, 16, 32, 64)
LOADS: Final = (0.05, 0.3, 0.5, 0.7, 0.85)
"""Of the capacity; the first tells how much slower a server at rest is, the others are foretold."""
DEADLINE_S: Final = 2.0
"""NORMGATE_DEADLINE_MS: a queue longer than half of it is refused."""
OVERLOAD: Final = 3
BATCH_LIMIT: Final = 32
"""NORMGATE_MAX_BATCH_SIZE."""
_SHARES: Final = (0.5, 0.25, 0.15, 0.05, 0.03, 0.01, 0.01)
"""Of a lone request's times from the shortest to the longest, each part by its mean."""
_MIB: Final = 2**20


@dataclass(frozen=True)
class Closed:
    """A closed loop.

    Args:
        clients: that ask again as soon as they are answered.
        rate: answers a second.
        p50_ms: of their times.
        mean_batch: images a forward pass.
        forward_s: seconds a forward pass.
        cpu_s: of the server, an image.
        times_s: of the answers of one client alone; none otherwise.
    """

    clients: int
    rate: float
    p50_ms: float
    mean_batch: float
    forward_s: float
    cpu_s: float
    times_s: tuple[float, ...] = ()

    @property
    def batch_s(self) -> float:
        """Seconds from batch to batch."""
        return self.mean_batch / self.rate


@dataclass(frozen=True)
class Open:
    """Poisson arrivals at a share of the capacity, in turns."""

    load: float
    rate: float
    p50_ms: list[float]
    p99_ms: list[float]
    failures: int


@dataclass(frozen=True)
class Overload:
    """Poisson arrivals at a multiple of the capacity."""

    offered: float
    goodput: float
    refused: float
    statuses: dict[int, int]
    p99_ms: float

    def refusal_s(self, capacity: float) -> float:
        """Seconds of the core that a refusal takes, from what the answers lost by them."""
        return max(0.0, 1 - self.goodput / capacity) / self.refused if self.refused else 0.0


@contextmanager
def generator_on(core: int | None) -> Iterator[None]:
    """This process on one core inside the context; wherever it likes for None."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if core is None else {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def closed(server: Server, requests: Sequence[bytes], *, clients: int, seconds: float) -> Closed:
    """The closed loop of so many clients."""
    metrics = Metrics(server.url, server.pid)
    answers = uvloop.run(closed_loop(server.url, requests, clients=clients, seconds=seconds))
    grown = metrics.since()
    _check(answers)
    batches = grown["normgate_batch_size_count"]
    return Closed(
        clients=clients,
        rate=goodput(answers, is_good=lambda answer: answer.status == 200, seconds=seconds),
        p50_ms=percentile_ms(answers, 50),
        mean_batch=grown["normgate_batch_size_sum"] / batches,
        forward_s=grown["normgate_stage_seconds_sumforward"] / batches,
        cpu_s=grown[CPU] / len(answers),
        times_s=tuple(answer.seconds for answer in answers) if clients == 1 else (),
    )


def _check(answers: Sequence[Answer]) -> None:
    statuses = Counter(answer.status for answer in answers)
    if set(statuses) != {200}:
        raise RuntimeError(f"answers of statuses {dict(statuses)}; all should be 200")


def opened(
    server: Server, requests: Sequence[bytes], *, load: float, rate: float, seconds: float
) -> Open:
    """Two turns of Poisson arrivals."""
    turns = [
        uvloop.run(open_loop(server.url, requests, rate=rate, seconds=seconds, seed=seed))
        for seed in range(2)
    ]
    return Open(
        load=load,
        rate=rate,
        p50_ms=[percentile_ms(turn, 50) for turn in turns],
        p99_ms=[percentile_ms(turn, 99) for turn in turns],
        failures=sum(answer.status != 200 for turn in turns for answer in turn),
    )


def overload(
    server: Server, requests: Sequence[bytes], *, capacity: float, seconds: float
) -> Overload:
    """Three times the capacity."""
    rate = OVERLOAD * capacity
    answers = uvloop.run(open_loop(server.url, requests, rate=rate, seconds=seconds))
    good = [answer for answer in answers if answer.status == 200]
    refused = goodput(answers, is_good=lambda answer: answer.status == 429, seconds=seconds)
    return Overload(
        offered=len(answers) / seconds,
        goodput=goodput(answers, is_good=lambda answer: answer.status == 200, seconds=seconds),
        refused=refused,
        statuses=dict(Counter(answer.status for answer in answers)),
        p99_ms=percentile_ms(good, 99),
    )


def fit(loops: Sequence[Closed], at_rest: Open) -> BatchTime:
    """The model's batch time, from closed loops and from requests that find nobody."""
    sizes = [loop.mean_batch for loop in loops]
    a, b = fit_line(sizes, [loop.batch_s for loop in loops])
    times = np.concatenate([loop.times_s for loop in loops])
    waking_s = statistics.mean(at_rest.p50_ms) / 1000 - float(np.median(times))
    return BatchTime(
        a,
        b,
        BATCH_LIMIT,
        factors=spread(times.tolist()),
        shares=_SHARES,
        waking_s=max(0.0, waking_s),
    )


def spread(seconds: Sequence[float]) -> tuple[float, ...]:
    """The shape of these times: the mean of each part over that of all."""
    ends = np.round(np.cumsum(_SHARES) * len(seconds)).astype(int)[:-1]
    means = np.array([part.mean() for part in np.split(np.sort(np.asarray(seconds)), ends)])
    return tuple((means / np.dot(means, _SHARES)).tolist())


def measure(case: Case, *, seconds: float) -> dict[str, Any]:
    """All figures of a replica."""
    # The first one warms the disk.
    ready = [ready_s() for _ in range(3)]
    cores = sorted(os.sched_getaffinity(0))
    flags = ["--model-store", str(case.store), "--shutdown-grace-s", "0"]
    flags += ["--access-log-sample", "0", "--max-batch-size", str(BATCH_LIMIT)]
    flags += ["--deadline-ms", str(1000 * DEADLINE_S)]
    with serving(flags, cores=cores[:1]) as server, generator_on(cores[-1]):
        found = _on_one_core(server, case, seconds=seconds)
    with serving(flags) as server:
        requests = [post(f"{server.url}/v1/score", image) for image in case.images]
        closed(server, requests, clients=CLIENTS[-1], seconds=2)
        all_cores = closed(server, requests, clients=CLIENTS[-1], seconds=seconds / 2)
        flood = overload(server, requests, capacity=all_cores.rate, seconds=seconds)
    return found | {
        "cores": len(cores),
        "ready_s": ready[1:],
        "all_cores": asdict(all_cores),
        "all_cores_overload": asdict(flood),
        "image_bytes": statistics.mean(map(len, case.images)),
        "bundle_bytes": _bytes_below(case.store),
    }


def _on_one_core(server: Server, case: Case, *, seconds: float) -> dict[str, Any]:
    requests = [post(f"{server.url}/v1/score", image) for image in case.images]
    closed(server, requests, clients=CLIENTS[-1], seconds=2)
    loops = [closed(server, requests, clients=clients, seconds=seconds / 3) for clients in CLIENTS]
    capacity = loops[-1].rate
    opens = [
        opened(server, requests, load=load, rate=load * capacity, seconds=seconds) for load in LOADS
    ]
    metrics = fetch(server.url)
    memory = psutil.Process(server.pid).memory_info().rss / _MIB
    # Asked again: a machine that others use is not the same all the time.
    after = closed(server, requests, clients=CLIENTS[-1], seconds=seconds / 2)
    return {
        "closed": [asdict(loop) for loop in loops],
        "open": [asdict(each) for each in opens],
        "capacity_after": after.rate,
        "overload": asdict(overload(server, requests, capacity=after.rate, seconds=seconds)),
        "request_bytes": statistics.mean(map(len, requests)),
        "answer_bytes": _answer_bytes(server, case.images[0]),
        "series": sum(1 for _ in samples(metrics)),
        "metrics_bytes": len(metrics),
        "resident_mib": memory,
    }


def _answer_bytes(server: Server, image: bytes) -> int:
    request = urllib.request.Request(
        f"{server.url}/v1/score", data=image, headers={"Content-Type": "image/jpeg"}
    )
    with urllib.request.urlopen(request) as answer:
        head = sum(len(name) + len(value) + 4 for name, value in answer.headers.items())
        return head + len(answer.read())


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def read(file: Path = RESULT) -> dict[str, Any]:
    """What was measured.

    Raises:
        SystemExit: nothing was.
    """
    if not file.exists():
        raise SystemExit(f"{file} is not there: run python -m benchmarks.scaling.replica first")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def batch_time(result: dict[str, Any]) -> BatchTime:
    """The model fitted to a result."""
    return fit([Closed(**loop) for loop in result["closed"]], Open(**result["open"][0]))


def refusal_s(result: dict[str, Any]) -> float:
    """Seconds of the core that a refusal takes.

    Of the replica on one core: where the load generator shares the cores, it takes more of them the
    more it offers.
    """
    return Overload(**result["overload"]).refusal_s(result["capacity_after"])


def print_closed(result: dict[str, Any], time: BatchTime, console: Console) -> None:
    """What the model was fitted to."""
    table = Table(title="closed loops, one core")
    for heading in ("clients", "answers/s", "p50 ms", "images a batch", "ms a batch", "model"):
        table.add_column(heading, justify="right")
    for loop in (Closed(**loop) for loop in result["closed"]):
        table.add_row(
            str(loop.clients),
            f"{loop.rate:.0f}",
            f"{loop.p50_ms:.2f}",
            f"{loop.mean_batch:.2f}",
            f"{1000 * loop.batch_s:.2f}",
            f"{1000 * (time.a + time.b * loop.mean_batch):.2f}",
        )
    console.print(table)


def print_open(result: dict[str, Any], time: BatchTime, console: Console) -> None:
    """The model against what it was not fitted to."""
    table = Table(title="Poisson arrivals, one core: two turns measured, and the model")
    headings = ("load", "requests/s", "p50 ms", "model", "error", "p99 ms", "model", "error")
    for heading in headings:
        table.add_column(heading, justify="right")
    for each in (Open(**each) for each in result["open"][1:]):
        queue = BatchQueue(time, rate=each.rate)
        row = [f"{each.load:.0%}", f"{each.rate:.0f}"]
        for measured, share in ((each.p50_ms, 0.5), (each.p99_ms, 0.99)):
            model = 1000 * queue.latency.quantile(share)
            error = model / statistics.mean(measured) - 1
            row += [" ".join(f"{ms:.2f}" for ms in measured), f"{model:.2f}", f"{error:+.0%}"]
        table.add_row(*row)
    console.print(table)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12, help="of each open loop")
    parser.add_argument("--again", action="store_true", help="the model of what is measured")
    arguments = parser.parse_args()
    if not arguments.again:
        result = measure(bundled_case(), seconds=arguments.seconds)
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result) + "\n", encoding="utf-8")
    result, console = read(), Console(width=120)
    time = batch_time(result)
    print_closed(result, time, console)
    print_open(result, time, console)
    print_rest(result, time, console)


def print_rest(result: dict[str, Any], time: BatchTime, console: Console) -> None:
    """The fitted times, capacities, overload and size."""
    console.print(
        f"a batch of n: {1000 * time.a:.2f} + {1000 * time.b:.2f} n ms, at rest "
        f"{1000 * time.waking_s:.2f} ms more; full batches {time.capacity:.0f}/s\n"
        f"measured {result['closed'][-1]['rate']:.0f}/s, later {result['capacity_after']:.0f}/s; "
        f"with all {result['cores']} cores, the load generator among them, "
        f"{result['all_cores']['rate']:.0f}/s"
    )
    for name in ("overload", "all_cores_overload"):
        full = Overload(**result[name])
        console.print(
            f"{name}: {full.offered:.0f}/s offered, {full.goodput:.0f}/s answered, p99 "
            f"{full.p99_ms:.0f} ms, {full.refused:.0f}/s refused; {full.statuses}"
        )
    console.print(
        f"a refusal takes {1e6 * refusal_s(result):.0f} us; start to ready "
        f"{statistics.median(result['ready_s']):.1f} s; resident {result['resident_mib']:.0f} MiB; "
        f"{result['series']} series"
    )


if __name__ == "__main__":
    main()
