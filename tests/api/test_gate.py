"""``/v1/gate``: a verdict as a status, asked for as Envoy asks."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.api.conftest import ROOT, STORE, wait_until_ready
from tests.pictures import encoded, huge_png_header, jpeg

EXAMPLES = ROOT / "docs" / "examples"
ID_IMAGE = (EXAMPLES / "ship.jpg").read_bytes()
OOD_IMAGE = (EXAMPLES / "noise.jpg").read_bytes()
EVIDENCE = {"verdict", "score", "threshold", "p-value", "feature-norm", "model", "version"}


@pytest.fixture(scope="module")
def open_client() -> Iterator[TestClient]:
    """An application that lets images without a verdict pass."""
    settings = Settings(model_store=STORE, max_upload_bytes=1_000_000, gate_on_failure="open")
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        wait_until_ready(client)
        yield client


def ours(headers: Mapping[str, str]) -> dict[str, str]:
    """The ``x-normgate-*`` headers, without the prefix."""
    prefix = "x-normgate-"
    return {
        name.removeprefix(prefix): value
        for name, value in headers.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize(
    ("image", "verdict", "status"), [(ID_IMAGE, "id", 200), (OOD_IMAGE, "ood", 403)]
)
def test_verdicts(client: TestClient, image: bytes, verdict: str, status: int) -> None:
    """The status is the verdict, and the headers say what ``/v1/score`` says."""
    [scored] = client.post("/v1/score", content=image).json()["results"]

    response = client.post("/v1/gate", content=image)

    assert response.status_code == status
    found = ours(response.headers)
    assert set(found) == EVIDENCE
    assert (found["verdict"], scored["verdict"]) == (verdict, verdict)
    for name in ("score", "threshold", "p_value", "feature_norm"):
        assert float(found[name.replace("_", "-")]) == pytest.approx(scored[name], rel=1e-5)
    assert (found["model"], found["version"]) == ("cifar10-resnet18", "1")


def test_bodies(client: TestClient) -> None:
    """What passes needs no body; what does not is told why, in a form for people and programs."""
    assert client.post("/v1/gate", content=ID_IMAGE).content == b""

    refused = client.post("/v1/gate", content=OOD_IMAGE)
    assert refused.headers["content-type"] == "application/problem+json"
    problem = refused.json()
    assert problem["status"] == 403
    assert refused.headers["x-normgate-score"] in problem["detail"]
    assert refused.headers["x-normgate-threshold"] in problem["detail"]


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize(("image", "status"), [(ID_IMAGE, 200), (OOD_IMAGE, 403)])
def test_as_envoy_asks(client: TestClient, method: str, image: bytes, status: int) -> None:
    """The method and the prefixed path of the request that Envoy holds back, and its body."""
    response = client.request(
        method,
        "/v1/gate/classify/v2?user=7&model=theirs&version=old",
        content=image,
        headers={
            "host": "classifier.example",
            "authorization": "Bearer for the classifier",
            "content-type": "image/jpeg",
            "x-envoy-auth-partial-body": "false",
            "x-envoy-internal": "true",
            "x-envoy-expected-rq-timeout-ms": "200",
            "x-forwarded-for": "10.0.0.7",
        },
    )

    assert response.status_code == status
    assert set(ours(response.headers)) == EVIDENCE


def test_part_of_a_body(client: TestClient) -> None:
    """An image that Envoy cut off is not judged."""
    response = client.post(
        "/v1/gate/classify", content=ID_IMAGE, headers={"x-envoy-auth-partial-body": "true"}
    )

    assert response.status_code == 413
    assert "max_request_bytes" in response.json()["detail"]


def test_nginx_auth_request_gets_no_pass(client: TestClient) -> None:
    """A GET without a body is no question: 200 would let everything through nginx."""
    assert client.get("/v1/gate/classify").status_code == 405


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("model=cifar10-resnet18&version=1", 200),
        ("model=unknown", 404),
        ("version=7", 404),
        ("version=zero", 400),
    ],
)
def test_queries(client: TestClient, open_client: TestClient, query: str, status: int) -> None:
    """Model and version are chosen as for ``/v1/score``; a wrong choice passes no gate."""
    for gate in (client, open_client):
        assert gate.post(f"/v1/gate?{query}", content=ID_IMAGE).status_code == status


NO_VERDICT = [
    pytest.param(b"hello", {}, 415, id="text"),
    pytest.param(b"{}", {"content-type": "application/json"}, 415, id="json"),
    pytest.param(ID_IMAGE, {"content-encoding": "br"}, 415, id="coded"),
    pytest.param(jpeg(1)[:300], {}, 422, id="half a JPEG"),
    pytest.param(huge_png_header(30_000), {}, 422, id="900 megapixels"),
    pytest.param(ID_IMAGE, {"x-request-deadline-ms": "0.001"}, 504, id="late"),
]


@pytest.mark.parametrize(("content", "headers", "status"), NO_VERDICT)
def test_no_verdict(
    client: TestClient,
    open_client: TestClient,
    content: bytes,
    headers: Mapping[str, str],
    status: int,
) -> None:
    """An image without a verdict keeps its error's status, or passes an open gate as unknown."""
    closed = client.post("/v1/gate", content=content, headers=dict(headers))
    assert closed.status_code == status
    assert closed.headers["content-type"] == "application/problem+json"

    opened = open_client.post("/v1/gate", content=content, headers=dict(headers))
    assert opened.status_code == 200
    found = ours(opened.headers)
    assert set(found) == {"verdict", "error"}
    assert found["verdict"] == "unknown"
    assert found["error"].isascii()
    assert found["error"].isprintable()


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        pytest.param(b"", {}, 400, id="nothing"),
        pytest.param(b"x" * 1_000_001, {}, 413, id="too many bytes"),
        pytest.param(
            b"junk", {"content-type": "multipart/form-data; boundary=x"}, 400, id="no form"
        ),
        pytest.param(ID_IMAGE, {"x-request-deadline-ms": "soon"}, 400, id="no deadline"),
    ],
)
def test_never_opened(
    client: TestClient,
    open_client: TestClient,
    content: bytes,
    headers: Mapping[str, str],
    status: int,
) -> None:
    """A request that is itself wrong passes no gate."""
    for gate in (client, open_client):
        response = gate.post("/v1/gate", content=content, headers=dict(headers))
        assert response.status_code == status


