"""HTTP connections: the bounds of a request's head, offers of other protocols, and the door."""

import asyncio
import gc
import json
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any, ClassVar, Final

import pytest
import uvicorn

from app.api.disconnect import DEPARTURE
from app.api.door import Refusal
from app.connection import MAX_HEAD_BYTES, Connection

KEEP_ALIVE_S: Final = 1
WITHIN_S: Final = 20
POST: Final = b"POST /a?b HTTP/1.1\r\nHost: x\r\n"
H2C: Final = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"


LEFT: Final = threading.Event()
"""A client of ``/wait`` has gone away."""


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with what it was asked; it refuses ``/early`` unread.

    On ``/wait`` it waits until the connection tells that the client has left; on ``/broken`` it
    fails after the head, and on ``/parts`` it answers in two.
    """
    if scope["path"] == "/wait":
        left = asyncio.Event()
        scope["extensions"][DEPARTURE](left.set)
        await left.wait()
        LEFT.set()
        return
    body, more = b"", scope["path"] != "/early"
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    text = b"%s %s %d headers, body %s" % (
        scope["method"].encode(),
        scope["raw_path"],
        len(scope["headers"]),
        body,
    )
    headers = [(b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/broken":
        raise RuntimeError
    if scope["path"] == "/parts":
        await send({"type": "http.response.body", "body": text[:4], "more_body": True})
        text = text[4:]
    await send({"type": "http.response.body", "body": text})


class FullAtOneDoor:
    """Refuses what is posted to ``/full``."""

    def refusal(self, scope: Any) -> Refusal | None:
        """Why not."""
        if scope["path"] != "/full":
            return None
        return Refusal([(b"content-length", b"4"), (b"retry-after", b"3")], b"full")


class Guarded(Connection):
    """A connection that asks the door, and notes what is written."""

    made: ClassVar[list[weakref.ref[Connection]]] = []
    writes: ClassVar[list[bytes]] = []

    def __init__(self, **settings: Any) -> None:
        super().__init__(door=FullAtOneDoor(), **settings)  # type: ignore[arg-type]
        self.made.append(weakref.ref(self))

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(Noting(transport, self.writes))  # type: ignore[arg-type] # stands in


class Noting:
    """A transport that notes what is written."""

    def __init__(self, transport: Any, writes: list[bytes]) -> None:
        self._transport, self._writes = transport, writes

    def write(self, data: bytes) -> None:
        """Note and write."""
        self._writes.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """Where a server with such connections listens."""
    config = uvicorn.Config(
        echo,
        http=Guarded,
        ws="none",
        lifespan="off",
        log_level="critical",
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=asyncio.run, args=(server.serve([listener]),))
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join(WITHIN_S)


@pytest.fixture
def client(address: tuple[str, int]) -> Iterator[socket.socket]:
    """A connection."""
    with socket.create_connection(address, WITHIN_S) as client:
        yield client


def received(client: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def answers(client: socket.socket, *packets: bytes) -> list[bytes]:
    """The body of each answer to what is sent packet by packet."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for packet in packets:
        client.sendall(packet)
    return [answer.partition(b"\r\n\r\n")[2] for answer in received(client).split(b"HTTP/1.1 ")[1:]]


