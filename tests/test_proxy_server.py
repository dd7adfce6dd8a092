"""Real processes: Envoy, nginx and NormGate in front of a classifier."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.test_server import ROOT, START_S, Server, serving
from tests.upstream import FakeUpstream, Received, upstream

EXAMPLES = ROOT / "docs" / "examples"
ID_IMAGE = (EXAMPLES / "ship.jpg").read_bytes()
OOD_IMAGE = (EXAMPLES / "noise.jpg").read_bytes()


def program(name: str) -> str:
    """Where a program is: beside Python, or on the system; without it the test is skipped."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ["PATH"], "/usr/sbin"]))
    if found is None and not os.environ.get("CI"):
        pytest.skip(f"{name} is not installed")
    assert found is not None, f"CI has no {name}"
    return found


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(command: Sequence[str], *, until: str) -> Iterator[None]:
    """A process that has said ``until`` on its standard error; ended at the exit."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = next((line for line in process.stderr if until in line), None)
        assert said is not None, f"{command[0]} ended before it was ready"
        # Read on, so that it is never held up by a full pipe.
        with ThreadPoolExecutor(1) as reader:
            reader.submit(process.stderr.read)
            try:
                yield
            finally:
                process.terminate()
    finally:
        process.terminate()
        process.wait(START_S)
        process.stderr.close()


def replaced(path: Path, changes: Sequence[tuple[str, str]]) -> str:
    """A shipped configuration with other addresses; each of the old ones stands in it once."""
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def classifier() -> Iterator[int]:
    """The port of a classifier process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.classifier"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def normgate(classifier: int) -> Iterator[Server]:
    """NormGate in front of the classifier."""
    with serving(["--upstream-url", f"http://127.0.0.1:{classifier}/models"]) as server:
        yield server


def port_of(url: str) -> int:
    """The port in a URL."""
    port = httpx.URL(url).port
    assert port is not None
    return port


def values(received: Any, name: str) -> list[str]:
    """The values of a header that the classifier received."""
    return [value for header, value in received["headers"] if header == name]


def test_in_front_of_a_process(normgate: Server) -> None:
    """An image that passes arrives whole in another process, and its answer comes back."""
    with httpx.Client(base_url=normgate.url, timeout=START_S) as client:
        passed = client.post("/v1/proxy/classify?x=1", content=ID_IMAGE)
        held_back = client.post("/v1/proxy/classify", content=OOD_IMAGE)
        labels = client.get("/v1/proxy/labels")

    received = passed.json()
    assert (received["method"], received["target"]) == ("POST", "/models/classify?x=1")
    assert received["sha256"] == hashlib.sha256(ID_IMAGE).hexdigest()
    assert values(received, "x-normgate-verdict") == ["id"]
    assert passed.headers["x-normgate-verdict"] == "id"
    assert len(passed.headers.get_list("date")) == len(passed.headers.get_list("server")) == 1
    assert (held_back.status_code, held_back.headers["x-normgate-verdict"]) == (422, "ood")
    assert labels.json()["target"] == "/models/labels"


def test_behind_nginx(normgate: Server, tmp_path: Path) -> None:
    """The shipped nginx configuration: bodies are judged, paths kept, and clients named."""
    port = free_port()
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(
        replaced(
            ROOT / "deploy" / "nginx" / "nginx.conf",
            [
                ("/tmp/normgate-nginx.pid", str(tmp_path / "pid")),
                ("server 127.0.0.1:8000;", f"server 127.0.0.1:{port_of(normgate.url)};"),
                ("listen 8080;", f"listen 127.0.0.1:{port};"),
            ],
        )
    )
    command = [program("nginx"), "-p", str(tmp_path), "-c", str(configuration), "-e", "stderr"]
    with (
        running(command, until="start worker process"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_S) as client,
    ):
        passed = client.post("/classify%2Fnow?x=%20", content=ID_IMAGE)
        held_back = client.post("/classify", content=OOD_IMAGE)
        labels = client.get("/labels", headers={"x-normgate-verdict": "forged"})
        too_large = client.post("/classify", content=b"x" * (33 * 2**20))

    received = passed.json()
    assert received["target"] == "/models/classify%2Fnow?x=%20"
    assert received["sha256"] == hashlib.sha256(ID_IMAGE).hexdigest()
    assert values(received, "x-normgate-verdict") == ["id"]
    assert values(received, "x-forwarded-host") == [f"127.0.0.1:{port}"]
    assert values(received, "x-forwarded-for") == ["127.0.0.1, 127.0.0.1"]
    assert passed.headers["x-normgate-verdict"] == "id"
    assert (held_back.status_code, held_back.headers["x-normgate-verdict"]) == (422, "ood")
    assert held_back.json()["detail"]
    assert values(labels.json(), "x-normgate-verdict") == ["none"]
    assert too_large.status_code == 413


