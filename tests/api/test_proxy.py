"""``/v1/proxy``: what is forwarded, what is held back, and what comes back."""

import gzip
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.api.conftest import STORE, wait_until_ready
from tests.api.test_gate import EVIDENCE, ID_IMAGE, OOD_IMAGE, ours
from tests.upstream import OK, FakeUpstream, Received, sending, upstream

SILENCE_S = 0.3


@contextmanager
def proxying(fake: FakeUpstream, **settings: Any) -> Iterator[TestClient]:
    """The application in front of a fake."""
    values = {
        "model_store": STORE,
        "max_upload_bytes": 1_000_000,
        "upstream_url": f"{fake.url}/base/",
        "upstream_timeout_s": SILENCE_S,
    }
    app = create_app(Settings.model_validate(values | settings))
    with TestClient(app, raise_server_exceptions=False, follow_redirects=False) as client:
        wait_until_ready(client)
        yield client


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[FakeUpstream, TestClient]]:
    """A fake and the application in front of it."""
    with upstream() as fake, proxying(fake) as client:
        yield fake, client


@pytest.fixture(scope="module")
def running_open() -> Iterator[tuple[FakeUpstream, TestClient]]:
    """The same, tagging and failing open."""
    with (
        upstream() as fake,
        proxying(fake, gate_policy="tag", gate_on_failure="open") as client,
    ):
        yield fake, client


@pytest.fixture
def fake(running: tuple[FakeUpstream, TestClient]) -> FakeUpstream:
    """The fake, as new."""
    running[0].received.clear()
    running[0].answer = sending(OK)
    return running[0]


@pytest.fixture
def client(running: tuple[FakeUpstream, TestClient]) -> TestClient:
    """The application, with the defaults: block, and fail closed."""
    return running[1]


def only(fake: FakeUpstream) -> Received:
    """The one request that arrived."""
    [request] = fake.received
    return request


def test_forwards_id_images(fake: FakeUpstream, client: TestClient) -> None:
    """Method, path, query and body arrive as sent, beside the verdict, which comes back too."""
    response = client.put(
        "/v1/proxy/v1/classify%2Fnow?top=3&name=a%20b",
        content=ID_IMAGE,
        headers={"content-type": "image/jpeg", "accept": "text/plain"},
    )

    request = only(fake)
    assert (request.method, request.target) == ("PUT", "/base/v1/classify%2Fnow?top=3&name=a%20b")
    assert request.body == ID_IMAGE
    assert request.values("content-length") == [str(len(ID_IMAGE))]
    assert request.values("content-type") == ["image/jpeg"]
    assert request.values("accept") == ["text/plain"]
    assert request.values("x-normgate-verdict") == ["id"]
    assert (response.status_code, response.text) == (200, "cat")
    assert response.headers["content-type"] == "text/plain"
    found = ours(response.headers)
    assert set(found) == EVIDENCE
    assert {f"x-normgate-{name}": value for name, value in found.items()} == {
        name: value for name, value in request.headers if name.startswith("x-normgate-")
    }


def test_blocks_ood_images(fake: FakeUpstream, client: TestClient) -> None:
    """An out-of-distribution image goes no further; the answer names score and threshold."""
    response = client.post("/v1/proxy/classify", content=OOD_IMAGE)

    assert fake.received == []
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    found = ours(response.headers)
    assert set(found) == EVIDENCE
    assert found["verdict"] == "ood"
    assert found["score"] in response.json()["detail"]
    assert found["threshold"] in response.json()["detail"]


def test_tags_ood_images(running_open: tuple[FakeUpstream, TestClient]) -> None:
    """With policy ``tag`` it is forwarded, and both sides are told."""
    fake, client = running_open
    fake.received.clear()

    response = client.post("/v1/proxy/classify", content=OOD_IMAGE)

    assert response.status_code == 200
    assert response.headers["x-normgate-verdict"] == "ood"
    assert only(fake).values("x-normgate-verdict") == ["ood"]
    assert only(fake).body == OOD_IMAGE


