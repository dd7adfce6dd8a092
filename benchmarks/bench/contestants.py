"""The servers that are compared, as real processes that rest while another is measured."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import psutil

from benchmarks.bench.bodies import Encoding, encode
from benchmarks.bench.cases import MAX_BATCH_SIZE, Case
from benchmarks.peers import environments
from benchmarks.server import ROOT

Kind = Literal["normgate", "documented", "ours"]

CORES: Final = sorted(os.sched_getaffinity(0))
_READY_S: Final = 180
_AWAKE_S: Final = 0.3
_END_S: Final = 10
_POLL_S: Final = 0.1


@dataclass(frozen=True)
class Contestant:
    """A server that can be started for any case.

    Args:
        name: in tables and results.
        kind: NormGate itself, or a peer and which of its two programs.
        path: that images are posted to.
        encoding: of the bodies that it reads.
        command: its command line, given the case and a port.
        environment: added to that of this process, given the case and a port.
        answers: the answers to a request's images in a response's JSON.
    """

    name: str
    kind: Kind
    path: str
    encoding: Encoding
    command: Callable[[Case, int], Sequence[str]]
    environment: Callable[[Case, int], Mapping[str, str]]
    answers: Callable[[Any], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Running:
    """A contestant that listens."""

    contestant: Contestant
    url: str
    process: psutil.Process

    def ask(self, images: Sequence[bytes]) -> Sequence[Mapping[str, Any]]:
        """The answers to one request.

        Raises:
            OSError: no answer, or one of a status other than 200.
        """
        body = encode(images, self.contestant.encoding)
        request = urllib.request.Request(
            self.url, body.data, {"Content-Type": body.content_type}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=_READY_S) as response:
            return self.contestant.answers(json.load(response))

    def rest(self) -> None:
        """Take no more of the processors until :meth:`wake`."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Go on, and see that much time has passed: NormGate takes it for a full event loop."""
        self._signal(signal.SIGCONT)
        time.sleep(_AWAKE_S)

    def resident_bytes(self) -> int:
        """Memory of all its processes; pages that they share count once for each."""
        return sum(_resident(process) for process in self._processes())

    def end(self) -> None:
        """End it and every process that it started."""
        processes = self._processes()
        self.wake()
        with suppress(psutil.NoSuchProcess):
            self.process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=_END_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_END_S)

    def _processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return []

    def _signal(self, number: int) -> None:
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextmanager
def running(contestant: Contestant, case: Case) -> Iterator[Running]:
    """The contestant once it answers, ended at the exit.

    Raises:
        RuntimeError: it ended, or did not answer in time; the message holds what it wrote.
    """
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            contestant.command(case, port),
            cwd=ROOT,
            env=os.environ | contestant.environment(case, port),
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, CORES),
        )
        found = Running(
            contestant, f"http://127.0.0.1:{port}{contestant.path}", psutil.Process(process.pid)
        )
        try:
            try:
                _wait(found, process, case.images[0].read_bytes())
            except RuntimeError as error:
                log.seek(0)
                wrote = log.read().decode(errors="replace")
                raise RuntimeError(f"{contestant.name} {error}:\n{wrote}") from error
            yield found
        finally:
            found.end()
            process.wait()


def free_port() -> int:
    """A port that nobody listens on, nor on the two after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port: int = listener.getsockname()[1]
        with suppress(OSError):
            for next_port in (port + 1, port + 2):
                socket.create_server(("127.0.0.1", next_port)).close()
            return port


def normgate(
    *, name: str = "normgate", module: str = "app.cli", path: str = "/v1/score"
) -> Contestant:
    """NormGate with its defaults, the access log aside.

    Args:
        name: in the tables.
        module: whose command line is ``normgate``'s.
        path: that is posted to.
    """

    def command(case: Case, port: int) -> Sequence[str]:
        flags = ["--model-store", str(case.store), "--port", str(port)]
        flags += ["--max-batch-size", str(MAX_BATCH_SIZE), "--queue-size", "4096"]
        flags += ["--deadline-ms", "60000", "--shutdown-grace-s", "0", "--devices", case.device]
        # The others write no line a request either.
        flags += ["--access-log-sample", "0", "--log-level", "error"]
        return [sys.executable, "-m", module, "serve", *flags]

    return Contestant(
        name=name,
        kind="normgate",
        path=path,
        encoding="raw",
        command=command,
        environment=lambda case, port: {},
        answers=lambda answer: list(answer["results"]),
    )


UNSCORED: Final = normgate(name="normgate, classifier only", module="benchmarks.bench.unscored")


def peers() -> list[Contestant]:
    """Every peer as documented, then every peer with our decoder and detector.

    Processes and threads share the two cores: as many passes at once as there are cores, each on
    one thread.
    """
    return [
        _peer("mosec", "documented", path="/inference", encoding="json"),
        _peer("litserve", "documented", path="/predict", encoding="json"),
        _peer("mlserver", "documented", path="/v2/models/classifier/infer", encoding="v2"),
        _peer("fastapi", "documented", path="/score", encoding="form"),
        _peer("mosec", "ours", path="/inference", encoding="frames"),
        _peer("litserve", "ours", path="/predict", encoding="json"),
        _peer("mlserver", "ours", path="/v2/models/classifier/infer", encoding="v2"),
        _peer("fastapi", "ours", path="/score", encoding="frames"),
    ]


def _peer(
    peer: str, kind: Literal["documented", "ours"], *, path: str, encoding: Encoding
) -> Contestant:
    module = "mlserver_runtime" if peer == "mlserver" else f"{peer}_server"

    def environment(case: Case, port: int) -> Mapping[str, str]:
        return {
            "PYTHONPATH": str(ROOT),
            "PEER_STORE": str(case.store),
            "PEER_MODEL": case.model,
            "PEER_VARIANT": kind,
            "PEER_PORT": str(port),
            "PEER_WORKERS": str(len(CORES)),
            "PEER_THREADS": "1",
            "PEER_DEVICE": case.device,
            "PEER_FOLDER": str(environments.folder(peer) / "settings" / str(port)),
            "OMP_NUM_THREADS": "1",
        }

    return Contestant(
        name=f"{peer}, {'as documented' if kind == 'documented' else 'our decoder and detector'}",
        kind=kind,
        path=path,
        encoding=encoding,
        command=lambda case, port: [
            str(environments.python(peer)),
            "-m",
            f"benchmarks.peers.{module}",
        ],
        environment=environment,
        answers=_v2_answers if encoding == "v2" else lambda answer: list(answer["results"]),
    )


def _v2_answers(response: Any) -> Sequence[Mapping[str, Any]]:
    columns = {output["name"]: output["data"] for output in response["outputs"]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [row | {"predictions": [row]} for row in rows]


def _wait(server: Running, process: "subprocess.Popen[bytes]", image: bytes) -> None:
    end = time.monotonic() + _READY_S
    problem: Exception | None = None
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode}")
        try:
            server.ask([image])
            return
        except (OSError, ValueError, KeyError) as error:
            problem = error
        time.sleep(_POLL_S)
    raise RuntimeError(f"did not answer within {_READY_S} s, at last: {problem!r}")


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess):
        return int(process.memory_info().rss)
    return 0
