"""``/v2`` without a client's help: errors, framing, limits and the description."""

import base64
import gzip
import json
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.api.tensors import OUTPUTS
from app.main import create_app
from app.serving.service import ScoringService
from app.settings import Settings
from tests.api.conftest import STORE, wait_until_ready
from tests.pictures import encoded, huge_png_header, jpeg

MODEL = "/v2/models/cifar10-resnet18"
INFER = f"{MODEL}/infer"


def request_for(*images: bytes, **members: Any) -> dict[str, Any]:
    """A JSON inference request."""
    data = [base64.b64encode(image).decode() for image in images]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": data}
    return {"inputs": [tensor], **members}


def binary_request_for(*images: bytes) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a binary inference request."""
    elements = b"".join(struct.pack("<I", len(image)) + image for image in images)
    tensor = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(images)],
        "parameters": {"binary_data_size": len(elements)},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + elements, {"Inference-Header-Content-Length": str(len(head))}


@pytest.fixture(scope="module")
def guarded() -> Iterator[TestClient]:
    """An application that asks for an API key, and has an admin."""
    settings = Settings(
        model_store=STORE, api_keys=["key"], admin_token="admin", max_upload_bytes=100_000
    )
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        wait_until_ready(client)
        yield client


@pytest.mark.parametrize("content_type", [None, "application/json", "text/plain", "multipart/x"])
def test_content_type_does_not_matter(client: TestClient, content_type: str | None) -> None:
    """The official client sends none, so none is read."""
    headers = {} if content_type is None else {"content-type": content_type}
    response = client.post(INFER, content=json.dumps(request_for(jpeg(1))), headers=headers)

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in response.headers
    assert [one["name"] for one in response.json()["outputs"]] == list(OUTPUTS)


def test_raw_binary_request(client: TestClient) -> None:
    """With a header length of 0 the body is the image; all outputs come back in binary."""
    plain = {"accept-encoding": "identity"}
    response = client.post(
        INFER, content=jpeg(1), headers={"Inference-Header-Content-Length": "0", **plain}
    )
    body, headers = binary_request_for(jpeg(1))
    as_json = client.post(INFER, content=body, headers=headers).json()

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/octet-stream"
    head = int(response.headers["inference-header-content-length"])
    [verdict, *others] = json.loads(response.content[:head])["outputs"]
    assert [verdict["name"], *(one["name"] for one in others)] == list(OUTPUTS)
    size = verdict["parameters"]["binary_data_size"]
    word = response.content[head + 4 : head + size].decode()
    assert word == as_json["outputs"][0]["data"][0]


def test_the_deflate_and_gzip_of_responses(client: TestClient) -> None:
    """The length of the JSON counts its plain bytes, whatever the coding."""
    bodies = {}
    for coding in ("identity", "gzip", "deflate"):
        headers = {"Inference-Header-Content-Length": "0", "accept-encoding": coding}
        with client.stream("POST", INFER, content=jpeg(1), headers=headers) as response:
            raw = b"".join(response.iter_raw())
        assert response.headers.get("content-encoding", "identity") == coding
        plain = gzip.decompress(raw) if coding == "gzip" else raw
        plain = zlib.decompress(raw) if coding == "deflate" else plain
        head = int(response.headers["inference-header-content-length"])
        assert json.loads(plain[:head])["model_name"] == "cifar10-resnet18"
        bodies[coding] = plain

    assert bodies["gzip"] == bodies["deflate"] == bodies["identity"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models", 404),
        ("GET", f"{MODEL}/trace/setting", 404),
        ("GET", "/v2/models/unknown", 404),
        ("GET", "/v2/models/unknown/ready", 404),
        ("GET", f"{MODEL}/versions/9", 404),
        ("GET", f"{MODEL}/versions/0/ready", 404),
        ("GET", f"{MODEL}/versions/latest/config", 400),
        ("GET", f"{MODEL}/versions/-1/stats", 400),
        ("GET", f"{MODEL}/versions/{'9' * 5000}", 400),
        ("POST", "/v2/models/unknown/infer", 404),
        ("POST", "/v2/repository/models/cifar10-resnet18/load", 404),
        ("POST", "/v2/repository/models/cifar10-resnet18/unload", 404),
        ("GET", INFER, 405),
        ("DELETE", "/v2", 405),
        ("GET", "/v2/repository/index", 405),
    ],
)
def test_errors_of_the_path(client: TestClient, method: str, path: str, status: int) -> None:
    """Every error is the one member ``error``, be it our own or the router's."""
    response = client.request(method, path, follow_redirects=False)

    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert response.headers["content-type"] == "application/json"
    assert "x-request-id" in response.headers
    assert ("allow" in response.headers) is (status == 405)


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        pytest.param(b"", {}, 400, "empty", id="nothing"),
        pytest.param(b"{", {}, 400, "body", id="no JSON"),
        pytest.param(request_for(b"hello"), {}, 415, "element 0 of 'image': ", id="no image"),
        pytest.param(request_for(jpeg(1), jpeg(2)[:300]), {}, 422, "element 1", id="half a JPEG"),
        pytest.param(request_for(huge_png_header(30_000)), {}, 422, "30000x30000", id="pixels"),
        pytest.param(b"x" * 1_000_001, {}, 413, "1000000", id="too many bytes"),
        pytest.param(
            gzip.compress(bytes(10_000_000)),
            {"content-encoding": "gzip"},
            413,
            "decompresses to more than 1000000",
            id="a bomb",
        ),
        pytest.param(b"no gzip", {"content-encoding": "gzip"}, 400, "not gzip", id="not gzip"),
        pytest.param(b"x", {"content-encoding": "br"}, 415, "gzip, deflate", id="brotli"),
        pytest.param(
            b"x" * 9,
            [("Inference-Header-Content-Length", "9")] * 2,
            400,
            "'9, 9'",
            id="two lengths",
        ),
        pytest.param(
            request_for(jpeg(1)), {"x-request-deadline-ms": "soon"}, 400, "'soon'", id="deadline"
        ),
    ],
)
def test_errors_of_a_request(
    client: TestClient, body: Any, headers: Any, status: int, words: str
) -> None:
    """A request that cannot be answered is told why, by its own status."""
    content = body if isinstance(body, bytes) else json.dumps(body)
    response = client.post(INFER, content=content, headers=headers)

    assert response.status_code == status
    assert words in response.json()["error"]
    assert list(response.json()) == ["error"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v2/repository/index", b"[]", 400),
        ("/v2/repository/index", b'{"ready": "yes"}', 400),
        ("/v2/repository/models/cifar10-resnet18/load", b"{", 400),
        ("/v2/repository/models/cifar10-resnet18/load", b'{"parameters": {"file:x": ""}}', 400),
        ("/v2/repository/models/cifar10-resnet18/unload", b'{"parameters": {"now": true}}', 400),
        ("/v2/repository/models/unknown/load", b"", 404),
        ("/v2/repository/models/..%2Fx/load", b"{}", 404),
        ("/v2/repository/models/unknown/unload", b"{}", 404),
        ("/v2/repository/index", bytes(100_001), 413),
    ],
)
def test_errors_of_the_repository(guarded: TestClient, path: str, body: bytes, status: int) -> None:
    """What is asked of the repository is read as strictly as an inference request."""
    response = guarded.post(path, content=body, headers={"authorization": "Bearer admin"})

    assert response.status_code == status
    assert list(response.json()) == ["error"]


