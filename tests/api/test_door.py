"""The door: what cannot be let in is told so at once, and nothing else is touched."""

import math
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Receive, Scope, Send

from app.api.door import ASKED, Door
from app.errors import QueueFullError
from app.serving.metrics import Metrics
from app.settings import Settings

ROUTES = ("/v1/score", "/v1/gate/any", "/v1/proxy/any", "/v2/models/m/infer", "/v1/other")


class FullService:
    """A service with no room, that remembers the deadlines it was asked about."""

    def __init__(self) -> None:
        self.deadlines: list[float] = []

    def check_room(self, *, deadline: float) -> None:
        """Refuse."""
        self.deadlines.append(deadline)
        raise QueueFullError("7 images wait", retry_after_s=3)


def make_door(**settings: Any) -> tuple[TestClient, FastAPI]:
    """A client at the door of an application whose routes answer 200, and the application."""
    app = FastAPI()
    for path in ROUTES:
        app.add_api_route(path, lambda: None, methods=["GET", "POST", "PUT"])
    app.state.service, app.state.metrics = FullService(), Metrics()
    app.state.settings = Settings.read(settings)
    return TestClient(Door(app)), app


@pytest.mark.parametrize("path", ROUTES[:4])
def test_no_room(path: str) -> None:
    """Images are turned away wherever they are posted to, with an id and a time to come back."""
    client, app = make_door()

    response = client.post(path, content=b"x", headers={"X-Request-ID": "mine"})

    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.headers["x-request-id"] == "mine"
    read = app.state.metrics.registry.get_sample_value
    assert read("normgate_rejected_total", {"reason": "queue_full"}) == 1


def test_the_form_of_a_refusal() -> None:
    """Problem details, or what the Open Inference Protocol has for errors."""
    client, _ = make_door()

    problem = client.post("/v1/score", content=b"x")
    assert problem.headers["content-type"] == "application/problem+json"
    assert problem.json() == {
        "type": "https://www.rfc-editor.org/rfc/rfc9110#status.429",
        "title": "Too Many Requests",
        "status": 429,
        "detail": "7 images wait",
        "request_id": problem.headers["x-request-id"],
    }
    assert client.post("/v2/models/m/infer", content=b"x").json() == {"error": "7 images wait"}


def test_who_was_let_in_already() -> None:
    """A request whose connection has asked is not asked again."""
    _, app = make_door()
    door = Door(app)

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        scope["extensions"] = {ASKED: {}}
        await door(scope, receive, send)

    assert TestClient(asked).post("/v1/score", content=b"x").status_code == 200


def test_everything_else_passes() -> None:
    """Requests without an image never meet the door."""
    client, _ = make_door()

    assert client.get("/v1/score").status_code == 200
    assert client.post("/v1/other").status_code == 200


def test_the_deadline_of_the_request_counts() -> None:
    """The room asked for is room before the request's own deadline; a wrong one is not ours."""
    client, app = make_door()
    for deadline in ("1000", "60000"):
        client.post("/v1/score", headers={"X-Request-Deadline-Ms": deadline})

    early, late = app.state.service.deadlines
    assert math.isclose(late - early, 59, abs_tol=5)
    passed = client.post("/v1/score", headers={"X-Request-Deadline-Ms": "soon"})
    assert passed.status_code == 200


def test_an_open_gate_is_let_through() -> None:
    """Where images without a verdict pass, only the gate's own route knows how."""
    client, _ = make_door(gate_on_failure="open")

    assert client.post("/v1/gate/any").status_code == 200
    assert client.post("/v1/proxy/any").status_code == 200
    assert client.post("/v1/score").status_code == 429


def test_scripts_of_other_origins_are_let_through() -> None:
    """They could not read the refusal: it would lack the headers that allow it."""
    client, _ = make_door(cors_origins='["https://shop.example"]')

    headers = {"Origin": "https://shop.example"}
    assert client.post("/v1/score", headers=headers).status_code == 200
    assert client.post("/v1/score").status_code == 429