def test_forwards_forms_byte_for_byte(fake: FakeUpstream, client: TestClient) -> None:
    """A form is read for its images and forwarded as it came."""
    body = (
        b'--x y\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n'
        b'--x y\r\nContent-Disposition: form-data; name="photo"; filename="a.jpg"\r\n'
        b"X-Odd:  kept \r\n\r\n" + ID_IMAGE + b"\r\n--x y--\r\nan epilogue"
    )
    content_type = 'multipart/form-data; boundary="x y"'

    response = client.post("/v1/proxy/", content=body, headers={"content-type": content_type})

    assert response.headers["x-normgate-verdict"] == "id"
    assert only(fake).body == body
    assert only(fake).values("content-type") == [content_type]


def test_one_ood_image_holds_a_form_back(fake: FakeUpstream, client: TestClient) -> None:
    """The service behind may read any of the files."""
    files = [("file", ("a.jpg", ID_IMAGE)), ("other", ("b.jpg", OOD_IMAGE))]

    assert client.post("/v1/proxy/", files=files).status_code == 422
    assert fake.received == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS", "POST", "PATCH"])
def test_forwards_requests_without_a_body(
    fake: FakeUpstream, client: TestClient, method: str
) -> None:
    """Where there is no image, there is nothing to judge."""
    if method == "HEAD":
        fake.answer = sending(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n")

    response = client.request(method, "/v1/proxy/labels")

    assert (only(fake).method, only(fake).target) == (method, "/base/labels")
    assert only(fake).values("x-normgate-verdict") == ["none"]
    assert response.status_code == 200
    assert ours(response.headers) == {"verdict": "none"}
    assert response.headers["content-length"] == "3"
    assert response.text == ("" if method == "HEAD" else "cat")


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        pytest.param(b"{}", {"content-type": "application/json"}, 415, id="json"),
        pytest.param(b"hello", {}, 415, id="text"),
        pytest.param(ID_IMAGE[:300], {}, 422, id="half a JPEG"),
    ],
)
def test_no_verdict(
    fake: FakeUpstream,
    client: TestClient,
    running_open: tuple[FakeUpstream, TestClient],
    content: bytes,
    headers: Mapping[str, str],
    status: int,
) -> None:
    """What cannot be judged is refused, or forwarded as unknown, as the operator sets."""
    closed = client.post("/v1/proxy/classify", content=content, headers=dict(headers))
    assert closed.status_code == status
    assert fake.received == []

    behind, opened = running_open
    behind.received.clear()
    response = opened.post("/v1/proxy/classify", content=content, headers=dict(headers))
    assert response.status_code == 200
    assert set(ours(response.headers)) == {"verdict", "error"}
    assert only(behind).values("x-normgate-verdict") == ["unknown"]
    assert only(behind).body == content


def test_forms_without_files(
    client: TestClient, running_open: tuple[FakeUpstream, TestClient]
) -> None:
    """A form without a file has no image; inputs left empty in a browser are no files."""
    empty = {"file": ("", b"", "application/octet-stream")}

    assert client.post("/v1/proxy/", files=empty).status_code == 415
    response = running_open[1].post("/v1/proxy/", files=empty)
    assert response.headers["x-normgate-verdict"] == "unknown"
    both = [("file", ("", b"")), ("other", ("a.jpg", ID_IMAGE))]
    assert client.post("/v1/proxy/", files=both).headers["x-normgate-verdict"] == "id"


def test_too_large(fake: FakeUpstream, running_open: tuple[FakeUpstream, TestClient]) -> None:
    """A body beyond the limit is never forwarded: not all of it is there."""
    behind, opened = running_open
    behind.received.clear()

    assert opened.post("/v1/proxy/", content=b"x" * 1_000_001).status_code == 413
    assert behind.received == []


