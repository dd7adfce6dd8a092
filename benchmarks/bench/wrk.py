"""Closed-loop load from wrk: so many connections, each with one request under way."""

import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.bench.cases import Load

_LONGEST_S: Final = 60
SCRIPT: Final = Path(__file__).with_name("load.lua")
WARM_UP: Final = 0.15
"""The share of a measurement at its beginning whose answers are not counted."""
_TIMEOUT_S: Final = 60
_ROUNDS: Final = 4
"""Answers that each connection should have: those to one batch come all at once."""


class TooFewAnswersError(RuntimeError):
    """A server gave so few answers that their times tell no rate."""


@dataclass(frozen=True)
class Measurement:
    """What a server did under one load.

    ``failures`` counts answers by their status; 0 is a connection that broke or stayed silent.
    """

    images_per_s: float
    p50_ms: float
    p99_ms: float
    answers: int
    failures: dict[int, int] = field(default_factory=dict)


def is_installed() -> bool:
    """Whether there is a wrk to run."""
    return shutil.which("wrk") is not None


def measure(
    url: str,
    bodies: Path,
    *,
    content_type: str,
    load: Load,
    seconds: float,
    expected: Collection[int] = (200,),
) -> Measurement:
    """Ask for ``seconds``, or longer where a server is too slow for a few rounds of answers.

    Args:
        url: that is posted to.
        bodies: a folder of :func:`benchmarks.bench.bodies.write_bodies`.
        content_type: of the bodies.
        load: connections, and images in each body.
        seconds: of asking, at least 1.
        expected: statuses that are no failures.

    Raises:
        RuntimeError: wrk failed, or had not two answers in a minute.
    """
    while True:
        is_last = seconds >= _LONGEST_S
        least = 2 if is_last else _ROUNDS * load.concurrency
        try:
            return _ask(
                url,
                bodies,
                content_type,
                load=load,
                seconds=seconds,
                expected=expected,
                least=least,
            )
        except TooFewAnswersError:
            if is_last:
                raise
            seconds = min(4 * seconds, _LONGEST_S)


def _ask(
    url: str,
    bodies: Path,
    content_type: str,
    *,
    load: Load,
    seconds: float,
    expected: Collection[int],
    least: int,
) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "answers")
        command = ["wrk", "--threads", "1", "--connections", str(load.concurrency)]
        command += ["--duration", f"{max(1, round(seconds))}s", "--timeout", f"{_TIMEOUT_S}s"]
        command += ["--script", str(SCRIPT), url, "--", str(bodies)]
        command += [str(len(list(bodies.iterdir()))), content_type, str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not output.is_file():
            raise RuntimeError(f"wrk failed on {url}: {done.stderr or done.stdout}")
        return parse(output.read_text(), images=load.images, expected=expected, least=least)


def parse(
    text: str, *, images: int, expected: Collection[int] = (200,), least: int = 2
) -> Measurement:
    """A measurement from what the script wrote.

    Raises:
        TooFewAnswersError: there were fewer than ``least``.
    """
    latencies, broken, *answers = text.splitlines()
    if len(answers) < least:
        raise TooFewAnswersError(f"{len(answers)} answers in all; measure for longer")
    p50_ms, p99_ms = map(float, latencies.split())
    times = [float(line.split()[0]) for line in answers]
    statuses = [int(line.split()[1]) for line in answers]
    failures = Counter(status for status in statuses if status not in expected)
    if int(broken):
        failures[0] = int(broken)
    good = [time for time, status in zip(times, statuses, strict=True) if status in expected]
    return Measurement(
        images_per_s=images * rate(good),
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        answers=len(answers),
        failures=dict(failures),
    )


def rate(times: Sequence[float]) -> float:
    """Answers a second: the slope of their count over time, after the warm-up.

    A server that batches answers in bursts; counting between two moments would be wrong by up to
    a burst, the slope of steps is not.
    """
    if len(times) < 2:
        return 0.0
    seconds = np.asarray(times) - times[0]
    counts = np.arange(1, len(times) + 1)
    kept = seconds >= WARM_UP * seconds[-1]
    if np.ptp(seconds[kept]) < seconds[-1] / 2:
        # One burst is left: its own slope says how fast answers are written.
        kept = np.full_like(kept, fill_value=True)
    if np.ptp(seconds[kept]) == 0:
        return 0.0
    return float(np.polyfit(seconds[kept], counts[kept], 1)[0])
