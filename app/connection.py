"""HTTP connections with the bounds that uvicorn's own lack, on a request's head.

It may have so many bytes, and take so long. Offers to upgrade to another protocol are declined, as
RFC 9110 section 7.8 permits: Java's client makes one with every request, and uvicorn would lose
the body. What the door refuses is refused here, which costs a fraction of a request's way through
uvicorn and the application.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.api.disconnect import DEPARTURE
from app.api.door import ASKED, STATUS, Door, Refusal
from app.api.problem_body import encode_problem
from app.api.request_id import HEADER, new_request_id

MAX_HEAD_BYTES: Final = 64 * 2**10
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
"""What uvicorn writes before the answer, where a client waits for leave to send its body."""
_JOINED_BYTES: Final = 2**16
_MAX_OFFERS: Final = 32
"""To upgrade, in what is read at once; each costs another pass over the rest of it."""


class _HeadTooLargeError(Exception):
    """A request's line and headers have more bytes than the limit."""


class Connection(HttpToolsProtocol):
    """One client's connection.

    A head has as long to arrive as an idle connection is kept. So has what a client goes on to
    send after a refusal.

    Args:
        settings: uvicorn's arguments.
        door: is asked whether a request may come in.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _is_refused = False
    _is_turned_away = False
    _is_in_head = False
    _head_bytes = 0
    """Of the parts of the head that are complete."""
    _partial_bytes = 0
    """Received while the head was incomplete, after the packet that it began in."""

    def __init__(self, *, door: Door | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._door = door
        self._on_departure: Callable[[], None] | None = None
        self._extensions: dict[str, Any] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._stop_timer()
        super().connection_lost(exc)
        if self._on_departure is not None:
            self._on_departure()
        # They lead back to this connection, which would stay until the collector of garbage comes.
        self._unset_keepalive_if_required()
        self.cycle = None  # type: ignore[assignment] # as before the first request
        self.scope, self._extensions = None, {}  # type: ignore[assignment] # as well
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        was_in_head = self._is_in_head
        try:
            self._feed(data)
            if was_in_head and self._is_in_head:
                self._partial_bytes += len(data)
                _check_head(self._partial_bytes)
        except (_HeadTooLargeError, httptools.HttpParserError) as error:
            self._refuse(error)
        else:
            if self._is_in_head or not self._is_answering():
                self._expect_head()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        # What was left of a refused body, or of an idle time, is over.
        self._stop_timer()
        self._is_in_head, self._head_bytes, self._partial_bytes = True, 0, 0
        self._is_turned_away = False
        self._extensions = {DEPARTURE: self._watch_departure}
        self.scope["extensions"] = self._extensions

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is complete."""
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request may be answered."""
        if self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserInvalidMethodError("CONNECT asks for a tunnel")
        if not self.parser.should_upgrade():
            self._stop_timer()
            self._is_in_head = False
            if refusal := self._asked_at_door():
                self._turn_away(refusal)
            else:
                super().on_headers_complete()
                # What is added to it is kept as it is; in uvicorn's array it would be copied, and
                # again where it is taken out.
                self.cycle.body = b""  # type: ignore[assignment]
                if self.scope["method"] != "HEAD":  # whose answers are a head alone
                    self.cycle.transport = _WholeAnswer(self.transport)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._is_turned_away:
            return
        if self.cycle.body and isinstance(self.cycle.body, bytes):
            # Bytes would be copied whole for every part.
            self.cycle.body = bytearray(self.cycle.body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete."""
        if not (self._is_turned_away or self.parser.should_upgrade()):
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        for _ in range(_MAX_OFFERS):
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # The parser takes what follows for another protocol's; a new one is told of no
                # offer.
                data = self._head_without_offer() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            else:
                return
        raise httptools.HttpParserError("too many offers to upgrade in one packet")

    def _head_without_offer(self) -> bytes:
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        lines = [method + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _count(self, *texts: bytes) -> None:
        self._head_bytes += sum(map(len, texts))
        _check_head(self._head_bytes)

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: Exception) -> None:
        status, text = 400, "The request is not HTTP/1.1."
        # What a callback of the parser raises comes wrapped.
        if _HeadTooLargeError in (type(error), type(error.__context__)):
            status = 431
            text = f"The request's line and headers have more than {MAX_HEAD_BYTES} bytes."
        self.logger.warning(text)
        self.transport.write(_refusal(status, text))
        if self._is_answering():
            self.transport.close()
            return
        # Closed with bytes unread, the connection would be reset and the refusal lost.
        self._is_refused = True
        self.transport.write_eof()
        self._expect_head()

    def _asked_at_door(self) -> Refusal | None:
        """What the door has against this request; None where it is to be asked later, or never."""
        if self._door is None or self._is_answering() or self.flow.write_paused:
            return None
        path = self.url.partition(b"?")[0]
        # Rare ones go uvicorn's way: it takes targets apart, and knows when to close.
        is_kept = self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive()
        is_plain = path.startswith(b"/") and b"%" not in path
        if not (is_plain and is_kept) or self.expect_100_continue:
            return None
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["path"] = path.decode("ascii", "replace")
        self._extensions[ASKED] = {}
        return self._door.refusal(cast("Scope", self.scope))

    def _turn_away(self, refusal: Refusal) -> None:
        self._is_turned_away = True
        fields = [*self.server_state.default_headers, *refusal.headers]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in fields)
        self.transport.write(STATUS_LINE[STATUS] + head + b"\r\n" + refusal.body)

    def _watch_departure(self, on_departure: Callable[[], None] | None) -> None:
        self._on_departure = on_departure
        if on_departure is None:
            return
        # A connection that is not read would end unseen, as it does behind a pipelined request.
        self.flow.resume_reading()
        if self.transport.is_closing():
            self.loop.call_soon(on_departure)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class _WholeAnswer:
    """The transport of one answer, whose head leaves with the beginning of its body.

    uvicorn writes them one after the other, and each write is a packet that both ends pay for. ASGI
    lets a server keep the head until then.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None
        self._has_begun = False

    def write(self, data: bytes) -> None:
        """Write a part of the answer, or keep it if it is the head."""
        if not self._has_begun and data != _CONTINUE:
            self._head, self._has_begun = data, True
            return
        if self._head is not None:
            if len(data) <= _JOINED_BYTES:
                data = self._head + data
            else:  # to copy it would cost more than a packet
                self._transport.write(self._head)
            self._head = None
        self._transport.write(data)

    def close(self) -> None:
        """Write what is kept, and close the connection."""
        if self._head is not None and not self._transport.is_closing():
            self.write(b"")
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._transport.is_closing()


def _refusal(status: int, text: str) -> bytes:
    """An answer as the application would give it, which has not heard of the request."""
    request_id = new_request_id()
    # Which path was asked for is unknown, or not worth believing.
    body, media_type = encode_problem("", status=status, detail=text, request_id=request_id)
    fields = (
        f"content-type: {media_type}",
        f"{HEADER}: {request_id}",
        "connection: close",
        f"content-length: {len(body)}",
    )
    return STATUS_LINE[status] + "\r\n".join([*fields, "", ""]).encode() + body


def _check_head(count: int) -> None:
    if count > MAX_HEAD_BYTES:
        raise _HeadTooLargeError
