"""Keys and the admin token: who may ask, who may change what is loaded, and what changes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from app.store import Store
from tests.api.conftest import wait_until_ready
from tests.pictures import jpeg
from tests.versions import DAMAGES, add_version

TOKEN, KEY = "the-token", "a-key"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def model(tiny_store: Store, tmp_path: Path) -> Path:
    """The folder of ``tiny``, with version 1, in a store of its own."""
    shutil.copytree(tiny_store.root, tmp_path / "store")
    return tmp_path / "store" / "tiny"


@contextmanager
def application(store: Path, **settings: Any) -> Iterator[TestClient]:
    """A ready application over ``store``."""
    app = create_app(Settings.read({"model_store": store, **settings}))
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_until_ready(client)
        yield client


@pytest.fixture
def admin(model: Path) -> Iterator[TestClient]:
    """A client that shows the admin token."""
    with application(model.parent, admin_token=TOKEN) as client:
        client.headers.update(ADMIN)
        yield client


CHANGES = [
    ("POST", "/v1/models/refresh"),
    ("POST", "/v1/models/tiny/versions/1/activate"),
    ("POST", "/v1/models/tiny/versions/1/shadow"),
    ("DELETE", "/v1/models/tiny/shadow"),
]


@pytest.mark.parametrize(("method", "url"), CHANGES)
def test_without_a_token_there_is_no_administration(model: Path, method: str, url: str) -> None:
    """Where no token is set, the routes do not exist, whatever is shown."""
    with application(model.parent) as client:
        assert client.request(method, url, headers=ADMIN).status_code in (404, 405)
        assert url.replace("tiny", "{name}") not in client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize(("method", "url"), CHANGES)
def test_administration_needs_the_token(model: Path, method: str, url: str) -> None:
    """No credentials are a 401, wrong ones a 403; an API key is not enough."""
    with application(model.parent, admin_token=TOKEN, api_keys=f'["{KEY}"]') as client:
        anonymous = client.request(method, url)
        assert anonymous.status_code == 401
        assert anonymous.headers["www-authenticate"] == "Bearer"
        for headers in ({"X-API-Key": KEY}, {"Authorization": "Bearer the-toke"}):
            assert client.request(method, url, headers=headers).status_code == 403
        assert client.request(method, url, headers={"X-API-Key": TOKEN}).status_code in (200, 409)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"X-API-Key": "another"}, 401),
        ({"Authorization": "Basic YS1rZXk6"}, 401),
        ({"X-API-Key": KEY}, 200),
        ({"Authorization": f"bearer {KEY}"}, 200),
        (ADMIN, 200),
        ({"X-API-Key": KEY, "Authorization": "Bearer somebody-else's"}, 200),
    ],
)
def test_api_keys(model: Path, headers: dict[str, str], status: int) -> None:
    """With keys set, scoring and the models ask for one, in either header; probes do not."""
    with application(model.parent, admin_token=TOKEN, api_keys=f'["x", "{KEY}"]') as client:
        assert client.post("/v1/score", content=jpeg(1), headers=headers).status_code == status
        assert client.get("/v1/models", headers=headers).status_code == status
        for open_to_all in ("/livez", "/readyz", "/metrics"):
            assert client.get(open_to_all).status_code == 200


def test_activation_over_http(admin: TestClient, model: Path) -> None:
    """The answer is the model's new state, and the next score comes from it."""
    add_version(model, 2)

    activated = admin.post("/v1/models/tiny/versions/2/activate")

    assert activated.status_code == 200
    assert activated.json() == admin.get("/v1/models/tiny").json()
    assert activated.json()["active_version"] == 2
    assert admin.post("/v1/score", content=jpeg(1)).json()["version"] == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_failed_activation_over_http(admin: TestClient, model: Path, damage: str) -> None:
    """409 with the reason; the old version answers, and the broken one shows why."""
    spoil, word = DAMAGES[damage]
    spoil(add_version(model, 2))

    refused = admin.post("/v1/models/tiny/versions/2/activate")

    assert refused.status_code == 409
    assert word in refused.json()["detail"]
    assert admin.post("/v1/score", content=jpeg(1)).json()["version"] == 1


def test_unknown_versions(admin: TestClient) -> None:
    """What the store does not have cannot be activated or look on."""
    for action in ("activate", "shadow"):
        assert admin.post(f"/v1/models/tiny/versions/9/{action}").status_code == 404
        assert admin.post(f"/v1/models/other/versions/1/{action}").status_code == 404


def test_refresh_over_http(admin: TestClient, model: Path) -> None:
    """A refresh tells what it found and what became of it."""
    assert admin.post("/v1/models/refresh").json() == {"versions": []}
    add_version(model, 2)
    DAMAGES["wrong hash"][0](add_version(model, 3))

    [found] = admin.post("/v1/models/refresh").json()["versions"]

    assert (found["name"], found["version"], found["state"]) == ("tiny", 3, "failed")
    assert "sha256" in found["reason"]


def test_a_stored_version_can_be_looked_at(admin: TestClient, model: Path) -> None:
    """The evidence of a version that is not loaded can be read before it is activated."""
    add_version(model, 2)

    stored = admin.get("/v1/models/tiny/versions/2").json()

    assert (stored["state"], stored["is_active"]) == ("stored", False)
    assert stored["bundle"]["version"] == 2


def test_a_shadow_over_http(admin: TestClient, model: Path) -> None:
    """The share defaults to the setting; the active version cannot be its own shadow."""
    add_version(model, 2)

    started = admin.post("/v1/models/tiny/versions/2/shadow")
    assert started.json()["shadow"] == {"version": 2, "share": 0.1}
    assert admin.post("/v1/models/tiny/versions/1/shadow").status_code == 409
    assert admin.post("/v1/models/tiny/versions/2/shadow?share=0").status_code == 400
    assert admin.delete("/v1/models/tiny/shadow").json()["shadow"] is None


def test_the_docs_can_be_switched_off(model: Path) -> None:
    """Without docs neither the page nor the description is served."""
    with application(model.parent, docs="false") as client:
        assert client.get("/docs").status_code == 404
        assert client.get("/openapi.json").status_code == 404


def test_cross_origin_requests_are_off_by_default(model: Path) -> None:
    """Only origins that are listed are told that they may read the answer."""
    origin = {"Origin": "https://shop.example"}
    with application(model.parent) as client:
        assert "access-control-allow-origin" not in client.get("/livez", headers=origin).headers
    with application(model.parent, cors_origins='["https://shop.example"]') as client:
        answer = client.get("/livez", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        others = client.get("/livez", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in others.headers