def test_behind_envoy(normgate: Server, classifier: int, tmp_path: Path) -> None:
    """The shipped Envoy configuration: the gate sees the whole body, both sides the verdict."""
    port = free_port()
    configuration = tmp_path / "envoy.yaml"
    configuration.write_text(
        replaced(
            ROOT / "deploy" / "envoy" / "envoy.yaml",
            [
                ("address: 0.0.0.0, port_value: 10000", f"address: 127.0.0.1, port_value: {port}"),
                ("port_value: 8000", f"port_value: {port_of(normgate.url)}"),
                ("port_value: 9000", f"port_value: {classifier}"),
                # This machine may be busy; a test is no place to measure.
                ("timeout: 0.2s", "timeout: 20s"),
                ('value: "200"', 'value: "20000"'),
            ],
        )
    )
    command = [program("envoy"), "-c", str(configuration), "--concurrency", "1"]
    command += ["--disable-hot-restart", "--log-level", "info"]
    forged = {"x-normgate-verdict": "forged", "x-normgate-error": "forged"}
    with (
        running(command, until="starting workers"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_S) as client,
    ):
        passed = client.put("/classify?model=theirs", content=ID_IMAGE, headers=forged)
        held_back = client.post("/classify", content=OOD_IMAGE)
        form = client.post("/classify", files={"photo": ("a.jpg", OOD_IMAGE)})
        text = client.post("/classify", content=b"{}", headers={"content-type": "a/json"})
        labels = client.get("/labels", headers=forged)
        with_body = client.request("GET", "/labels", content=OOD_IMAGE)
        underscore = client.get("/labels", headers={"x_normgate_verdict": "forged"})
        too_large = client.post("/classify", content=b"x" * (33 * 2**20))

    received = passed.json()
    assert (received["method"], received["target"]) == ("PUT", "/classify?model=theirs")
    assert received["sha256"] == hashlib.sha256(ID_IMAGE).hexdigest()
    assert values(received, "x-normgate-verdict") == ["id"]
    assert values(received, "x-normgate-error") == []
    assert float(values(received, "x-normgate-score")[0]) > 0
    assert passed.headers["x-normgate-verdict"] == "id"
    for refused in (held_back, form):
        assert (refused.status_code, refused.headers["x-normgate-verdict"]) == (403, "ood")
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.headers["x-normgate-score"] in refused.json()["detail"]
    assert text.status_code == 415
    assert labels.status_code == 200
    assert "forged" not in labels.text
    assert with_body.status_code == 405
    assert underscore.status_code == 400
    assert too_large.status_code == 413


@pytest.fixture(scope="module")
def relay() -> Iterator[tuple[FakeUpstream, Server]]:
    """NormGate in front of a fake that does odd things."""
    with upstream() as fake, serving(["--upstream-url", fake.url]) as server:
        yield fake, server


def exchange(server: Server, request: bytes) -> bytes:
    """Everything the server answers to these bytes, until it closes."""
    address = ("127.0.0.1", port_of(server.url))
    with socket.create_connection(address, START_S) as client:
        client.sendall(request)
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
    return answer


def test_streams_the_answer(relay: tuple[FakeUpstream, Server]) -> None:
    """The beginning of an answer arrives while the upstream still thinks about its end."""
    fake, server = relay
    arrived = threading.Event()

    def answer(connection: socket.socket, _: Received) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\ncat\r\n")
        assert arrived.wait(START_S)
        connection.sendall(b"3\r\ndog\r\n0\r\n\r\n")

    fake.answer = answer
    url = f"{server.url}/v1/proxy/classify"
    with httpx.stream("POST", url, content=ID_IMAGE, timeout=START_S) as response:
        chunks = response.iter_raw()
        assert next(chunks) == b"cat"
        arrived.set()
        assert b"".join(chunks) == b"dog"