def problem(answer: bytes) -> dict[str, Any]:
    """The problem in an answer, whose head says the same."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    found: dict[str, Any] = json.loads(body)
    assert headers["content-type"] == "application/problem+json"
    assert int(headers["content-length"]) == len(body)
    assert headers["X-Request-ID"] == found["request_id"]
    assert status_line == f"HTTP/1.1 {found['status']} {found['title']}"
    return found


def test_bodies_come_whole(client: socket.socket) -> None:
    """Lengths, chunks and pipelines are read as uvicorn reads them."""
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    closing_get = b"GET /z HTTP/1.1\r\nConnection: close\r\n\r\n"

    found = answers(client, POST + b"Content-Length: 3\r\n\r\nabc" + chunked + closing_get)

    assert found == [
        b"POST /a 2 headers, body abc",
        b"POST /a 2 headers, body abc",
        b"GET /z 1 headers, body ",
    ]


@pytest.mark.parametrize(
    ("target", "writes"),
    [
        pytest.param(b"POST /a", [(b"HTTP/1.1 200", b"body abc")], id="whole"),
        pytest.param(
            b"POST /parts",
            [(b"HTTP/1.1 200", b"\r\n\r\nPOST"), (b" /parts", b"body abc")],
            id="parts",
        ),
        pytest.param(b"HEAD /a", [(b"HTTP/1.1 200", b"\r\n\r\n")], id="head alone"),
    ],
)
def test_a_head_leaves_with_its_body(
    client: socket.socket, target: bytes, writes: list[tuple[bytes, bytes]]
) -> None:
    """In one packet, or with the first part of it; the answer to HEAD is all head."""
    Guarded.writes.clear()
    client.sendall(target + b" HTTP/1.1\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc")
    whole = received(client)

    assert b"".join(Guarded.writes) == whole
    for written, (beginning, end) in zip(Guarded.writes, writes, strict=True):
        assert written.startswith(beginning)
        assert written.endswith(end)


def test_the_answer_to_head_does_not_wait_for_a_body(client: socket.socket) -> None:
    """It comes on a connection that is kept, too."""
    client.sendall(b"HEAD /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc")
    assert client.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_large_body_is_not_copied_to_its_head(client: socket.socket) -> None:
    """It is written as it is, right after."""
    Guarded.writes.clear()
    large = 100_000 * b"a"
    head = b"POST /a HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(large)
    client.sendall(head + large)
    whole = received(client)

    assert b"".join(Guarded.writes) == whole
    assert [written[:4] for written in Guarded.writes] == [b"HTTP", b"POST"]
    assert whole.endswith(large)


def test_leave_to_send_a_body_comes_before_the_answer(client: socket.socket) -> None:
    """Nobody would send the body else."""
    client.sendall(POST + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: 3\r\n\r\n")
    assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.sendall(b"abc")
    answer = received(client)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"body abc")


def test_an_answer_that_breaks_off_has_a_head(client: socket.socket) -> None:
    """The client sees that its end is missing, as with other servers."""
    client.sendall(b"POST /broken HTTP/1.1\r\n" + LENGTH + b"abc")
    head, _, body = received(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"content-length: " in head
    assert body == b""


@pytest.mark.parametrize(
    "framed",
    [
        pytest.param(b"Content-Length: 3\r\n\r\nabc", id="length"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", id="chunked"),
    ],
)
@pytest.mark.parametrize("at", [20, 60, 999], ids=["in the line", "in the offer", "whole"])
def test_an_offer_of_another_protocol_is_declined(
    client: socket.socket, framed: bytes, at: int
) -> None:
    """The request is answered as if it had none, its body is read, and so is what follows."""
    packet = POST + H2C + framed + b"GET /z HTTP/1.1\r\nConnection: close\r\n\r\n"

    found = answers(client, packet[:at], packet[at:])

    assert found == [b"POST /a 4 headers, body abc", b"GET /z 1 headers, body "]


def test_a_packet_full_of_offers(client: socket.socket, address: tuple[str, int]) -> None:
    """Thousands of offers in one packet end the connection; the others are answered."""
    client.sendall(4000 * (b"GET /z HTTP/1.1\r\n" + H2C + b"\r\n"))
    with suppress(ConnectionResetError):
        received(client)

    with socket.create_connection(address, WITHIN_S) as another:
        assert answers(another, b"GET /z HTTP/1.1\r\nConnection: close\r\n\r\n") == [
            b"GET /z 1 headers, body "
        ]


@pytest.mark.parametrize(
    "packet",
    [
        b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_other_protocols(client: socket.socket, packet: bytes) -> None:
    """A tunnel, TLS and HTTP/2 with prior knowledge are refused."""
    client.sendall(packet)

    assert problem(received(client))["status"] == 400


@pytest.mark.parametrize(
    "beginning",
    [
        pytest.param(b"GET /", id="target"),
        pytest.param(POST + b"X-", id="name"),
        pytest.param(POST + b"X: ", id="value"),
    ],
)
@pytest.mark.parametrize("count", [10 * MAX_HEAD_BYTES, 100 * MAX_HEAD_BYTES])
def test_a_head_without_end(client: socket.socket, beginning: bytes, count: int) -> None:
    """A head that goes on beyond the limit is refused before it is complete."""
    with closing(client.dup()) as writer:
        sending = threading.Thread(target=_send, args=(writer, beginning + count * b"a"))
        sending.start()
        refusal = received(client)
        sending.join(WITHIN_S)

    assert refusal.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert str(MAX_HEAD_BYTES) in problem(refusal)["detail"]


@pytest.mark.parametrize(("count", "status"), [(1_000, b"200 OK"), (2_000, b"431 ")])
def test_many_headers(client: socket.socket, count: int, status: bytes) -> None:
    """Headers of 56 bytes each count together."""
    headers = b"".join(b"X-%04d: %s\r\n" % (index, b"v" * 50) for index in range(count))

    client.sendall(POST + b"Connection: close\r\n" + headers + b"\r\n")

    assert received(client).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET / HT", id="half a head"),
        pytest.param(POST + b"\r\nGET / HT", id="half a second head"),
        pytest.param(POST + b"\r\n\r\n", id="a line after a request"),
    ],
)
def test_a_client_that_falls_silent(client: socket.socket, packet: bytes) -> None:
    """A head that does not arrive ends the connection; what it held is free again."""
    client.sendall(packet)
    started = time.monotonic()
    received(client)

    assert time.monotonic() - started < WITHIN_S / 2


def test_a_refused_body_without_end(client: socket.socket) -> None:
    """A client that sends on and on after its answer is cut off."""
    client.sendall(b"POST /early HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    until = time.monotonic() + WITHIN_S
    with pytest.raises(ConnectionError):  # noqa: PT012 - it is the first or the thousandth that fails
        while time.monotonic() < until:
            client.sendall(b"3e8\r\n" + 1000 * b"a" + b"\r\n")


def _send(client: socket.socket, data: bytes) -> None:
    with suppress(ConnectionError):
        client.sendall(data)


FULL: Final = b"POST /full HTTP/1.1\r\nHost: x\r\n"
LENGTH: Final = b"Content-Length: 3\r\n\r\n"
LAST: Final = b"POST /z HTTP/1.1\r\nConnection: close\r\n" + LENGTH + b"end"


@pytest.mark.parametrize(
    "packets",
    [
        pytest.param([FULL + LENGTH + b"abc" + LAST], id="at once"),
        pytest.param([FULL + LENGTH, b"a", b"bc", LAST], id="the body later"),
        pytest.param(
            [FULL + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab", b"\r\n0\r\n\r\n", LAST],
            id="chunks",
        ),
        pytest.param([b"POST /full?top_k=3 HTTP/1.1\r\n" + LENGTH + b"abc", LAST], id="a query"),
    ],
)
def test_what_the_door_refuses(client: socket.socket, packets: list[bytes]) -> None:
    """It is refused unread, its body goes nowhere, and the connection serves on."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for packet in packets:
        client.sendall(packet)

    refusal, answer = received(client).split(b"HTTP/1.1 ")[1:]

    assert refusal.startswith(b"429 Too Many Requests\r\n")
    assert b"retry-after: 3\r\n" in refusal
    assert refusal.endswith(b"\r\n\r\nfull")
    assert answer.endswith(b"POST /z 2 headers, body end")


