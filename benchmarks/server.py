"""The server as an operator starts it, for the benchmarks to ask."""

import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, and its process."""

    url: str
    pid: int


@contextmanager
def serving(flags: Sequence[str] = (), *, cores: Collection[int] | None = None) -> Iterator[Server]:
    """A ready server on a free port, ended at the exit.

    Args:
        flags: of ``normgate serve``.
        cores: the only ones it may run on; all by default.
    """
    command = [sys.executable, "-m", "app.cli", "serve", "--port", "0", "--log-level", "error"]
    process = subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None, "the server did not say where it listens"
        yield Server(url=found[0], pid=process.pid)
    finally:
        process.terminate()
        process.wait()