@pytest.mark.parametrize("framing", [b"Transfer-Encoding: chunked", b"Content-Length: 3"])
def test_the_head_does_not_wait(relay: tuple[FakeUpstream, Server], framing: bytes) -> None:
    """It arrives while the upstream has not begun with the body."""
    fake, server = relay
    arrived = threading.Event()

    def answer(connection: socket.socket, _: Received) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n")
        assert arrived.wait(START_S)
        connection.shutdown(socket.SHUT_RDWR)

    fake.answer = answer
    with httpx.stream("GET", f"{server.url}/v1/proxy/stream", timeout=START_S) as response:
        arrived.set()
        assert response.status_code == 200


@pytest.mark.parametrize(
    "head", [b"Transfer-Encoding: chunked\r\n\r\n3\r\ncat\r\n", b"Content-Length: 9\r\n\r\ncat"]
)
def test_broken_off_answer(relay: tuple[FakeUpstream, Server], head: bytes) -> None:
    """An answer that the upstream breaks off does not look complete to the client."""
    fake, server = relay

    def answer(connection: socket.socket, _: Received) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + head)
        connection.shutdown(socket.SHUT_RDWR)

    fake.answer = answer

    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{server.url}/v1/proxy/", timeout=START_S)
    assert httpx.get(f"{server.url}/readyz").status_code == 200


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncat"])
def test_gone_client(relay: tuple[FakeUpstream, Server], begin: bytes) -> None:
    """When the client goes away, before or in an answer, the upstream's connection ends too."""
    fake, server = relay
    arrived, ended = threading.Event(), threading.Event()

    def answer(connection: socket.socket, _: Received) -> None:
        connection.sendall(begin)
        arrived.set()
        if connection.recv(1) == b"":
            ended.set()

    fake.answer = answer
    address = ("127.0.0.1", port_of(server.url))
    with socket.create_connection(address, START_S) as client:
        client.sendall(b"GET /v1/proxy/ HTTP/1.1\r\nHost: a\r\n\r\n")
        assert arrived.wait(START_S)
        if begin:
            assert client.recv(1)

    assert ended.wait(START_S)


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"/v1/proxy//127.0.0.1:1/x", 200),
        (b"/v1/proxy/@127.0.0.1:1/x", 200),
        (b"http://127.0.0.1:1/v1/proxy/x", 200),
        (b"/v1/proxy/%2F%2F127.0.0.1:1/x", 200),
        (b"/v1/proxy/../../x", 400),
        (b"/v1/proxy/a/../x", 400),
        (b"/v1/proxy/%2e%2e/x", 400),
        (b"/v1/proxy/a%2F..%2Fx", 400),
        (b"/v1/%70roxy/x", 400),
    ],
)
def test_no_path_leads_elsewhere(
    relay: tuple[FakeUpstream, Server], target: bytes, status: int
) -> None:
    """Whatever the request target is, only the configured upstream is called."""
    fake, server = relay
    fake.received.clear()
    fake.answer = FakeUpstream("").answer

    answer = exchange(
        server, b"GET " + target + b" HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    )

    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert len(fake.received) == (status == 200)
    for request in fake.received:
        assert request.values("host") == [fake.url.removeprefix("http://")]
        assert request.target.startswith("/")
        assert not request.target.startswith("//")


def test_odd_bytes_in_headers(relay: tuple[FakeUpstream, Server]) -> None:
    """Header values that are not ASCII arrive as they were sent, both ways."""
    fake, server = relay
    fake.received.clear()

    def answer(connection: socket.socket, _: Received) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Odd: th\xe9\r\nContent-Length: 0\r\n\r\n")

    fake.answer = answer
    returned = exchange(
        server,
        b"GET /v1/proxy/ HTTP/1.1\r\nHost: a\r\nX-Odd: caf\xe9\r\nConnection: close\r\n\r\n",
    )

    assert fake.received[0].values("x-odd") == ["caf\xe9"]
    assert b"x-odd: th\xe9\r\n" in returned.lower()
