"""The access log: which requests are logged, and what their lines tell."""

import random
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient
from structlog.testing import LogCapture

from app.api import problems
from app.api.access_log import AccessLogMiddleware, describe
from app.api.request_id import RequestIdMiddleware
from app.serving.metrics import Metrics
from tests.pictures import jpeg

Lines = list[MutableMapping[str, Any]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The log lines of a test, as dictionaries."""
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    yield capture.entries
    structlog.configure(**before)


def small(sample: float = 1) -> TestClient:
    """A small application with the access log."""
    app = FastAPI()

    @app.post("/described")
    async def described(request: Request) -> int:
        describe(request, model="m", version=2)
        describe(request, images=3, ood=1)
        return len(await request.body())

    @app.get("/status/{status}")
    async def answer(status: int) -> Response:
        return Response(status_code=status)

    @app.get("/bug")
    async def fail() -> None:
        raise RuntimeError("a bug")

    app.add_middleware(AccessLogMiddleware, sample=sample)
    app.add_middleware(RequestIdMiddleware)
    return TestClient(app, raise_server_exceptions=False)


def test_a_line(lines: Lines) -> None:
    """A line has the request's id, path, status, sizes and what the route told; no query."""
    small().post("/described?key=secret", content=b"12345", headers={"x-request-id": "abc"})

    [line] = lines
    assert line.pop("duration_ms") > 0
    assert line == {
        "event": "request",
        "log_level": "info",
        "request_id": "abc",
        "method": "POST",
        "path": "/described",
        "status": 200,
        "bytes_in": 5,
        "model": "m",
        "version": 2,
        "images": 3,
        "ood": 1,
    }


@pytest.mark.parametrize(
    "path",
    ["/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/m/ready"],
)
def test_probes(lines: Lines, path: str) -> None:
    """What machines ask every few seconds is logged at DEBUG."""
    small().get(path)

    assert [line["log_level"] for line in lines] == ["debug"]


@pytest.mark.parametrize(
    ("path", "logged"),
    [
        ("/status/200", []),
        ("/status/404", []),
        ("/status/429", []),
        ("/status/500", [500]),
        ("/status/503", [503]),
        ("/bug", [500]),
    ],
)
def test_failures_are_always_logged(lines: Lines, path: str, logged: list[int]) -> None:
    """A sample of none leaves what the server failed on, exceptions too."""
    small(sample=0).get(path)

    assert [line["status"] for line in lines] == logged


def test_sampling(lines: Lines) -> None:
    """About the given share of the requests is logged."""
    random.seed(1)
    asked = small(sample=0.25)

    for _ in range(400):
        asked.get("/status/200")

    # The binomial's mean and four standard deviations.
    assert len(lines) == pytest.approx(100, abs=4 * 8.66)


@pytest.mark.parametrize(
    ("asked", "logged"),
    [
        ("/status/204", "/status/204"),
        ("/nowhere/at/all?key=secret", "/nowhere/at/all"),
        ("/v1/gate/customers/7/cat.jpg", "/v1/gate/{path}"),
        ("/v1/%67ate/customers/7/cat.jpg", "/v1/gate/{path}"),
        ("/v1/proxy/customers/7?key=secret", "/v1/proxy/{path}"),
        ("/v1/gate?model=m", "/v1/gate"),
        ("/" + "x" * 1000, "/" + "x" * 255),
    ],
)
def test_paths(lines: Lines, asked: str, logged: str) -> None:
    """Paths come without their query, bounded, and behind a gate without the other service's."""
    small().get(asked)

    assert [line["path"] for line in lines] == [logged]


def test_the_id_is_in_every_line_of_a_request(lines: Lines) -> None:
    """Lines that a request causes carry its id, and the next request has another."""
    app = FastAPI()
    log: Callable[[str], None] = structlog.get_logger().info

    @app.get("/")
    async def answer() -> None:
        log("inside")

    app.add_middleware(RequestIdMiddleware)
    with TestClient(app) as asked:
        ids = [asked.get("/").headers["x-request-id"] for _ in range(2)]

    assert [line["request_id"] for line in lines] == ids
    assert len(set(ids)) == 2


def test_scored_images(lines: Lines, client: TestClient) -> None:
    """A line of the service tells version, images and findings, and never a file's name."""
    files = [("file", ("private.jpg", jpeg(1))), ("file", ("private.txt", b"no image"))]
    headers = {"x-api-key": "secret"}
    lines.clear()

    verdicts = [
        one["verdict"]
        for one in client.post("/v1/score", files=files, headers=headers).json()["results"]
    ]
    client.post("/v1/gate/private", content=jpeg(1), headers=headers)
    client.post("/v1/score", content=b"no image")

    scored, gated, refused = [line for line in lines if line["event"] == "request"]
    assert scored["model"] == "cifar10-resnet18"
    assert scored["version"] == 1
    assert (scored["images"], scored["failed"]) == (2, 1)
    assert scored["ood"] == verdicts.count("ood")
    assert gated["images"] == 1
    assert gated["path"] == "/v1/gate/{path}"
    assert (refused["status"], refused["reason"]) == (415, "unsupported")
    assert not any(word in str(lines) for word in ("private", "secret"))


def test_the_id_of_a_bug(lines: Lines) -> None:
    """Even the answer to a bug carries the request's id, and so does its line."""
    app = FastAPI()

    @app.get("/")
    async def fail() -> None:
        raise RuntimeError("a bug")

    problems.install(app, Metrics())
    app.add_middleware(AccessLogMiddleware, sample=0)
    app.add_middleware(RequestIdMiddleware)
    with TestClient(app, raise_server_exceptions=False) as asked:
        answer = asked.get("/", headers={"x-request-id": "abc"})

    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "abc"
    assert [(line["status"], line["request_id"]) for line in lines] == [(500, "abc")]
