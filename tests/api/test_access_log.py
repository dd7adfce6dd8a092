"""The access log: which requests are logged, and what their lines tell."""

import random
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient
from structlog.testing import LogCapture

from app.api.access_log import AccessLogMiddleware, describe
from app.api.request_id import RequestIdMiddleware

Lines = list[MutableMapping[str, Any]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The log lines of a test, as dictionaries."""
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    yield capture.entries
    structlog.configure(**before)


def client(sample: float = 1) -> TestClient:
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

    @app.get("/gate/{path:path}")
    async def gate() -> None:
        pass

    @app.get("/livez")
    @app.get("/readyz")
    @app.get("/metrics")
    async def probe() -> None:
        pass

    app.add_middleware(AccessLogMiddleware, sample=sample)
    app.add_middleware(RequestIdMiddleware)
    return TestClient(app, raise_server_exceptions=False)


def test_a_line(lines: Lines) -> None:
    """A line has the request's id, path, status, sizes and what the route told; no query."""
    client().post("/described?key=secret", content=b"12345", headers={"x-request-id": "abc"})

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


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_probes(lines: Lines, path: str) -> None:
    """What machines ask every few seconds is logged at DEBUG."""
    client().get(path)

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
    client(sample=0).get(path)

    assert [line["status"] for line in lines] == logged


def test_sampling(lines: Lines) -> None:
    """About the given share of the requests is logged."""
    random.seed(1)
    asked = client(sample=0.25)

    for _ in range(400):
        asked.get("/status/200")

    # The binomial's mean and four standard deviations.
    assert len(lines) == pytest.approx(100, abs=4 * 8.66)


@pytest.mark.parametrize(
    ("asked", "logged"),
    [
        ("/status/204", "/status/204"),
        ("/nowhere/at/all?key=secret", "/nowhere/at/all"),
        ("/gate/customers/7/cat.jpg", "/gate/{path:path}"),
        ("/" + "x" * 1000, "/" + "x" * 255),
    ],
)
def test_paths(lines: Lines, asked: str, logged: str) -> None:
    """Paths come without their query, bounded, and as a template behind a gate."""
    client().get(asked)

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
