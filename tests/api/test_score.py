"""``POST /v1/score``: the answer's form, and one fitting status for each bad request."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from app.core.images import load
from app.core.networks import CIFAR_PREPROCESSING
from app.main import create_app
from app.offline.calibrate import CalibrationOptions, calibrate
from app.serving import service
from app.serving.worker import Worker
from app.settings import Settings
from app.store import Store
from tests.api.conftest import STORE, wait_until_ready
from tests.conftest import silent
from tests.pictures import encoded, huge_png_header, jpeg

FORM_ERRORS: Mapping[str, str] = {
    "truncated": "multipart/form-data; boundary=x",
    "no boundary": "multipart/form-data",
}


def test_raw_image(client: TestClient) -> None:
    """A raw body is one image; its score is the one computed offline."""
    data = jpeg(1)
    loaded = Store(STORE).load("cifar10-resnet18")
    offline = loaded.detector().detect(load(data, loaded.bundle.preprocessing)[None])

    response = client.post("/v1/score?top_k=3", content=data)

    assert response.status_code == 200
    body = response.json()
    assert (body["model"], body["version"]) == ("cifar10-resnet18", 1)
    [result] = body["results"]
    assert result["score"] == pytest.approx(float(offline.scores[0]), rel=1e-5)
    assert result["feature_norm"] == result["score"]
    assert result["threshold"] == loaded.bundle.threshold.value
    assert result["p_value"] == pytest.approx(float(offline.p_values[0]))
    assert result["verdict"] == ("ood" if offline.is_ood[0] else "id")
    assert result["error"] is None
    assert [one["index"] for one in result["predictions"]] == (
        offline.logits[0].argsort()[::-1][:3].tolist()
    )


def test_form_with_several_images(client: TestClient) -> None:
    """Each ``file`` part has its result, in order; a broken one carries its own error."""
    parts = [
        ("file", ("a.jpg", jpeg(1))),
        ("file", ("b.txt", b"no image")),
        ("file", ("c.png", encoded(2, "PNG"))),
    ]

    response = client.post("/v1/score", files=parts)

    assert response.status_code == 200
    first, broken, last = response.json()["results"]
    assert [one["filename"] for one in (first, broken, last)] == ["a.jpg", "b.txt", "c.png"]
    assert first["verdict"] in ("id", "ood")
    assert last["verdict"] in ("id", "ood")
    assert broken["verdict"] is None
    assert "not an image" in broken["error"]


@pytest.mark.parametrize("content_type", ["image/jpeg", "image/png", "application/octet-stream"])
def test_content_types(client: TestClient, content_type: str) -> None:
    """The bytes, not the declared type, say which format an image has."""
    response = client.post("/v1/score", content=jpeg(1), headers={"content-type": content_type})

    assert response.status_code == 200


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        pytest.param(b"", {}, 400, "empty", id="nothing"),
        pytest.param(b"hello", {}, 415, "accepted formats: JPEG", id="text"),
        pytest.param(jpeg(1)[:300], {}, 422, "truncated", id="half a JPEG"),
        pytest.param(huge_png_header(30_000), {}, 422, "30000x30000", id="900 megapixels"),
        pytest.param(b"x" * 1_000_001, {}, 413, "1000000", id="too many bytes"),
        pytest.param(
            b"{}", {"content-type": "application/json"}, 415, "application/json", id="json"
        ),
        pytest.param(
            b"junk", {"content-type": FORM_ERRORS["truncated"]}, 400, "multipart", id="no form"
        ),
        pytest.param(
            b"junk", {"content-type": FORM_ERRORS["no boundary"]}, 400, "boundary", id="no boundary"
        ),
    ],
)
def test_problems(
    client: TestClient, content: bytes, headers: Mapping[str, str], status: int, words: str
) -> None:
    """A request that cannot be scored is answered with problem details that name the reason."""
    response = client.post("/v1/score", content=content, headers=dict(headers))

    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert set(body) == {"type", "title", "status", "detail", "request_id"}
    assert body["status"] == status
    assert words in body["detail"]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("model=unknown", 404),
        ("version=7", 404),
        ("version=zero", 400),
        ("top_k=-1", 400),
    ],
)
def test_wrong_queries(client: TestClient, query: str, status: int) -> None:
    """A query that names nothing loaded is a 404, one out of bounds a 400."""
    response = client.post(f"/v1/score?{query}", content=jpeg(1))

    assert response.status_code == status


def test_form_without_files(client: TestClient) -> None:
    """A form must have a file part called ``file``."""
    assert client.post("/v1/score", files={"other": b"x"}).status_code == 400
    assert client.post("/v1/score", data={"file": "text"}, files={"a": b"x"}).status_code == 400


@pytest.mark.parametrize(
    ("offered", "is_kept"), [("abc-123", True), ("x" * 129, False), ("a b", False)]
)
def test_request_ids(client: TestClient, offered: str, is_kept: bool) -> None:
    """A sane ``X-Request-ID`` is echoed, in the header and in the body; others are replaced."""
    response = client.post("/v1/score", content=jpeg(1), headers={"x-request-id": offered})

    request_id = response.json()["request_id"]
    assert response.headers["x-request-id"] == request_id
    assert (request_id == offered) is is_kept


def test_images_are_counted(client: TestClient) -> None:
    """A scored image moves its verdict's counter and every stage; a refused one its reason."""
    before = client.get("/metrics").text
    client.post("/v1/score", content=jpeg(1))
    client.post("/v1/score", content=b"hello")
    after = client.get("/metrics").text

    def moved(start: str) -> float:
        def total(text: str) -> float:
            lines = [line for line in text.splitlines() if line.startswith(start)]
            return sum(float(line.rpartition(" ")[2]) for line in lines)

        return total(after) - total(before)

    assert moved("normgate_images_total") == 1
    assert moved('normgate_rejected_total{reason="unsupported"}') == 1
    for stage in ("read", "decode", "queue", "forward", "total"):
        assert moved(f'normgate_stage_seconds_count{{stage="{stage}"}}') >= 1


