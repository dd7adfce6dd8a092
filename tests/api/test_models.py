"""``/v1/models``, the probes and the documentation."""

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.api.conftest import STORE, wait_until_ready
from tests.pictures import jpeg


def test_models(client: TestClient) -> None:
    """The list, the model and its version agree, and the version carries the evidence."""
    listed = client.get("/v1/models").json()
    assert listed["default"] == "cifar10-resnet18"
    assert listed["models"] == [client.get("/v1/models/cifar10-resnet18").json()]

    version = client.get("/v1/models/cifar10-resnet18/versions/1").json()
    assert version["is_active"] is True
    assert version["bundle"]["block"] == "layer4.0"
    assert version["bundle"]["threshold"]["alpha"] == 0.05


@pytest.mark.parametrize(
    "path", ["/v1/models/unknown", "/v1/models/cifar10-resnet18/versions/9", "/nowhere"]
)
def test_not_found(client: TestClient, path: str) -> None:
    """What is not there is a 404 problem."""
    response = client.get(path)

    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/score", "POST"),
        ("/v1/gate", "POST, PUT"),
        ("/v1/gate/classify", "POST, PUT"),
        ("/livez", "GET, HEAD"),
    ],
)
def test_method_not_allowed(client: TestClient, path: str, allowed: str) -> None:
    """A wrong method is a problem whose ``Allow`` header has every method of the path."""
    response = client.patch(path)

    assert response.status_code == 405
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["allow"] == allowed


def test_probes_before_and_after_loading() -> None:
    """Alive from the first moment; ready, and willing to score, only with its models loaded."""
    app = create_app(Settings(model_store=STORE))
    # Outside the context nothing has been started.
    unstarted = TestClient(app, raise_server_exceptions=False)
    assert unstarted.get("/livez").status_code == 200
    for response in (unstarted.get("/readyz"), unstarted.post("/v1/score", content=jpeg(1))):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1

    with TestClient(app) as client:
        wait_until_ready(client)
        assert client.post("/v1/score", content=jpeg(1)).status_code == 200


def test_docs(client: TestClient) -> None:
    """The interactive documentation is served."""
    assert client.get("/docs").status_code == 200
