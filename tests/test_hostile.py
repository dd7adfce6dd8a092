"""The real server process and clients that mean it no good: right status, bounded memory, alive."""

import io
import json
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPResponse
from typing import Any, Final

import httpx
import psutil
import pytest
from PIL import Image

from tests.pictures import encoded, huge_png_header, jpeg, pixels
from tests.test_server import Server, serving

WITHIN_S: Final = 60
MEGABYTE: Final = 10**6
MAX_UPLOAD_BYTES: Final = 8 * MEGABYTE
MAX_INFLIGHT_BYTES: Final = 240 * MEGABYTE
FLAGS: Final = (
    *("--max-upload-bytes", str(MAX_UPLOAD_BYTES)),
    *("--max-pixels", str(13 * MEGABYTE)),
    *("--max-inflight-bytes", str(MAX_INFLIGHT_BYTES)),
)
LINE: Final = b"POST /v1/score HTTP/1.1\r\nHost: x\r\n"
BOUNDARY: Final = b"our-boundary"
FORM: Final = b"Content-Type: multipart/form-data; boundary=" + BOUNDARY + b"\r\n"
FORM_HEADERS: Final = {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
ABANDONED: Final = 'normgate_rejected_total{reason="abandoned"}'


class Target:
    """The server under attack."""

    def __init__(self, server: Server, client: httpx.Client) -> None:
        self.client = client
        self._url = httpx.URL(server.url)
        self._process = psutil.Process(server.process.pid)

    def connect(self) -> socket.socket:
        """A connection of one's own."""
        return socket.create_connection((self._url.host, self._url.port or 0), WITHIN_S)

    def send(self, *packets: bytes) -> tuple[int, str]:
        """The status and the body of the first answer to what is sent."""
        with self.connect() as client:
            for packet in packets:
                client.sendall(packet)
            return answer(client)

    def score(self, content: bytes, **headers: str) -> httpx.Response:
        """Post an image in the ordinary way."""
        return self.client.post("/v1/score", content=content, headers=headers)

    def metric(self, name: str) -> float:
        """The sample of that name and those labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " "))

    def rss(self) -> int:
        """Bytes of memory that the process has."""
        resident: int = self._process.memory_info().rss
        return resident

    def is_idle(self) -> bool:
        """Whether no request holds anything."""
        held = ("normgate_in_flight", "normgate_inflight_bytes", "normgate_queue_depth")
        return all(self.metric(name) == 0 for name in held)


def answer(client: socket.socket) -> tuple[int, str]:
    """The status and the body of the next answer."""
    response = HTTPResponse(client)
    response.begin()
    return response.status, response.read().decode()


def eventually(condition: Callable[[], bool]) -> None:
    """Ask again and again until the condition holds."""
    until = time.monotonic() + WITHIN_S
    while time.monotonic() < until:
        if condition():
            return
    raise AssertionError("the condition did not come to hold")


@pytest.fixture(scope="module")
def started() -> Iterator[Target]:
    """A server with small limits, which has scored one image."""
    with serving(FLAGS) as server, httpx.Client(base_url=server.url, timeout=WITHIN_S) as client:
        yield Target(server, client)


@pytest.fixture
def target(started: Target) -> Iterator[Target]:
    """The server, which must be alive, idle and as right as before after every test."""
    before = started.score(jpeg(1)).json()["results"]
    yield started
    assert started.client.get("/livez").status_code == 200
    eventually(started.is_idle)
    assert started.score(jpeg(1)).json()["results"] == before


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def picture(side: int = 200) -> Image.Image:
    """A drawing."""
    return Image.fromarray(pixels(7, height=side, width=side))


def form(files: Iterable[bytes]) -> bytes:
    """A form with the files."""
    start = b"--" + BOUNDARY + b"\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n"
    return b"".join(start + file + b"\r\n" for file in files) + b"--" + BOUNDARY + b"--\r\n"


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    content = saved(picture(), "JPEG", progressive=True)
    start, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    return content[:start] + count * content[start:end] + content[end:]


def many_comments(count: int) -> bytes:
    """A JPEG with empty comments before its picture."""
    content = jpeg(1)
    return content[:2] + count * b"\xff\xfe\x00\x02" + content[2:]


def gif_with_a_large_frame() -> bytes:
    """A GIF of one pixel whose frame has 65,535 x 65,535."""
    screen, frame = b"\x01\x00\x01\x00\x80\x00\x00" + bytes(6), b"\x2c" + bytes(4) + b"\xff" * 4
    return b"GIF89a" + screen + frame + b"\x00\x02\x02\x4c\x01\x00\x3b"


IMAGES: Final[Mapping[str, bytes]] = {
    "JPEG": saved(picture(), "JPEG"),
    "progressive JPEG": saved(picture(), "JPEG", progressive=True),
    "CMYK JPEG": saved(picture().convert("CMYK"), "JPEG"),
    "PNG": saved(picture(), "PNG"),
    "WEBP": saved(picture(), "WEBP"),
    "GIF": saved(picture(), "GIF"),
    "BMP": saved(picture(), "BMP"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_whole_images(target: Target, name: str) -> None:
    """Every accepted format is scored, a CMYK JPEG among them."""
    assert target.score(IMAGES[name]).status_code == 200


@pytest.mark.parametrize("name", IMAGES)
def test_images_cut_off(target: Target, name: str) -> None:
    """An image that ends after any tenth of its bytes is the client's fault, never the server's."""
    content = IMAGES[name]
    parts = [content[: len(content) * tenths // 10] for tenths in range(10)]

    statuses = [target.score(part).status_code for part in parts]

    assert statuses[0] == 400
    assert set(statuses[1:]) <= {415, 422}


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        pytest.param(b"", 400, "the body is empty", id="nothing"),
        pytest.param(b"\x00" * 1000, 415, "not an image", id="zeros"),
        pytest.param(huge_png_header(30_000), 422, "30000x30000 pixels", id="900 megapixels"),
        pytest.param(gif_with_a_large_frame(), 422, "65535x65535 pixels", id="frame"),
        pytest.param(encoded(1, "PNG", height=1, width=10**6), 422, "scaled to 32", id="line"),
        pytest.param(many_scans(500), 422, "scans; the limit is 100", id="scans"),
        pytest.param(many_comments(1_900_000), 422, "more than 100000 pieces", id="comments"),
    ],
)
def test_images_that_ask_for_too_much(
    target: Target, content: bytes, status: int, words: str
) -> None:
    """An image that would cost far more than its size is refused before it has."""
    before = target.rss()
    response = target.score(content)

    assert response.status_code == status
    assert words in response.json()["detail"]
    assert target.rss() - before < 64 * MEGABYTE


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"POST /v1/score HTTP/1.0\r\n\r\n" + jpeg(1), id="HTTP/1.0"),
        pytest.param(LINE + b"\r\n", id="HTTP/1.1"),
        pytest.param(LINE + b"Content-Length: 0\r\n\r\n", id="zero"),
        pytest.param(LINE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="no chunk"),
    ],
)
def test_a_missing_body(target: Target, request_bytes: bytes) -> None:
    """Without a length and without chunks there is no body, and none is a 400."""
    status, body = target.send(request_bytes)

    assert status == 400
    assert "the body is empty" in body


def test_a_chunked_body(target: Target) -> None:
    """An image may come in chunks of any size, a length is not needed."""
    chunks = [jpeg(1)[start : start + 7] for start in range(0, len(jpeg(1)), 7)]
    framed = b"".join(b"%x;extension\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)

    status, body = target.send(LINE, b"Transfer-Encoding: chunked\r\n\r\n", framed, b"0\r\n\r\n")

    assert status == 200
    assert json.loads(body)["results"] == target.score(jpeg(1)).json()["results"]


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n", id="no number"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n", id="negative"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\n", id="overflow"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n", id="too long"),
        pytest.param(b"Transfer-Encoding: gzip\r\n\r\nabc", id="coding"),
        pytest.param(
            b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="both"
        ),
        pytest.param(b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", id="two lengths"),
        pytest.param(b"Content-Length: -3\r\n\r\nabc", id="negative length"),
        pytest.param(b"Content-Length: 3x\r\n\r\nabc", id="no length"),
        pytest.param(b"Content-Length: " + b"9" * 30 + b"\r\n\r\nabc", id="huge length"),
        pytest.param(b"Bad Header: x\r\n\r\n", id="header"),
    ],
)
def test_bad_framing(target: Target, rest: bytes) -> None:
    """A body whose end cannot be told is a 400, and the connection ends with it."""
    with target.connect() as client:
        client.sendall(LINE + rest)
        assert answer(client)[0] == 400
        assert client.recv(1) == b""


def test_an_announced_body_beyond_the_limit(target: Target) -> None:
    """100 MB that are announced are refused before they are asked for."""
    status, body = target.send(LINE, b"Expect: 100-continue\r\nContent-Length: 100000000\r\n\r\n")

    assert status == 413
    assert "the body has 100000000 bytes; the limit is 8000000" in body


def test_a_chunked_body_beyond_the_limit(target: Target) -> None:
    """100 MB that are not announced are refused when the limit is reached, and never held."""
    chunk = b"f4240\r\n" + MEGABYTE * b"a" + b"\r\n"
    before = peak = target.rss()
    with target.connect() as client:
        client.sendall(LINE + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            client.sendall(chunk)
            peak = max(peak, target.rss())
        status, body = answer(client)

    assert status == 413
    assert "more than 8000000 bytes" in body
    assert peak - before < 64 * MEGABYTE


@pytest.mark.parametrize("count", [1, 1000])
def test_a_flood_of_headers(target: Target, count: int) -> None:
    """20 MB of headers, or of one header, are refused and never held."""
    header = b"X: " + (20 * MEGABYTE // count) * b"a" + b"\r\n"
    before = target.rss()
    with target.connect() as client:
        client.sendall(LINE + count * header + b"\r\n")
        status, body = answer(client)

    assert status == 431
    assert "more than 65536 bytes" in body
    assert target.rss() - before < 16 * MEGABYTE


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e9", "soon", "", "0x10", "100, 200"])
def test_deadlines_out_of_bounds(target: Target, text: str) -> None:
    """A deadline must be a number of milliseconds within the bound."""
    response = target.score(jpeg(1), **{"X-Request-Deadline-Ms": text})

    assert response.status_code == 400
    assert "X-Request-Deadline-Ms" in response.json()["detail"]


def test_two_deadlines(target: Target) -> None:
    """Two deadlines are a 400, whichever is meant."""
    twice = b"X-Request-Deadline-Ms: 900\r\nX-Request-Deadline-Ms: 1000\r\n"

    status, body = target.send(LINE, twice, b"Content-Length: 0\r\n\r\n")

    assert status == 400
    assert "'900, 1000'" in body


def test_a_slow_upload(target: Target) -> None:
    """A client that sends byte after byte is answered at its deadline, not when it has finished."""
    with target.connect() as client:
        client.sendall(LINE + b"X-Request-Deadline-Ms: 300\r\nContent-Length: 1000000\r\n\r\n")
        sent = 0
        while not select.select([client], [], [], 0.01)[0]:
            client.sendall(b"a")
            sent += 1
            assert sent < 1_000_000, "there was no answer"
        status, body = answer(client)

    assert status == 504
    assert "before the body had arrived" in body
    assert sent > 1


def test_a_client_that_leaves_while_it_uploads(target: Target) -> None:
    """A broken upload is counted as abandoned, and what was held for it is free again."""
    before = target.metric(ABANDONED)
    with target.connect() as client:
        client.sendall(LINE + b"Content-Length: 5000000\r\n\r\n" + MEGABYTE * b"a")
        eventually(lambda: target.metric("normgate_inflight_bytes") == MEGABYTE)

    eventually(lambda: target.metric(ABANDONED) == before + 1)
    assert target.metric("normgate_inflight_bytes") == 0


def test_a_client_that_leaves_while_its_images_wait(target: Target) -> None:
    """Images that nobody waits for leave the queue, and are counted as abandoned."""
    before = target.metric(ABANDONED)
    body = form(jpeg(seed) for seed in range(1000))
    with target.connect() as client:
        client.sendall(LINE + FORM + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: target.metric("normgate_queue_depth") > 0)

    eventually(lambda: target.metric(ABANDONED) > before)
    eventually(target.is_idle)


def test_pipelined_requests(target: Target) -> None:
    """Requests that come in one packet are answered in order, each with its own answer."""
    bodies = [jpeg(1), b"no image", jpeg(2)]
    requests = [LINE + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies]
    last = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with target.connect() as client:
        client.sendall(b"".join([*requests, last]))
        received = b"".join(iter(lambda: client.recv(65536), b""))

    answers = received.split(b"HTTP/1.1 ")[1:]
    assert [int(one[:3]) for one in answers] == [200, 415, 200, 200]
    for one, seed in ((answers[0], 1), (answers[2], 2)):
        assert (
            json.loads(one.partition(b"\r\n\r\n")[2])["results"]
            == (target.score(jpeg(seed)).json()["results"])
        )


def test_uploads_beyond_the_memory_budget(target: Target) -> None:
    """Uploads that do not fit into the budget together are told to come back; the others stay."""
    fitting = MAX_INFLIGHT_BYTES // MAX_UPLOAD_BYTES
    head = LINE + b"Content-Length: %d\r\n\r\n" % MAX_UPLOAD_BYTES
    body = jpeg(2).ljust(MAX_UPLOAD_BYTES, b"\x00")
    with ExitStack() as connections:
        clients = [connections.enter_context(target.connect()) for _ in range(fitting)]
        for client in clients:
            client.sendall(head + body[:-1])
        held = fitting * (MAX_UPLOAD_BYTES - 1)
        eventually(lambda: target.metric("normgate_inflight_bytes") == held)
        refused = target.score(jpeg(1))
        clients[0].close()
        eventually(lambda: target.score(jpeg(1)).status_code == 200)
        clients[1].sendall(body[-1:])
        accepted, _ = answer(clients[1])

    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert f"the limit is {MAX_INFLIGHT_BYTES}" in refused.json()["detail"]
    assert accepted == 200


def test_uploads_that_are_only_announced(target: Target) -> None:
    """What has not arrived takes no memory and nobody's place."""
    head = LINE + b"Content-Length: %d\r\n\r\n" % MAX_UPLOAD_BYTES
    with ExitStack() as connections:
        for _ in range(2 * MAX_INFLIGHT_BYTES // MAX_UPLOAD_BYTES):
            connections.enter_context(target.connect()).sendall(head)
        eventually(lambda: target.metric("normgate_in_flight") >= 2)
        assert target.score(jpeg(1)).status_code == 200


def test_idle_connections(target: Target) -> None:
    """Clients that never finish their first line keep nobody from being answered."""
    with ExitStack() as connections:
        for _ in range(200):
            client = connections.enter_context(target.connect())
            client.sendall(b"POST /v1/sc")
        assert target.score(jpeg(1)).status_code == 200


def test_thousands_of_parts(target: Target) -> None:
    """A form of empty files costs a result each; one file too many is a 400."""
    many = target.client.post("/v1/score", content=form([b""] * 2_000), headers=FORM_HEADERS)
    too_many = target.client.post("/v1/score", content=form([b""] * 10_001), headers=FORM_HEADERS)

    assert many.status_code == 200
    assert all("not an image" in one["error"] for one in many.json()["results"])
    assert too_many.status_code == 400


@pytest.mark.slow
def test_a_flood_of_large_images(target: Target) -> None:
    """While large images fill their lane, small ones are answered as they come."""
    large = jpeg(0, height=3000, width=4000)
    patience = {"X-Request-Deadline-Ms": "60000"}
    before = target.rss()
    with ThreadPoolExecutor(8) as flood:
        waiting = [flood.submit(target.score, large, **patience) for _ in range(24)]
        eventually(lambda: target.metric("normgate_in_flight") >= 8)
        small = [target.score(jpeg(seed), **patience).status_code for seed in range(20)]
        overtaken = sum(not one.done() for one in waiting)
        statuses = {one.result(WITHIN_S).status_code for one in waiting}

    assert small == [200] * 20
    assert overtaken > 0
    assert statuses == {200}
    assert target.rss() - before < MAX_INFLIGHT_BYTES
