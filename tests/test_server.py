"""The real server process: started, asked, stopped."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from app.core.images import load
from app.store import Store
from tests.pictures import jpeg

ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / "model_store"
START_S = 60


class Server:
    """A running ``normgate serve``."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process = process
        self.url = url

    def terminate(self) -> None:
        """Ask it to end."""
        self.process.send_signal(signal.SIGTERM)


def command(*flags: str) -> list[str]:
    """How the server is started, with the repository's models."""
    always = ["--model-store", str(STORE), "--shutdown-grace-s", "0"]
    return [sys.executable, "-m", "app.cli", "serve", *always, *flags]


@contextmanager
def serving(flags: Sequence[str] = ()) -> Iterator[Server]:
    """A server on a free port, ready; ended at the exit."""
    process = subprocess.Popen(
        command("--port", "0", *flags), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None, "the server did not say where it listens"
        server = Server(process, found[0])
        wait_until_ready(server)
        yield server
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def serving_together(*each: Sequence[str]) -> Iterator[list[Server]]:
    """A server for each of some flags; started at once, they have all cores."""
    with ExitStack() as stack, ThreadPoolExecutor(len(each)) as pool:
        yield list(pool.map(lambda flags: stack.enter_context(serving(flags)), each))


def wait_until_ready(server: Server) -> None:
    """Ask until the models are loaded."""
    until = time.monotonic() + START_S
    with httpx.Client(base_url=server.url, timeout=START_S) as client:
        while time.monotonic() < until:
            if client.get("/readyz").status_code == 200:
                return
    raise AssertionError("the server did not become ready")


def test_scores_over_http_are_the_offline_scores() -> None:
    """Concurrent distinct images each get the score computed offline, to 1e-5; SIGTERM ends it."""
    files = [jpeg(seed) for seed in range(200)]
    loaded = Store(STORE).load("cifar10-resnet18")
    detector = loaded.detector()
    offline = [
        float(detector.detect(load(data, loaded.bundle.preprocessing)[None]).scores[0])
        for data in files
    ]
    with serving() as server, httpx.Client(base_url=server.url, timeout=START_S) as client:

        def ask(data: bytes) -> float:
            response = client.post("/v1/score", content=data)
            assert response.status_code == 200
            return float(response.json()["results"][0]["score"])

        with ThreadPoolExecutor(16) as pool:
            online = list(pool.map(ask, files))
        server.terminate()
        assert server.process.wait(START_S) == 0

    assert online == pytest.approx(offline, rel=1e-5)


def test_sigterm_answers_what_was_accepted() -> None:
    """A request the server has accepted is answered although SIGTERM came meanwhile."""
    parts = [("file", (f"{seed}.jpg", jpeg(seed))) for seed in range(500)]
    with (
        serving(["--queue-size", "1000"]) as server,
        httpx.Client(base_url=server.url, timeout=START_S) as client,
        httpx.Client(base_url=server.url, timeout=START_S) as prober,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(client.post, "/v1/score", files=parts)
        while "normgate_in_flight 1.0" not in prober.get("/metrics").text:
            assert not waiting.done()
        server.terminate()
        response = waiting.result(START_S)
        server.process.wait(START_S)

    assert response.status_code == 200
    assert len(response.json()["results"]) == 500


def test_a_body_that_never_arrives() -> None:
    """The deadline covers the upload: a client that stops sending is answered 504."""
    with serving(["--deadline-ms", "300"]) as server:
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port or 0), START_S) as client:
            client.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nabc")
            status_line = client.recv(4096).partition(b"\r\n")[0]

    assert status_line.startswith(b"HTTP/1.1 504")


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        (["--model-store", "/nowhere"], {}, "no bundle in model store /nowhere"),
        (["--model", "unknown"], {}, "no model 'unknown'"),
        (["--port", "99999"], {}, "NORMGATE_PORT"),
        (["--devices", "tpu"], {}, "NORMGATE_DEVICES"),
        ([], {"NORMGATE_MODLE": "x"}, "NORMGATE_MODLE"),
    ],
)
def test_start_failures(flags: Sequence[str], environment: dict[str, str], words: str) -> None:
    """A start that cannot succeed ends the process with one clear line."""
    ended = subprocess.run(
        command("--port", "0", *flags),
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )

    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert line.startswith("normgate: error: ")
    assert words in line