def test_request_headers(fake: FakeUpstream, client: TestClient) -> None:
    """Headers for one connection and forged verdicts stay behind; the rest arrives once."""
    response = client.post(
        "/v1/proxy/classify",
        content=ID_IMAGE,
        headers=[
            ("connection", "close, X-Private"),
            ("keep-alive", "timeout=9"),
            ("x-private", "1"),
            ("te", "trailers"),
            ("trailer", "x-sum"),
            ("upgrade", "h2c"),
            ("proxy-authorization", "Basic eA=="),
            ("expect", "100-continue"),
            ("x-normgate-verdict", "forged"),
            ("X_NormGate_Verdict", "forged"),
            ("x-normgate-error", "forged"),
            ("x-api-key", "k"),
            ("authorization", "Bearer theirs"),
            ("x-forwarded-for", "10.0.0.7"),
            ("via", "1.1 edge"),
            ("x-request-id", "abc"),
            ("cookie", "a=1"),
            ("x-twice", "1"),
            ("x-twice", "2"),
        ],
    )

    assert response.status_code == 200
    request = only(fake)
    names = {name.lower() for name, _ in request.headers}
    assert names.isdisjoint(
        {
            *("keep-alive", "x-private", "te", "trailer", "upgrade", "proxy-authorization"),
            *("expect", "transfer-encoding", "x_normgate_verdict", "x-normgate-error"),
            *("x-api-key", "connection"),
        }
    )
    assert "forged" not in str(request.headers)
    assert request.values("host") == [fake.url.removeprefix("http://")]
    assert request.values("authorization") == ["Bearer theirs"]
    assert request.values("x-forwarded-for") == ["10.0.0.7, testclient"]
    assert request.values("x-forwarded-proto") == ["http"]
    assert request.values("x-forwarded-host") == ["testserver"]
    assert request.values("via") == ["1.1 edge, 1.1 normgate"]
    assert request.values("x-request-id") == ["abc"]
    assert request.values("cookie") == ["a=1"]
    assert request.values("x-twice") == ["1", "2"]


def test_an_earlier_proxy_knows_better(fake: FakeUpstream, client: TestClient) -> None:
    """The scheme and host that the client asked for are kept if they are known."""
    client.get(
        "/v1/proxy/", headers={"x-forwarded-proto": "https", "x-forwarded-host": "a.example"}
    )

    assert only(fake).values("x-forwarded-proto") == ["https"]
    assert only(fake).values("x-forwarded-host") == ["a.example"]


def test_keys_stay_here() -> None:
    """A key that opened the gate is not shown to the service behind it; other credentials are."""
    with upstream() as fake, proxying(fake, api_keys=["ours"], admin_token="root") as client:
        assert client.get("/v1/proxy/").status_code == 401
        for name, value in [
            ("x-api-key", "ours"),
            ("authorization", "Bearer ours"),
            ("authorization", "bearer root"),
        ]:
            assert client.get("/v1/proxy/", headers={name: value}).status_code == 200
        client.get("/v1/proxy/", headers={"x-api-key": "ours", "authorization": "Bearer theirs"})

    *with_ours, with_theirs = fake.received
    assert len(with_ours) == 3
    for request in with_ours:
        assert request.values("authorization") == request.values("x-api-key") == []
    assert with_theirs.values("authorization") == ["Bearer theirs"]
    assert with_theirs.values("x-api-key") == []


def test_response_headers(fake: FakeUpstream, client: TestClient) -> None:
    """Headers for one connection and forged verdicts stay behind; the rest comes back."""
    fake.answer = sending(
        b"HTTP/1.1 201 Made\r\nConnection: X-Private, keep-alive\r\nKeep-Alive: timeout=9\r\n"
        b"X-Private: 1\r\nTransfer-Encoding: chunked\r\nProxy-Authenticate: Basic\r\n"
        b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\nX-NormGate-Verdict: forged\r\n"
        b"X-NormGate-Error: forged\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nLocation: /x\r\n"
        b"\r\n2\r\nca\r\n1\r\nt\r\n0\r\n\r\n"
    )

    response = client.get("/v1/proxy/")

    assert (response.status_code, response.text) == (201, "cat")
    assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert response.headers["location"] == "/x"
    assert ours(response.headers) == {"verdict": "none"}
    assert {"connection", "keep-alive", "x-private", "proxy-authenticate", "date"}.isdisjoint(
        response.headers
    )


