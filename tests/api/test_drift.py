"""``/v1/models/{name}/drift``: what was scored, by whichever route, and a new beginning."""

import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from app.store import Store
from tests.api.conftest import wait_until_ready
from tests.pictures import jpeg
from tests.versions import add_version

ADMIN = {"Authorization": "Bearer the-token"}
DRIFT = "/v1/models/tiny/drift"


@pytest.fixture
def model(tiny_store: Store, tmp_path: Path) -> Path:
    """The folder of ``tiny``, with version 1, in a store of its own."""
    shutil.copytree(tiny_store.root, tmp_path / "store")
    return tmp_path / "store" / "tiny"


@pytest.fixture
def admin(model: Path) -> Iterator[TestClient]:
    """A client that shows the admin token."""
    settings = {"model_store": model.parent, "admin_token": "the-token", "shadow_share": 1}
    app = create_app(Settings.read(settings))
    with TestClient(app, headers=ADMIN) as client:
        wait_until_ready(client)
        yield client


def drift(client: TestClient, query: str = "") -> dict[str, Any]:
    """The report."""
    found: dict[str, Any] = client.get(DRIFT + query).json()
    return found


def drift_series(client: TestClient) -> set[str]:
    """The versions that have drift gauges."""
    return {
        line.split('version="')[1].split('"')[0]
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("normgate_drift_alarm{")
    }


def test_the_report(admin: TestClient, model: Path) -> None:
    """Before the first image the rates are null, and the calibration is there to be drawn."""
    threshold = json.loads((model / "1" / "bundle.json").read_text())["threshold"]

    found = drift(admin)

    assert (found["model"], found["version"], found["images"]) == ("tiny", 1, 0)
    assert (found["alpha"], found["threshold"]) == (threshold["alpha"], threshold["value"])
    assert found["score"] == "feature_norm"
    assert datetime.fromisoformat(found["since"]).utcoffset() is not None
    assert [(one["window"], one["seconds"]) for one in found["windows"]] == [
        ("5m", 300),
        ("1h", 3_600),
        ("1d", 86_400),
    ]
    assert all(one["rate"] is None and one["confidence"] == 0.95 for one in found["windows"])
    assert found["martingale"] == {
        "log10": 0,
        "max_log10": 0,
        "alarm": False,
        "alarmed_at": None,
        "false_alarm_bound": 0.01,
    }
    assert (found["ks_distance"], found["psi"]) == (None, None)
    histogram = found["histogram"]
    assert len(histogram["edges"]) == len(histogram["live"]) + 1
    assert sum(histogram["calibration"]) == pytest.approx(1)


def test_every_scored_image_counts(admin: TestClient) -> None:
    """Images of the score route and of the gate count, and what has no verdict does not."""
    verdict = admin.post("/v1/score", content=jpeg(1)).json()["results"][0]["verdict"]
    gate = admin.post("/v1/gate", content=jpeg(2))
    admin.post("/v1/score", content=b"no image")

    found = drift(admin)

    ood = (verdict == "ood") + (gate.status_code == 403)
    assert found["images"] == 2
    assert [(one["images"], one["ood"]) for one in found["windows"]] == [(2, ood)] * 3
    assert found["windows"][0]["rate"] == ood / 2
    assert sum(found["histogram"]["live"]) == 2
    assert found["ks_distance"] > 0


def test_reset(admin: TestClient) -> None:
    """The test begins anew; the windows go on."""
    admin.post("/v1/score", content=jpeg(1))

    answer = admin.post(f"{DRIFT}/reset")

    assert answer.status_code == 200
    assert (answer.json()["images"], answer.json()["martingale"]["max_log10"]) == (0, 0)
    assert answer.json()["windows"][0]["images"] == 1
    assert drift(admin)["images"] == 0


def test_the_reset_is_the_admins(admin: TestClient) -> None:
    """Without the token the test goes on."""
    admin.headers.pop("Authorization")

    assert admin.post(f"{DRIFT}/reset").status_code == 401


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("/v1/models/other/drift", 404),
        (f"{DRIFT}?version=9", 404),
        (f"{DRIFT}?version=0", 400),
        (f"{DRIFT}?version=x", 400),
    ],
)
def test_unknown_versions(admin: TestClient, url: str, status: int) -> None:
    """What is not loaded is a 404, what is no version a 400; for the reset too."""
    reset = url.replace("/drift", "/drift/reset")

    for answer in (admin.get(url), admin.post(reset)):
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_shadow_has_its_own(admin: TestClient, model: Path) -> None:
    """A shadow's drift is found under its version, and its series end with it."""
    add_version(model, 2)
    admin.post("/v1/models/tiny/versions/2/shadow?share=1")
    admin.post("/v1/score", content=jpeg(1))
    for _ in range(1_000):
        if drift(admin, "?version=2")["images"]:
            break

    assert drift(admin, "?version=2")["images"] == 1
    assert drift(admin)["version"] == 1
    assert drift_series(admin) == {"1", "2"}

    admin.delete("/v1/models/tiny/shadow")

    assert drift_series(admin) == {"1"}
    assert admin.get(f"{DRIFT}?version=2").status_code == 404


def test_an_activation_begins_anew(admin: TestClient, model: Path) -> None:
    """The version that answers now has seen no image; the one let go has no series."""
    admin.post("/v1/score", content=jpeg(1))
    add_version(model, 2)
    admin.post("/v1/models/tiny/versions/2/activate")

    assert (drift(admin)["version"], drift(admin)["images"]) == (2, 0)
    assert drift_series(admin) == {"2"}
