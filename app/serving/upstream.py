"""The classifier behind the proxy, over a pool of connections."""

import logging
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Final
from urllib.parse import unquote_to_bytes

import httpx

from app.errors import (
    DeadlineExceededError,
    MalformedRequestError,
    SettingsError,
    UpstreamError,
    UpstreamTimeoutError,
)

logger = logging.getLogger(__name__)

RawHeaders = Sequence[tuple[bytes, bytes]]

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_VISIBLE: Final = re.compile(rb"[\x21-\x7e]*")
_SEPARATORS: Final = re.compile(rb"[/\\]")
_KEEP_IDLE_S: Final = 3
"""Less than the five seconds after which many servers close an idle connection."""


def end_to_end(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    """``headers`` without those for a single connection (RFC 9110, section 7.6.1)."""
    listed = b",".join(value for name, value in headers if name.lower() == b"connection")
    named = {token.strip().lower() for token in listed.split(b",")}
    return [
        (name, value)
        for name, value in headers
        if name.lower() not in _HOP_BY_HOP and name.lower() not in named
    ]


class Answer:
    """What the upstream answers: status and headers have come, the body is on its way."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    @property
    def status(self) -> int:
        """The status code."""
        return self._response.status_code

    @property
    def headers(self) -> RawHeaders:
        """As they came."""
        return self._response.headers.raw

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, in the coding it has.

        Raises:
            UpstreamError: the upstream broke off, or fell silent.
        """
        with _own_errors():
            async for chunk in self._response.aiter_raw():
                yield chunk

    async def aclose(self) -> None:
        """Give the connection back, or break it if the body is not at its end."""
        await self._response.aclose()


class Upstream:
    """The classifier that the proxy stands in front of.

    Args:
        url: where it listens; a path is put before those of the requests.
        timeout_s: its longest silence, and the longest wait for a connection.
        connections: most connections at once.

    Raises:
        SettingsError: the URL names no host that could be called.
    """

    def __init__(self, url: str, *, timeout_s: float, connections: int) -> None:
        self._url = _parsed(url)
        self._timeout_s = timeout_s
        # A bare transport: a client would add headers, keep cookies and heed HTTP_PROXY.
        self._transport = httpx.AsyncHTTPTransport(
            limits=httpx.Limits(
                max_connections=connections,
                max_keepalive_connections=connections,
                keepalive_expiry=_KEEP_IDLE_S,
            )
        )

    def target(self, path: bytes, query: bytes) -> bytes:
        """The request target for ``path`` below the upstream's own; it can name no other host.

        Args:
            path: percent-encoded, as it came.
            query: as it came, without the question mark.

        Raises:
            MalformedRequestError: the path climbs, or has bytes that no path can have.
        """
        if not _VISIBLE.fullmatch(path + query):
            raise MalformedRequestError("the path or query has characters that must be encoded")
        if b".." in _SEPARATORS.split(unquote_to_bytes(path)):
            raise MalformedRequestError("the path must not contain '..'")
        base = self._url.raw_path.rstrip(b"/")
        return base + b"/" + path.lstrip(b"/") + (b"?" + query if query else b"")

    async def send(
        self, method: str, target: bytes, headers: RawHeaders, body: bytes, *, deadline: float
    ) -> Answer:
        """Send a request; the answer must be closed.

        Args:
            method: of the request.
            target: from :meth:`target`.
            headers: end-to-end ones, without Host and Content-Length.
            body: all of it.
            deadline: until when to wait for a connection, on the clock of ``time.monotonic``.

        Raises:
            DeadlineExceededError: no connection was free before the deadline.
            UpstreamTimeoutError: the upstream was silent for too long.
            UpstreamError: the upstream cannot be reached, or broke off.
        """
        left_s = max(0, deadline - time.monotonic())
        silence_s = self._timeout_s
        timeout = {
            "pool": left_s,
            "connect": min(left_s, silence_s),
            "read": silence_s,
            "write": silence_s,
        }
        request = httpx.Request(
            method,
            self._url,
            headers=list(headers),
            content=body,
            # The target goes onto the wire as it is; the address is the setting's alone.
            extensions={"target": target, "timeout": timeout},
        )
        with _own_errors():
            response = await self._transport.handle_async_request(request)
        answer = Answer(response)
        if not 200 <= answer.status < 600:
            await answer.aclose()
            raise UpstreamError("the upstream answered with a status that cannot be passed on")
        return answer

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise SettingsError(f"NORMGATE_UPSTREAM_URL is {url!r}: {error}") from error
    if not parsed.host or not 0 < (parsed.port or 80) < 2**16:
        raise SettingsError(f"NORMGATE_UPSTREAM_URL is {url!r}: it names no host and port")
    return parsed


@contextmanager
def _own_errors() -> Iterator[None]:
    try:
        yield
    except httpx.PoolTimeout as error:
        raise DeadlineExceededError(
            "the deadline passed before a connection to the upstream was free"
        ) from error
    except httpx.TimeoutException as error:
        raise UpstreamTimeoutError("the upstream did not answer in time") from error
    except httpx.LocalProtocolError as error:
        raise MalformedRequestError(f"the request cannot be passed on: {error}") from error
    except httpx.TransportError as error:
        # The client is not told which address this is.
        logger.warning("the upstream failed: %s: %s", type(error).__name__, error)
        raise UpstreamError("the upstream cannot be reached, or broke off") from error