def test_logits_that_are_no_numbers() -> None:
    """An image whose score is a number and whose logits are not is an error of the server."""
    app = create_app(Settings(model_store=STORE, engine="torch"))
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_until_ready(client)
        network = app.state.service.model().detectors["cpu"].network
        network.get_parameter("fc.bias").data[3] = float("inf")

        answer = client.post("/v1/score", content=jpeg(1))

        assert answer.status_code == 500
        assert answer.json()["detail"] == "the server failed on this request"


def test_openapi_describes_the_bodies(client: TestClient) -> None:
    """The description offers a form, a raw image and every documented problem."""
    operation = client.get("/openapi.json").json()["paths"]["/v1/score"]["post"]

    assert set(operation["requestBody"]["content"]) == {
        "multipart/form-data",
        "image/*",
        "application/octet-stream",
    }
    assert {"200", "400", "404", "413", "415", "422", "429", "503", "504"} <= set(
        operation["responses"]
    )


def test_a_bundle_with_a_scaled_decode(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """Over HTTP large JPEGs get the scores that they have offline and had in calibration."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    files = {f"{seed:02}.jpg": jpeg(seed, height=200, width=264) for seed in range(24)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    scaled = CIFAR_PREPROCESSING.model_copy(update={"scaled_decode": True})
    options = replace(tiny_options, threshold_images=folder, preprocessing=scaled)
    store = Store(tmp_path / "store")
    calibrate(options, store, progress=silent)
    loaded = store.load("tiny")
    images = [load(data, loaded.bundle.preprocessing) for data in files.values()]
    whole = torch.stack([load(data, CIFAR_PREPROCESSING) for data in files.values()])
    detector = loaded.detector()
    offline = [float(detector.detect(image[None]).scores[0]) for image in images]

    with TestClient(create_app(Settings(model_store=store.root))) as client:
        wait_until_ready(client)
        answers = [client.post("/v1/score", content=data).json() for data in files.values()]

    served = [answer["results"][0]["score"] for answer in answers]
    assert served == pytest.approx(offline, rel=1e-5)
    assert sorted(served) == pytest.approx(loaded.calibration_scores.tolist(), rel=1e-4)
    assert detector.detect(whole).scores.tolist() != pytest.approx(offline, rel=1e-4)


def test_uncertain_images(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """A bundle with a second level answers with the third verdict, on every route alike."""
    options = replace(tiny_options, name="unsure", alpha=0.2, abstain_alpha=0.8)
    store = Store(tmp_path)
    calibrate(options, store, progress=silent)
    loaded = store.load("unsure")
    files = [jpeg(seed) for seed in range(24)]
    offline = [
        loaded.detector().detect(load(data, loaded.bundle.preprocessing)[None]).verdicts[0]
        for data in files
    ]
    assert set(offline) == {"id", "uncertain", "ood"}

    with TestClient(create_app(Settings(model_store=tmp_path))) as client:
        wait_until_ready(client)
        scored = [client.post("/v1/score", content=data).json()["results"][0] for data in files]
        gated = [client.post("/v1/gate", content=data) for data in files]
        metrics = client.get("/metrics").text

    assert [one["verdict"] for one in scored] == offline
    assert [one.headers["x-normgate-verdict"] for one in gated] == offline
    assert {one.status_code for one in gated if one.headers["x-normgate-verdict"] != "ood"} == {200}
    counted = 'normgate_images_total{model="unsure",verdict="uncertain",version="1"}'
    assert f"{counted} {2.0 * offline.count('uncertain')}" in metrics


@pytest.mark.parametrize(("longest_s", "is_in_loop"), [(60.0, True), (0.0, False)])
def test_a_lone_tiny_image(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, longest_s: float, is_in_loop: bool
) -> None:
    """The event loop runs a short pass itself, and leaves a longer one to a worker."""
    threads: list[str] = []
    detect = Worker._detect

    def watched(worker: Worker, batch: Any) -> Any:
        threads.append(threading.current_thread().name)
        return detect(worker, batch)

    monkeypatch.setattr(Worker, "_detect", watched)
    monkeypatch.setattr(service, "_LONGEST_IN_LOOP_S", longest_s)
    threading.Event().wait(0.15)  # since the last one that had company

    answers = [client.post("/v1/score", content=jpeg(0)) for _ in range(2)]

    [first], [second] = (answer.json()["results"] for answer in answers)
    assert first == second
    assert [name.startswith("worker-") for name in threads] == [not is_in_loop] * 2
