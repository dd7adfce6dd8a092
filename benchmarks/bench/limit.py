"""The process of :mod:`benchmarks.bench.offline_loop`, from outside."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.bench.cases import Case
from benchmarks.server import ROOT


@dataclass(frozen=True)
class LimitProcess:
    """An offline loop that waits for commands."""

    process: "subprocess.Popen[str]"

    def ask(self, what: Literal["throughput", "alone", "plan"], *, seconds: float) -> Any:
        """Images a second, milliseconds an image, or how each plan did; the plan comes first.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"what": what, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the offline loop ended")
        return json.loads(line)


@contextmanager
def limit(case: Case) -> Iterator[LimitProcess]:
    """The offline loop of a case, ended at the exit."""
    command = [sys.executable, "-m", "benchmarks.bench.offline_loop", str(case.store), case.model]
    process = subprocess.Popen(
        [*command, case.device, *map(str, case.images)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield LimitProcess(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
