"""Where the time of a request goes: ``python -m benchmarks.stages``.

NormGate runs as in ``benchmarks.bench`` and is loaded by wrk; each stage's mean is what its own
metrics grew by, and the processor time is that of its threads. What is left of the total is the
event loop's: routing, waking, counting. JSON and writing the answer come after it.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

from rich.console import Console
from rich.table import Table

from benchmarks.bench import wrk
from benchmarks.bench.bodies import write_bodies
from benchmarks.bench.cases import NAMES, OUTPUT, SINGLE, Case, Load, make_case
from benchmarks.bench.contestants import normgate, running
from benchmarks.server_metrics import CPU, LOOP, Metrics

RESULT: Final = OUTPUT / "stages.json"
STAGES: Final = ("read", "decode", "queue", "forward", "total")
_WARM_UP_S: Final = 1
_PATH: Final = "/v1/score"


@dataclass(frozen=True)
class Profile:
    """One load.

    Args:
        load: connections.
        images_per_s: that were answered.
        p50_ms: as the load generator saw it.
        stages_ms: the mean of each stage, an image; of ``forward``, a pass.
        loop_ms: processor time of the event loop, an image.
        threads_ms: of all other threads.
        batch_size: mean images of a forward pass.
    """

    load: str
    images_per_s: float
    p50_ms: float
    stages_ms: Mapping[str, float]
    loop_ms: float
    threads_ms: float
    batch_size: float

    @property
    def rest_ms(self) -> float:
        """Of the total, what no other stage accounts for."""
        parts = sum(self.stages_ms[stage] for stage in STAGES if stage != "total")
        return self.stages_ms["total"] - parts


def profiles(case: Case, *, seconds: float) -> Iterator[Profile]:
    """A profile of each concurrency, one image a request."""
    images = [file.read_bytes() for file in case.images]
    with running(normgate(), case) as server:
        for load in SINGLE:
            bodies, content_type = write_bodies(
                OUTPUT / "bodies" / case.name, images, load=load, encoding="raw"
            )
            ask = partial(wrk.measure, server.url, bodies, content_type=content_type, load=load)
            ask(seconds=_WARM_UP_S)
            metrics = Metrics(server.url.removesuffix(_PATH), server.process.pid)
            found = ask(seconds=seconds)
            yield _profile(load, found, metrics.since())


def _profile(load: Load, found: wrk.Measurement, grown: Mapping[str, float]) -> Profile:
    def mean_ms(stage: str) -> float:
        name = "normgate_stage_seconds"
        return 1000 * grown[f"{name}_sum{stage}"] / grown[f"{name}_count{stage}"]

    count = grown["normgate_stage_seconds_counttotal"]
    return Profile(
        load=str(load),
        images_per_s=found.images_per_s,
        p50_ms=found.p50_ms,
        stages_ms={stage: mean_ms(stage) for stage in STAGES},
        loop_ms=1000 * grown[LOOP] / count,
        threads_ms=1000 * (grown[CPU] - grown[LOOP]) / count,
        batch_size=grown["normgate_batch_size_sum"] / grown["normgate_batch_size_count"],
    )


def _print(case: Case, found: Sequence[Profile], console: Console) -> None:
    table = Table(title=f"{case.title}: milliseconds of a request")
    for heading in (
        *("load", "images/s", "p50", *STAGES[:-1], "rest", "total"),
        *("images a pass", "processor: event loop", "other threads"),
    ):
        table.add_column(heading, justify="right")
    for one in found:
        stages = [one.stages_ms[stage] for stage in STAGES[:-1]]
        cells = [one.p50_ms, *stages, one.rest_ms, one.stages_ms["total"]]
        table.add_row(
            one.load,
            f"{one.images_per_s:.0f}",
            *(f"{cell:.2f}" for cell in cells),
            f"{one.batch_size:.1f}",
            f"{one.loop_ms:.2f}",
            f"{one.threads_ms:.2f}",
        )
    console.print(table)


def main() -> int:
    """Print a table a case, write ``build/bench/stages.json``; 1 where nothing can be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=NAMES, help="default: the first two")
    parser.add_argument("--seconds", type=float, default=5, help="of a load")
    arguments = parser.parse_args()
    if not wrk.is_installed():
        print("stages: wrk is not installed; on Debian: apt install wrk", file=sys.stderr)
        return 1
    console = Console(width=160)
    result = {}
    for name in arguments.case or NAMES[:2]:
        case = make_case(name)
        found = list(profiles(case, seconds=arguments.seconds))
        _print(case, found, console)
        result[name] = [asdict(one) | {"rest_ms": one.rest_ms} for one in found]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