def test_open_gate_before_loading() -> None:
    """While the models load, a closed gate answers 503 and an open one lets pass."""
    closed = TestClient(create_app(Settings(model_store=STORE)))
    opened = TestClient(create_app(Settings(model_store=STORE, gate_on_failure="open")))

    assert closed.post("/v1/gate", content=ID_IMAGE).status_code == 503
    response = opened.post("/v1/gate", content=ID_IMAGE)
    assert response.status_code == 200
    assert response.headers["x-normgate-verdict"] == "unknown"


def test_odd_words_stay_out_of_the_headers(open_client: TestClient) -> None:
    """What a client sends cannot put line breaks or other alphabets into a header."""
    content_type = b"text/\xe9\xff" + b"x" * 500
    response = open_client.post(
        "/v1/gate", content=b"hello", headers=[(b"content-type", content_type)]
    )

    error = response.headers["x-normgate-error"]
    assert error.isascii()
    assert len(error) <= 200


def test_forms(client: TestClient, open_client: TestClient) -> None:
    """Every file of a form counts, whatever its name; one out-of-distribution image is enough."""
    good, bad = ("a.jpg", ID_IMAGE), ("b.jpg", OOD_IMAGE)
    broken = ("c.jpg", b"hello")

    def status(gate: TestClient, *files: tuple[str, tuple[str, bytes]]) -> tuple[int, str | None]:
        response = gate.post("/v1/gate/classify", files=list(files), data={"note": "x"})
        return response.status_code, response.headers.get("x-normgate-verdict")

    assert status(client, ("file", good)) == (200, "id")
    assert status(client, ("file", good), ("image", bad)) == (403, "ood")
    assert status(client, ("photo", bad), ("photo", broken)) == (403, "ood")
    assert status(client, ("photo", good), ("photo", broken)) == (415, None)
    assert status(open_client, ("photo", good), ("photo", broken)) == (200, "unknown")
    assert status(open_client, ("photo", bad), ("photo", broken)) == (403, "ood")


def test_a_score_that_is_no_number(tmp_path: Path) -> None:
    """An image on which the network overflows is held back as OOD, by an open gate too."""
    token = "an-admin-token"
    settings = {"model_store": STORE, "review_folder": tmp_path, "admin_token": token}
    settings |= {"engine": "torch", "gate_on_failure": "open"}
    app = create_app(Settings.model_validate(settings))
    with TestClient(app, raise_server_exceptions=False, headers={"x-api-key": token}) as client:
        wait_until_ready(client)
        network = app.state.service.model(None, None).detectors["cpu"].network
        network.get_parameter("conv1.weight").data.fill_(float("nan"))

        answer = client.post("/v1/gate", content=ID_IMAGE)

        assert answer.status_code == 403
        assert answer.headers["x-normgate-verdict"] == "ood"
        assert answer.json()["detail"].endswith("its score is nan")
        assert client.post("/v1/score", content=ID_IMAGE).status_code == 500
        assert client.get("/v1/review").json()["images"] == []


def test_form_headers_tell_of_the_lowest_score(client: TestClient) -> None:
    """Of several images the evidence is the lowest one's."""
    images = [ID_IMAGE, (EXAMPLES / "truck.jpg").read_bytes(), encoded(3, "PNG")]
    scores = [
        client.post("/v1/score", content=image).json()["results"][0]["score"] for image in images
    ]

    response = client.post(
        "/v1/gate", files=[("file", (str(i), im)) for i, im in enumerate(images)]
    )

    assert float(response.headers["x-normgate-score"]) == pytest.approx(min(scores), rel=1e-5)


def test_two_content_types(client: TestClient) -> None:
    """A request that says it is two things is refused: an image can be a form's preamble."""
    response = client.post(
        "/v1/gate",
        content=ID_IMAGE,
        headers=[
            ("content-type", "image/jpeg"),
            ("content-type", "multipart/form-data; boundary=x"),
        ],
    )

    assert response.status_code == 400


def test_images_are_counted(open_client: TestClient) -> None:
    """The gate's images move the same counters; one let pass without a verdict is a refusal."""

    def count(line_start: str) -> float:
        lines = open_client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(line_start))

    unsupported = 'normgate_rejected_total{reason="unsupported"}'
    before = count("normgate_images_total"), count(unsupported)
    open_client.post("/v1/gate", content=OOD_IMAGE)
    open_client.post("/v1/gate", content=b"hello")

    assert count("normgate_images_total") == before[0] + 1
    assert count(unsupported) == before[1] + 1


def test_api_keys() -> None:
    """Where keys are set, the gate asks for one."""
    settings = Settings.model_validate({"model_store": STORE, "api_keys": ["k"]})
    with TestClient(create_app(settings)) as client:
        wait_until_ready(client)

        assert client.post("/v1/gate/x", content=ID_IMAGE).status_code == 401
        answer = client.post("/v1/gate/x", content=ID_IMAGE, headers={"x-api-key": "k"})
        assert answer.status_code == 200