def test_many_refusals(client: socket.socket) -> None:
    """A client that is refused again and again keeps its connection, and gets every answer."""
    found = answers(client, *[FULL + LENGTH + b"abc"] * 50, LAST)

    assert found == [b"full"] * 50 + [b"POST /z 2 headers, body end"]


@pytest.mark.parametrize(
    ("packet", "found"),
    [
        pytest.param(
            POST + LENGTH + b"abc" + FULL + LENGTH + b"abc" + LAST,
            [
                b"POST /a 2 headers, body abc",
                b"POST /full 2 headers, body abc",
                b"POST /z 2 headers, body end",
            ],
            id="behind another",
        ),
        pytest.param(
            b"POST /%66ull HTTP/1.1\r\n" + LENGTH + b"abc" + LAST,
            [b"POST /%66ull 1 headers, body abc", b"POST /z 2 headers, body end"],
            id="a coded path",
        ),
        pytest.param(
            b"POST http://x/full HTTP/1.1\r\n" + LENGTH + b"abc" + LAST,
            [b"POST /full 1 headers, body abc", b"POST /z 2 headers, body end"],
            id="a whole URL",
        ),
        pytest.param(
            b"POST /full HTTP/1.0\r\n" + LENGTH + b"abc",
            [b"POST /full 1 headers, body abc"],
            id="HTTP/1.0",
        ),
        pytest.param(
            FULL + b"Connection: close\r\n" + LENGTH + b"abc",
            [b"POST /full 3 headers, body abc"],
            id="the last",
        ),
        pytest.param(
            FULL + b"Expect: 100-continue\r\n" + LENGTH + b"abc" + LAST,
            [b"", b"POST /full 3 headers, body abc", b"POST /z 2 headers, body end"],
            id="an expectation",
        ),
    ],
)
def test_what_the_door_is_asked_later(
    client: socket.socket, packet: bytes, found: list[bytes]
) -> None:
    """Answers keep the order of the requests; rare requests go the whole way to the application."""
    assert answers(client, packet) == found


