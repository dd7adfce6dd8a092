"""Three times more load than the server can carry: ``python -m benchmarks.overload``.

The clients run on one core and the server on the others, so that neither slows the other down. Its
capacity is what a closed loop of 64 clients gets out of it; then requests arrive as a Poisson
process at three times that rate. Goodput counts answers of status 200 within the deadline. Both
are measured in turns, and the ratio of the two is taken turn by turn.
"""

import argparse
import json
import os
import statistics
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.bench.cases import photographs_store
from benchmarks.datasets import unpack
from benchmarks.load import Answer, closed_loop, goodput, open_loop, percentile_ms, post
from benchmarks.server import ROOT, Server, serving

OVERLOAD: Final = 3
CLIENTS: Final = 64
GOAL: Final = 0.95
_SAMPLE_S: Final = 0.2
_MIB: Final = 2**20
_GRACE_S: Final = 0.05
"""Beyond the deadline, for the answer to be written and read."""


@dataclass(frozen=True)
class Case:
    """A model, the images it is sent, and how long each may take."""

    name: str
    store: Path
    images: Sequence[bytes]
    deadline_ms: int


@dataclass(frozen=True)
class Turn:
    """One measurement of the capacity, and of overload right after it."""

    capacity: float
    offered: float
    goodput: float
    statuses: dict[int, int]
    refusals_without_retry_after: int
    refusals_after_deadline: int
    answer_p50_ms: float
    answer_p99_ms: float
    refusal_p99_ms: float
    peak_mib: float

    @property
    def ratio(self) -> float:
        """Goodput under overload over capacity."""
        return self.goodput / self.capacity


def bundled_case() -> Case:
    """The bundled model and 32 px JPEGs of CIFAR-10."""
    files = sorted((unpack("cifar10") / "test").rglob("*.jpg"))[::20]
    images = [file.read_bytes() for file in files]
    return Case("cifar10-resnet18, 32 px JPEG", ROOT / "model_store", images, deadline_ms=2000)


def photographs_case() -> Case:
    """MobileNetV3-large with random weights and photographs of about 500 x 375 pixels."""
    images = [photo.read_bytes() for photo in sorted(unpack("photos").rglob("*.JPEG"))]
    store = photographs_store("mobilenet_v3_large")
    return Case("mobilenet_v3_large, photographs", store, images, deadline_ms=4000)


def measure(server: Server, case: Case, *, seconds: float, seed: int) -> Turn:
    """Capacity, then overload."""
    url, limit_s = f"{server.url}/v1/score", case.deadline_ms / 1000 + _GRACE_S
    requests = [post(url, image) for image in case.images]

    def is_good(answer: Answer) -> bool:
        return answer.status == 200 and answer.seconds <= limit_s

    # With all the time in the world none of these is refused, whatever they wait for each other.
    patient = [post(url, image, {"X-Request-Deadline-Ms": "60000"}) for image in case.images]
    calm = uvloop.run(closed_loop(url, patient, clients=CLIENTS, seconds=seconds))
    capacity = goodput(calm, is_good=lambda answer: answer.status == 200, seconds=seconds)
    with peak_memory(server.pid) as peak:
        answers = uvloop.run(
            open_loop(url, requests, rate=OVERLOAD * capacity, seconds=seconds, seed=seed)
        )
    refusals = [answer for answer in answers if answer.status in (429, 504)]
    answered = [answer for answer in answers if answer.status == 200]
    return Turn(
        capacity=capacity,
        offered=len(answers) / seconds,
        goodput=goodput(answers, is_good=is_good, seconds=seconds),
        statuses=dict(Counter(answer.status for answer in answers)),
        refusals_without_retry_after=sum(not answer.has_retry_after for answer in refusals),
        refusals_after_deadline=sum(answer.seconds > limit_s for answer in refusals),
        answer_p50_ms=percentile_ms(answered, 50),
        answer_p99_ms=percentile_ms(answered, 99),
        refusal_p99_ms=percentile_ms(refusals, 99),
        peak_mib=max(peak) / _MIB,
    )


@contextmanager
def peak_memory(pid: int) -> Iterator[list[int]]:
    """Resident bytes of a process, sampled inside the context."""
    process, is_over = psutil.Process(pid), threading.Event()
    samples = [process.memory_info().rss]

    def sample() -> None:
        while not is_over.wait(_SAMPLE_S):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


def run(case: Case, *, cores: set[int], seconds: float, turns: int) -> list[Turn]:
    """All turns against one server."""
    flags = ["--model-store", str(case.store), "--shutdown-grace-s", "0"]
    flags += ["--deadline-ms", str(case.deadline_ms), "--access-log-sample", "0"]
    with serving(flags, cores=cores) as server:
        measure(server, case, seconds=2, seed=0)  # warms both up
        return [measure(server, case, seconds=seconds, seed=turn) for turn in range(turns)]


def _apart() -> set[int]:
    """Keep this process, the clients', to one core; the others, which the server may use."""
    client, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {client})
    return set(others or [client])


def print_turns(case: Case, turns: Sequence[Turn]) -> None:
    """A row a turn, and the goals."""
    table = Table(title=f"{case.name}: {OVERLOAD} x capacity, deadline {case.deadline_ms} ms")
    for heading in (
        *("capacity/s", "offered/s", "goodput/s", "ratio", "statuses"),
        *("p50 ms", "p99 ms", "refused p99 ms", "peak MiB"),
    ):
        table.add_column(heading, justify="right")
    for turn in turns:
        table.add_row(
            *(f"{value:.0f}" for value in (turn.capacity, turn.offered, turn.goodput)),
            f"{turn.ratio:.3f}",
            " ".join(f"{status}:{count}" for status, count in sorted(turn.statuses.items())),
            f"{turn.answer_p50_ms:.0f}",
            f"{turn.answer_p99_ms:.0f}",
            f"{turn.refusal_p99_ms:.1f}",
            f"{turn.peak_mib:.0f}",
        )
    console = Console(width=120)
    console.print(table)
    ratio = statistics.median(turn.ratio for turn in turns)
    others = sum(
        count
        for turn in turns
        for status, count in turn.statuses.items()
        if status not in (200, 429, 504)
    )
    silent = sum(turn.refusals_without_retry_after for turn in turns)
    late = sum(turn.refusals_after_deadline for turn in turns)
    console.print(
        f"goodput / capacity: median {ratio:.3f}, goal {GOAL}: "
        f"{'met' if ratio >= GOAL else 'missed'}"
    )
    console.print(
        f"neither 200, 429 nor 504: {others}; refused without Retry-After: {silent}; "
        f"refused after the deadline: {late}"
    )


def main() -> None:
    """Print both cases and write them to ``build/overload.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    results, cores = {}, _apart()
    for case in (bundled_case(), photographs_case()):
        turns = run(case, cores=cores, seconds=arguments.seconds, turns=arguments.turns)
        print_turns(case, turns)
        results[case.name] = [asdict(turn) for turn in turns]
    file = ROOT / "build" / "overload.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
