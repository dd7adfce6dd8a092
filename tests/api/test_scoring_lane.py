"""The scoring lane answers as the router does, and leaves it what is not its own."""

import asyncio
import gc
import weakref

import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from app.api.auth import ApiKeyRequired
from app.api.disconnect import DEPARTURE
from app.api.scoring_lane import ScoringLane, ScoringRoute
from app.errors import NotReadyError, ServingError
from app.main import create_app
from app.settings import Settings
from tests.api.conftest import STORE
from tests.pictures import jpeg

JPEG = jpeg(1)


def _answer(
    client: TestClient, method: str, path: str, content: bytes, content_type: str
) -> tuple[int, dict[str, str], str]:
    """All of an answer but its request's id."""
    headers = {"Content-Type": content_type}
    answer = client.request(method, path, content=content, headers=headers)
    found = dict(answer.headers)
    return answer.status_code, found, answer.text.replace(found.pop("x-request-id"), "")


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("POST", "/v1/score", "?top_k=1"),
        ("POST", "/v1/gate", "?model=cifar10-resnet18"),
        ("PUT", "/v1/gate", "?model=cifar10-resnet18"),
        ("POST", "/v1/gate/cats/7", "?colour=red"),
        ("PUT", "/v1/gate/a%2Fb/c%20d", "?colour=red"),
    ],
)
@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (JPEG, "image/jpeg"),
        (JPEG[:200], "image/jpeg"),
        (b"", "image/jpeg"),
        (JPEG, "text/plain"),
        (JPEG, "multipart/form-data; boundary=x"),
        (bytes(1_000_001), "image/jpeg"),
    ],
    ids=["good", "truncated", "empty", "type", "form", "large"],
)
def test_with_and_without_a_query(
    client: TestClient, method: str, path: str, query: str, content: bytes, content_type: str
) -> None:
    """A query that says what is so by default changes nothing of the answer, good or bad."""
    by_router = _answer(client, method, path + query, content, content_type)

    by_lane = _answer(client, method, path, content, content_type)

    assert by_lane == by_router


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/v1/score", 405),
        ("GET", "/v1/score", 405),
        ("GET", "/v1/gate/cats/7", 405),
    ],
)
def test_what_is_not_the_lanes(client: TestClient, method: str, path: str, status: int) -> None:
    """Other methods and paths are the router's to refuse."""
    assert client.request(method, path, content=JPEG).status_code == status


def test_a_missing_key() -> None:
    """Who shows no key is refused in the lane as by the router."""
    app = create_app(Settings(model_store=STORE, api_keys=["a-key-of-some-length"]))
    with TestClient(app) as client:
        answers = [
            _answer(client, "POST", path, JPEG, "image/jpeg")
            for path in ("/v1/score", "/v1/score?top_k=1")
        ]

    assert answers[0] == answers[1]
    assert answers[0][0] == 401


class _Held:
    """Something that a frame holds."""


def _application(held: list[weakref.ref[_Held]] | None = None) -> FastAPI:
    router = APIRouter(dependencies=ApiKeyRequired, route_class=ScoringRoute)

    @router.post("/score/{name}")
    async def score(request: Request, name: str, times: int = 1) -> Response:
        if name == "bug":
            raise RuntimeError("a bug")
        if name == "busy":
            kept, errors = _Held(), [NotReadyError("the models are loading")]
            if held is not None:
                held.append(weakref.ref(kept))
            # From a list in the frame, so that frame and error hold each other.
            raise errors[0]
        return Response(name * times, headers={"route": request.scope["route"].path_format})

    async def on_error(request: Request, error: Exception) -> Response:
        return Response(str(error), 503)

    app = FastAPI()
    app.state.settings = Settings()
    app.add_middleware(ScoringLane, routers=[router])
    app.add_exception_handler(ServingError, on_error)
    app.include_router(router)
    return app


