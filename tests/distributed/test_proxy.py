"""What Ray Serve's proxy answers by itself, as a client sees it."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from app.distributed.proxy import ProxyAnswers, middlewares


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """A proxy whose replica died: it returns without an answer."""


def answering(status: int, headers: dict[str, str]) -> TestClient:
    """A client of a proxy that passes this answer on, under any path."""
    response = PlainTextResponse("as it is", status, headers)
    app = Starlette(routes=[Route("/{path:path}", response, methods=["GET", "POST"])])
    return TestClient(ProxyAnswers(app))


def test_a_lost_replica() -> None:
    """A request without an answer may be asked again in a second, says a problem document."""
    response = TestClient(ProxyAnswers(silent)).post("/v1/score", headers={"X-Request-ID": "one"})

    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"] == response.json()["request_id"] == "one"


def test_a_lost_replica_under_v2() -> None:
    """The protocol's clients read another kind of error."""
    response = TestClient(ProxyAnswers(silent)).post("/v2/models/tiny/infer")

    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert list(response.json()) == ["error"]


@pytest.mark.parametrize("prefix", ["", "/ood"])
def test_what_was_forwarded_is_not_asked_again(prefix: str) -> None:
    """Nobody knows whether a lost request reached the operator's classifier: no word of a retry."""
    client = TestClient(ProxyAnswers(silent), root_path=prefix)

    with pytest.raises(AssertionError):  # the test client's word for no answer
        client.post(f"{prefix}/v1/proxy/predict")


@pytest.mark.parametrize(
    ("status", "headers", "retry_after"),
    [(503, {}, "1"), (503, {"Retry-After": "7"}, "7"), (200, {}, None), (500, {}, None)],
)
def test_when_to_come_back(status: int, headers: dict[str, str], retry_after: str | None) -> None:
    """A 503 that does not say when to come back says so now; all else is passed on."""
    response = answering(status, headers).get("/v1/models")

    assert (response.status_code, response.text) == (status, "as it is")
    assert response.headers.get("retry-after") == retry_after


def test_one_request_id() -> None:
    """The replica's own id stays, and the proxy's goes."""

    async def twice(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"x-request-id", b"own"), (b"x-request-id", b"other")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    response = TestClient(ProxyAnswers(twice)).get("/")

    assert response.headers.get_list("x-request-id") == ["own"]


def test_what_the_proxies_are_given() -> None:
    """One middleware, without options."""
    [given] = middlewares()

    assert repr(given) == repr(Middleware(ProxyAnswers))
