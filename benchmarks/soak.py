"""Memory under load for an hour: ``python -m benchmarks.soak``, or ``make soak``.

The server serves 32 px images to a closed loop of clients, and the resident memory of its process
is sampled. After the first part of the time, in which caches and arenas fill, a line is fitted
through the samples. They are not independent (memory moves in steps), so the interval of its slope
is a bootstrap over blocks of time.

The memory is called flat when the interval's upper end, carried on for a day, adds less than a
tenth to the median; at the full length that is the verdict, of a shorter run the growth that was
seen within it (at most a tenth of the median) must do.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import uvloop
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.datasets import unpack
from benchmarks.load import Answer, closed_loop, post
from benchmarks.server import ROOT, serving

RESULT: Final = ROOT / "build" / "bench" / "soak.json"
HOUR_S: Final = 3600.0
DAY_S: Final = 24 * HOUR_S
CLIENTS: Final = 32
SETTLING: Final = 0.25
"""The share of the time at its beginning that is not judged."""
GROWTH: Final = 0.10
"""Of the median, in a day, or within a run too short to tell."""
LEAST_S: Final = 600.0
"""The shortest run whose slope is carried on for a day."""
_BLOCKS: Final = 12
_RESAMPLES: Final = 2000
_LEVEL: Final = 0.95
_MIB: Final = 2**20
_CHUNK_S: Final = 20.0


@dataclass(frozen=True)
class Trend:
    """How resident memory moved, once it had settled.

    Args:
        median_mib: of the samples.
        peak_mib: the largest sample of all.
        slope_mib_per_hour: of the fitted line.
        low: of the slope's 95 % interval.
        high: of it.
        seconds: that were judged.
        growth_mib: the fitted line's rise over those seconds.
    """

    median_mib: float
    peak_mib: float
    slope_mib_per_hour: float
    low: float
    high: float
    seconds: float
    growth_mib: float

    @property
    def is_flat(self) -> bool:
        """Whether the rule above says so."""
        if self.seconds < LEAST_S:
            return self.growth_mib <= GROWTH * self.median_mib
        return self.high * DAY_S / HOUR_S <= GROWTH * self.median_mib


def trend(seconds: Sequence[float], mib: Sequence[float], *, seed: int = 0) -> Trend:
    """The trend of samples of memory.

    Args:
        seconds: since the start, ascending.
        mib: resident memory then.
        seed: of the bootstrap.

    Raises:
        ValueError: there are too few samples for the blocks of the bootstrap.
    """
    times, sizes = np.asarray(seconds), np.asarray(mib)
    kept = times >= times[0] + SETTLING * (times[-1] - times[0])
    times, sizes = times[kept], sizes[kept]
    if len(times) < 2 * _BLOCKS:
        raise ValueError(f"{len(times)} samples after settling; {2 * _BLOCKS} are needed")
    slope = _slope(times, sizes)
    low, high = _interval(times, sizes, seed=seed)
    span = float(times[-1] - times[0])
    return Trend(
        median_mib=float(np.median(sizes)),
        peak_mib=float(np.max(mib)),
        slope_mib_per_hour=HOUR_S * slope,
        low=HOUR_S * low,
        high=HOUR_S * high,
        seconds=span,
        growth_mib=slope * span,
    )


def _interval(
    times: NDArray[np.float64], sizes: NDArray[np.float64], *, seed: int
) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    blocks = np.array_split(np.arange(len(times)), _BLOCKS)
    slopes = []
    for _ in range(_RESAMPLES):
        chosen = generator.integers(_BLOCKS, size=_BLOCKS)
        if len(set(chosen)) == 1:
            continue
        places = np.concatenate([blocks[block] for block in chosen])
        slopes.append(_slope(times[places], sizes[places]))
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(slopes, (tail, 100 - tail))
    return float(low), float(high)


def _slope(times: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    return float(np.polyfit(times - times.mean(), sizes, 1)[0])


class Sampler:
    """Samples the resident memory of a process until it is stopped."""

    def __init__(self, pid: int, *, every_s: float) -> None:
        self._process = psutil.Process(pid)
        self._every_s = every_s
        self._is_over = threading.Event()
        self._started = time.monotonic()
        self.seconds: list[float] = []
        self.mib: list[float] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(self._every_s):
            self.seconds.append(time.monotonic() - self._started)
            self.mib.append(self._process.memory_info().rss / _MIB)


def run(images: Sequence[bytes], *, seconds: float) -> tuple[Trend, int, int]:
    """The trend, the number of answers, and how many of them were not 200."""
    flags = ["--shutdown-grace-s", "0", "--access-log-sample", "0", "--deadline-ms", "60000"]
    answers = failures = 0
    with serving(flags) as server:
        requests = [post(f"{server.url}/v1/score", image) for image in images]
        every_s = min(5.0, seconds / 200)
        with Sampler(server.pid, every_s=every_s) as sampler:
            end = time.monotonic() + seconds
            # In chunks: the answers of an hour are not kept.
            while (left := end - time.monotonic()) > 0:
                got: list[Answer] = uvloop.run(
                    closed_loop(server.url, requests, clients=CLIENTS, seconds=min(_CHUNK_S, left))
                )
                answers += len(got)
                failures += sum(answer.status != 200 for answer in got)
    return trend(sampler.seconds, sampler.mib), answers, failures


def main() -> int:
    """Print the verdict, write ``build/bench/soak.json``; 1 where the memory is not flat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=HOUR_S, help="default: an hour")
    parser.add_argument("--quick", action="store_true", help="20 seconds")
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEGs instead of CIFAR-10's")
    arguments = parser.parse_args()
    seconds = 20.0 if arguments.quick else arguments.seconds
    folder = arguments.images or unpack("cifar10") / "test"
    images = [file.read_bytes() for file in sorted(folder.rglob("*.jpg"))[:500]]
    found, answers, failures = run(images, seconds=seconds)
    verdict = "flat" if found.is_flat else "NOT flat"
    Console(width=120).print(
        f"{answers} answers in {seconds:.0f} s, {failures} not 200; resident "
        f"{found.median_mib:.0f} MiB, at most {found.peak_mib:.0f} MiB; "
        f"{found.slope_mib_per_hour:+.2f} MiB an hour "
        f"({found.low:+.2f} to {found.high:+.2f}): {verdict}"
    )
    goal = {
        "name": f"memory, 32 px under full load for {seconds:.0f} s: "
        f"{found.median_mib:.0f} MiB; growth in MiB an hour",
        "value": found.slope_mib_per_hour,
        "goal": "flat",
        "met": found.is_flat,
    }
    result = {"trend": asdict(found), "answers": answers, "failures": failures, "goals": [goal]}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if found.is_flat and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