def test_heads_have_their_time_again(client: socket.socket) -> None:
    """A refused client that idles has as long for its next head as any other."""
    client.sendall(FULL + LENGTH + b"abc")
    assert client.recv(65536).endswith(b"full")
    client.settimeout(KEEP_ALIVE_S * 0.6)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.sendall(LAST[:20])
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(WITHIN_S)
    client.sendall(LAST[20:])

    assert received(client).endswith(b"POST /z 2 headers, body end")


def test_silence_after_a_refusal(client: socket.socket) -> None:
    """A refused client that sends no more is parted from like any idle one."""
    client.sendall(FULL + LENGTH + b"a")
    started = time.monotonic()

    assert received(client).endswith(b"full")
    assert KEEP_ALIVE_S * 0.5 < time.monotonic() - started < WITHIN_S


def test_a_departure_is_told(client: socket.socket) -> None:
    """Who asks the connection is told when the client goes away."""
    client.sendall(b"POST /wait HTTP/1.1\r\nHost: x\r\n" + LENGTH + b"abc")
    client.shutdown(socket.SHUT_RDWR)

    assert LEFT.wait(WITHIN_S)


def test_ended_connections_hold_nothing(address: tuple[str, int]) -> None:
    """A connection that has ended is let go at once, with what it had read."""
    gc.collect()
    gc.disable()
    try:
        before = len(Guarded.made)
        for packet in (POST + LENGTH + b"abc", FULL + LENGTH + b"abc", POST + LENGTH + b"a"):
            with socket.create_connection(address, WITHIN_S) as client:
                client.sendall(packet)
                client.settimeout(KEEP_ALIVE_S / 10)
                with suppress(TimeoutError):
                    client.recv(65536)
        made = Guarded.made[before:]
        until = time.monotonic() + WITHIN_S
        while any(one() for one in made) and time.monotonic() < until:
            threading.Event().wait(0.01)
        assert [one() for one in made] == [None] * 3
    finally:
        gc.enable()