@pytest.mark.parametrize(
    ("response", "status"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\nETag: x\r\n\r\n", 304),
        (b"HTTP/1.1 302 Found\r\nLocation: http://a.example/\r\nContent-Length: 0\r\n\r\n", 302),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 404),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", 500),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200),
    ],
)
def test_statuses(fake: FakeUpstream, client: TestClient, response: bytes, status: int) -> None:
    """A status comes back as it is; a redirection is the client's to follow."""
    fake.answer = sending(response)

    answer = client.get("/v1/proxy/")

    assert answer.status_code == status
    assert answer.content == b""
    assert len(fake.received) == 1


def test_content_codings(fake: FakeUpstream, client: TestClient) -> None:
    """A compressed body passes as it is, with its length."""
    packed = gzip.compress(b"cat")
    head = f"Content-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n".encode()
    fake.answer = sending(b"HTTP/1.1 200 OK\r\n" + head + packed)

    response = client.get("/v1/proxy/")

    assert response.headers["content-length"] == str(len(packed))
    assert response.headers["content-encoding"] == "gzip"
    assert response.content == b"cat"


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"no HTTP\r\n\r\n", id="another protocol"),
        pytest.param(b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n", id="no status"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Le", id="half a head"),
    ],
)
def test_broken_upstream(fake: FakeUpstream, client: TestClient, response: bytes) -> None:
    """An upstream that does not speak HTTP, or breaks off, is 502; its address stays secret."""

    def send_and_close(connection: socket.socket, _: Received) -> None:
        connection.sendall(response)
        connection.shutdown(socket.SHUT_RDWR)

    fake.answer = send_and_close

    answer = client.post("/v1/proxy/", content=ID_IMAGE)

    assert answer.status_code == 502
    assert answer.headers["content-type"] == "application/problem+json"
    assert "127.0.0.1" not in answer.text


def test_unreachable_upstream() -> None:
    """Nobody listens there: 502."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with proxying(FakeUpstream(f"http://127.0.0.1:{port}")) as client:
        assert client.get("/v1/proxy/").status_code == 502
        assert 'rejected_total{reason="upstream"} 1.0' in client.get("/metrics").text


def test_silent_upstream(fake: FakeUpstream, client: TestClient) -> None:
    """An upstream that does not answer in its time is 504."""
    release = threading.Event()

    def hold(_: socket.socket, __: Received) -> None:
        release.wait(20)

    fake.answer = hold
    try:
        assert client.get("/v1/proxy/").status_code == 504
    finally:
        release.set()


def test_full_pool() -> None:
    """Waiting for a connection ends at the request's deadline."""
    arrived, release = threading.Event(), threading.Event()

    def hold(connection: socket.socket, _: Received) -> None:
        arrived.set()
        release.wait(20)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    settings = {"upstream_connections": 1, "upstream_timeout_s": 20}
    with (
        upstream() as fake,
        proxying(fake, **settings) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        fake.answer = hold
        first = pool.submit(client.get, "/v1/proxy/")
        try:
            assert arrived.wait(20)
            late = client.get("/v1/proxy/", headers={"x-request-deadline-ms": "200"})
        finally:
            release.set()
        assert first.result(20).status_code == 200

    assert late.status_code == 504
    assert "deadline" in late.json()["detail"]
    assert len(fake.received) == 1


def test_no_upstream() -> None:
    """Without an upstream there is no proxy."""
    app = create_app(Settings(model_store=STORE))

    assert TestClient(app).post("/v1/proxy/", content=ID_IMAGE).status_code == 404


def test_openapi(client: TestClient) -> None:
    """Every method is described, under a name of its own."""
    operations = client.get("/openapi.json").json()["paths"]["/v1/proxy/{path}"]

    assert set(operations) == {"get", "head", "post", "put", "patch", "delete", "options"}
    assert len({operation["operationId"] for operation in operations.values()}) == 7
