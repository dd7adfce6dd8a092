"""Where the time of a request goes: ``python -m benchmarks.stages``.

NormGate runs as in ``benchmarks.bench`` and is loaded by wrk; each stage's mean is what its own
metrics grew by, and the processor time is that of its threads. What is left of the total is the
event loop's: routing, waking, counting. JSON and writing the answer come after it.
"""

import argparse
import json
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks.bench import wrk
from benchmarks.bench.bodies import write_bodies
from benchmarks.bench.cases import NAMES, OUTPUT, SINGLE, Case, Load, make_case
from benchmarks.bench.contestants import Running, normgate, running

RESULT: Final = OUTPUT / "stages.json"
STAGES: Final = ("read", "decode", "queue", "forward", "total")
_WARM_UP_S: Final = 1


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


@dataclass(frozen=True)
class _Moment:
    sums: Mapping[str, float]
    counts: Mapping[str, float]
    batch_sum: float
    batch_count: float
    loop_s: float
    threads_s: float


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
            before = _moment(server)
            found = ask(seconds=seconds)
            yield _profile(load, found, before, _moment(server))


def _profile(load: Load, found: wrk.Measurement, before: _Moment, after: _Moment) -> Profile:
    count = after.counts["total"] - before.counts["total"]
    passes = after.batch_count - before.batch_count
    return Profile(
        load=str(load),
        images_per_s=found.images_per_s,
        p50_ms=found.p50_ms,
        stages_ms={
            stage: 1000
            * (after.sums[stage] - before.sums[stage])
            / (after.counts[stage] - before.counts[stage])
            for stage in STAGES
        },
        loop_ms=1000 * (after.loop_s - before.loop_s) / count,
        threads_ms=1000 * (after.threads_s - before.threads_s) / count,
        batch_size=(after.batch_sum - before.batch_sum) / passes,
    )


def _moment(server: Running) -> _Moment:
    url = server.url.replace("/v1/score", "/metrics")
    with urllib.request.urlopen(url) as response:
        text = response.read().decode()
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    of = {(one.name, one.labels.get("stage")): one.value for one in samples}
    times = {
        thread.id: thread.user_time + thread.system_time for thread in server.process.threads()
    }
    loop_s = times.pop(server.process.pid)
    return _Moment(
        sums={stage: of["normgate_stage_seconds_sum", stage] for stage in STAGES},
        counts={stage: of["normgate_stage_seconds_count", stage] for stage in STAGES},
        batch_sum=of["normgate_batch_size_sum", None],
        batch_count=of["normgate_batch_size_count", None],
        loop_s=loop_s,
        threads_s=sum(times.values()),
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
