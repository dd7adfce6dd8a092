"""A classifier behind the proxy, faked: it notes what arrives and answers as told."""

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\ncat"
TIMEOUT_S = 20


@dataclass(frozen=True)
class Received:
    """One request, as it stood on the wire."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        """Every value of a header."""
        return [value for key, value in self.headers if key.lower() == name]


Answer = Callable[[socket.socket, Received], None]


def sending(response: bytes) -> Answer:
    """An answer of these very bytes."""
    return lambda connection, _: connection.sendall(response)


@dataclass
class FakeUpstream:
    """What arrived, and what is answered."""

    url: str
    answer: Answer = field(default_factory=lambda: sending(OK))
    received: list[Received] = field(default_factory=list)


@contextmanager
def upstream() -> Iterator[FakeUpstream]:
    """A fake on a free port."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        host, port = server.server_address[:2]
        server.fake = FakeUpstream(f"http://{host!s}:{port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.fake
        finally:
            server.shutdown()
            thread.join()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    fake: FakeUpstream


class _Handler(socketserver.StreamRequestHandler):
    timeout = TIMEOUT_S
    server: _Server

    def handle(self) -> None:
        # A proxy may go away at any moment; that is not this fake's business.
        with suppress(OSError):
            while (request := self._read()) is not None:
                self.server.fake.received.append(request)
                self.server.fake.answer(self.connection, request)

    def _read(self) -> Received | None:
        line = self.rfile.readline().decode("latin-1").split()
        if not line:
            return None
        headers = []
        while header := self.rfile.readline().decode("latin-1").strip():
            name, _, value = header.partition(":")
            headers.append((name, value.strip()))
        length = int(
            dict((name.lower(), value) for name, value in headers).get("content-length", 0)
        )
        return Received(line[0], line[1], headers, self.rfile.read(length))