def test_the_router_is_passed_by() -> None:
    """What has no query never reaches what is behind the lane; what has one does."""
    router = APIRouter(dependencies=ApiKeyRequired, route_class=ScoringRoute)
    router.add_api_route("/score", _nothing, methods=["POST"])
    behind = FastAPI()
    behind.state.settings = Settings()

    async def lane(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = behind
        await ScoringLane(behind, routers=[router])(scope, receive, send)

    client = TestClient(lane)
    assert client.post("/score").status_code == 204
    assert client.post("/score?times=1").status_code == 404


async def _nothing(request: Request) -> Response:
    return Response(status_code=204)


def test_paths_with_parameters() -> None:
    """The endpoint is given the parameters of the path, and its route can be looked up."""
    answer = TestClient(_application()).post("/score/one")

    assert (answer.text, answer.headers["route"]) == ("one", "/score/{name}")


def test_a_query_goes_to_the_router() -> None:
    """A query's parameters are parsed and checked as by any other route."""
    client = TestClient(_application())

    assert client.post("/score/one?times=2").text == "oneone"
    assert client.post("/score/one?times=x").status_code == 422


def test_errors_reach_their_handler() -> None:
    """A domain error is told by the handler of its class or of one above it."""
    answer = TestClient(_application()).post("/score/busy")

    assert (answer.status_code, answer.text) == (503, "the models are loading")


def test_errors_hold_nothing() -> None:
    """What the frames of a refused request hold is let go at once: uploads may be large."""
    held: list[weakref.ref[_Held]] = []
    client = TestClient(_application(held))
    gc.disable()
    try:
        client.post("/score/busy")
        assert [one() for one in held] == [None]
    finally:
        gc.enable()


def test_bugs_go_on() -> None:
    """What nobody handles goes on to the server, which logs it and answers 500."""
    with pytest.raises(RuntimeError, match="a bug"):
        TestClient(_application()).post("/score/bug")


def test_an_unknown_dependency_is_refused() -> None:
    """A scoring route whose dependencies would not be resolved is a mistake of its author."""
    router = APIRouter(route_class=ScoringRoute)
    router.add_api_route("/score", lambda: None)

    with pytest.raises(AssertionError, match="would not be resolved"):
        ScoringLane(FastAPI(), routers=[router])


def test_an_unknown_convertor_is_refused() -> None:
    """So is one whose path has parameters that are no text."""
    router = APIRouter(dependencies=ApiKeyRequired, route_class=ScoringRoute)
    router.add_api_route("/score/{number:int}", lambda number: None)

    with pytest.raises(AssertionError, match="would not be converted"):
        ScoringLane(FastAPI(), routers=[router])


_PHOTOGRAPH = jpeg(1, height=72, width=72)
_BOUNDARY = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
_FORM = b"\r\n".join([_BOUNDARY + _PHOTOGRAPH, _BOUNDARY + _PHOTOGRAPH[:-50], b"--x--\r\n"])


@pytest.mark.parametrize(
    ("body", "content_type", "deadline_ms", "status"),
    [
        (JPEG, "image/jpeg", "9000", 200),
        (_PHOTOGRAPH, "image/jpeg", "9000", 200),
        (JPEG[:-50], "image/jpeg", "9000", 422),
        (_PHOTOGRAPH[:-50], "image/jpeg", "9000", 422),
        (_FORM, "multipart/form-data; boundary=x", "9000", 200),
        (_PHOTOGRAPH, "image/jpeg", "0.001", 504),
    ],
    ids=["tiny", "photograph", "broken", "broken photograph", "form", "late"],
)
def test_a_request_leaves_no_cycles(
    body: bytes, content_type: str, deadline_ms: str, status: int
) -> None:
    """Garbage is looked for rarely: what a request leaves must go with its last reference."""
    app = create_app(Settings(model_store=STORE))
    statuses: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def ask() -> None:
        headers = {"content-type": content_type, "x-request-deadline-ms": deadline_ms}
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/score",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "state": {},
            "extensions": {DEPARTURE: lambda on_departure: None},
        }
        await asyncio.create_task(app(scope, receive, send))

    async def scenario() -> None:
        async with app.router.lifespan_context(app), asyncio.timeout(60):
            while not app.state.service._is_loaded:  # noqa: ASYNC110 - another thread's work
                await asyncio.sleep(0.01)
            for _ in range(2):
                await ask()
            gc.collect()
            for _ in range(100):
                await ask()
            assert gc.collect() < 100, "fewer objects than requests"

    gc.disable()
    try:
        asyncio.run(scenario())
    finally:
        gc.enable()
    assert statuses == [status] * 102