@pytest.mark.parametrize("body", [b"", b"{}", b'{"ready": null}', b'{"ready": true}'])
def test_index(guarded: TestClient, body: bytes) -> None:
    """The versions in the store, with an empty body too."""
    response = guarded.post("/v2/repository/index", content=body, headers={"x-api-key": "key"})

    assert response.json() == [
        {"name": "cifar10-resnet18", "version": "1", "state": "READY", "reason": ""}
    ]


def test_keys(guarded: TestClient) -> None:
    """Everything asks for the API key but the probes; loading asks for the admin token."""
    assert guarded.get("/v2/health/live").status_code == 200
    assert guarded.get("/v2/health/ready").status_code == 200
    for path in ("/v2", MODEL, f"{MODEL}/ready", f"{MODEL}/stats", "/v2/models/stats"):
        refused = guarded.get(path)
        assert refused.status_code == 401
        assert list(refused.json()) == ["error"]
        assert refused.headers["www-authenticate"] == "Bearer"
        assert guarded.get(path, headers={"x-api-key": "key"}).status_code == 200
    load = "/v2/repository/models/cifar10-resnet18/load"
    assert guarded.post(load).status_code == 401
    assert guarded.post(load, headers={"x-api-key": "key"}).status_code == 403
    loaded = guarded.post(load, headers={"x-api-key": "admin"})
    assert (loaded.status_code, loaded.content) == (200, b"")


