"""From the start of ``normgate serve`` to ready, against the bare import of torch."""

import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from typing import Any, Final

from benchmarks.bench.contestants import free_port
from benchmarks.bench.figures import Goal, ratios
from benchmarks.bench.turns import Report
from benchmarks.server import ROOT

_GOAL: Final = 2.0
_READY_S: Final = 120
_POLL_S: Final = 0.01


def measure_startup(*, turns: int, report: Report) -> dict[str, Any]:
    """Seconds of each, turn by turn; a first turn that warms the disk is thrown away."""
    found = []
    for number in range(turns + 1):
        report(f"start to ready, turn {number} of {turns}")
        found.append({"torch_s": import_torch_s(), "ready_s": ready_s()})
    return {"turns": found[1:]}


def startup_goals(result: dict[str, Any]) -> list[Goal]:
    """The one goal of the start."""
    value = ratios(result["turns"], lambda turn: turn["ready_s"], lambda turn: turn["torch_s"])
    name = "start to ready, bundled network, warm disk / import torch"
    return [] if value is None else [Goal(name, value, "at most", _GOAL)]


def import_torch_s() -> float:
    """A new interpreter that imports torch and ends."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, cwd=ROOT)
    return time.perf_counter() - started


def ready_s() -> float:
    """From the start of the process to the first 200 of ``/readyz``.

    Raises:
        RuntimeError: the server ended, or was not ready in time.
    """
    port = free_port()
    command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]
    command += ["--model-store", str(ROOT / "model_store"), "--shutdown-grace-s", "0"]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--log-level", "error"], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        while process.poll() is None and time.perf_counter() - started < _READY_S:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz"):
                return time.perf_counter() - started
            time.sleep(_POLL_S)
        raise RuntimeError(f"normgate serve was not ready within {_READY_S} s")
    finally:
        process.terminate()
        process.communicate()