def test_before_the_models_are_loaded() -> None:
    """Alive and unready, with the time to come back in the header."""
    app = create_app(Settings(model_store=STORE))
    # Outside the context nothing has been started.
    client = TestClient(app, raise_server_exceptions=False)

    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/models/stats").json() == {"model_stats": []}
    for response in (
        client.get("/v2/health/ready"),
        client.get(f"{MODEL}/ready"),
        client.post(INFER, content=json.dumps(request_for(jpeg(1)))),
    ):
        assert response.status_code == 503
        assert list(response.json()) == ["error"]
        assert int(response.headers["retry-after"]) >= 1


def test_a_full_queue() -> None:
    """429 with the time to come back, in the protocol's own form."""
    app = create_app(Settings(model_store=STORE, max_inflight_bytes=460_000_000, max_pixels=10**7))
    service: ScoringService = app.state.service
    with TestClient(app) as client:
        wait_until_ready(client)
        with service.budget.held(460_000_000):
            response = client.post(INFER, content=json.dumps(request_for(jpeg(1))))

    assert response.status_code == 429
    assert list(response.json()) == ["error"]
    assert int(response.headers["retry-after"]) >= 1


def test_a_bug(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of ours is a 500 that tells nothing of the inside."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr("app.api.routes.v2.read_request", fail)
    response = client.post(INFER, content=json.dumps(request_for(jpeg(1))))

    assert response.status_code == 500
    assert response.json() == {"error": "the server failed on this request"}


def test_the_timeout_of_a_request(client: TestClient) -> None:
    """``timeout``, in microseconds, shortens the deadline and never lengthens it; 0 is none."""

    def ask(timeout: int, headers: Mapping[str, str]) -> int:
        body = request_for(jpeg(1), parameters={"timeout": timeout})
        return client.post(INFER, content=json.dumps(body), headers=dict(headers)).status_code

    assert ask(1, {}) == 504
    assert ask(0, {}) == 200
    assert ask(60_000_000, {}) == 200
    assert ask(60_000_000, {"x-request-deadline-ms": "0.001"}) == 504


def test_shape_is_kept_for_many_images(client: TestClient) -> None:
    """More images than a batch holds are answered in order."""
    images = [encoded(seed, "PNG") for seed in range(70)]
    body, headers = binary_request_for(*images)
    answer = client.post(INFER, content=body, headers=headers).json()
    [one] = [out for out in answer["outputs"] if out["name"] == "score"]
    singly, its_headers = binary_request_for(images[69])
    alone = client.post(INFER, content=singly, headers=its_headers).json()
    [other] = [out for out in alone["outputs"] if out["name"] == "score"]

    assert one["shape"] == [70]
    assert one["data"][69] == pytest.approx(other["data"][0], rel=1e-5)


def test_statistics_of_a_version(client: TestClient) -> None:
    """``last_inference`` is now, in milliseconds, and the batch sizes add up to the images."""
    client.post(INFER, content=json.dumps(request_for(jpeg(1), jpeg(2))))
    [found] = client.get(f"{MODEL}/versions/1/stats").json()["model_stats"]

    assert found["last_inference"] == pytest.approx(time.time() * 1000, abs=10_000)
    sizes = [(one["batch_size"], one["compute_infer"]["count"]) for one in found["batch_stats"]]
    assert sum(size * count for size, count in sizes) == found["inference_count"]
    assert sum(count for _, count in sizes) == found["execution_count"]


def test_openapi(client: TestClient) -> None:
    """Bodies, versions and every error are described."""
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        operation = paths[path]["post"]
        assert set(operation["requestBody"]["content"]) == {
            "application/json",
            "application/octet-stream",
        }
        assert set(operation["responses"]) == {
            *("200", "400", "401", "404", "413", "415", "422", "429", "500", "503", "504")
        }
        named = {one["name"] for one in operation["parameters"] if one["in"] == "path"}
        assert named == ({"name", "version"} if "version" in path else {"name"})
    assert "$ref" not in json.dumps(paths["/v2/models/{name}/infer"]["post"]["requestBody"])
    assert "/v2/repository/models/{name}/load" not in paths
