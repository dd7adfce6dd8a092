"""Load for a server on this machine: closed loop and open loop over kept connections.

Open loop means that requests are sent when their time has come, whatever has become of those
before: the only kind of load that shows what overload does.
"""

import asyncio
import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, cast
from urllib.parse import urlsplit

import httptools
import numpy as np

TIMEOUT_S: Final = 60


@dataclass(frozen=True)
class Answer:
    """How one request ended; a status of 0 is a connection that broke."""

    sent: float
    seconds: float
    status: int
    has_retry_after: bool


def post(url: str, data: bytes, headers: dict[str, str] | None = None) -> bytes:
    """A request with an image as its body, ready to be written."""
    parts = urlsplit(url)
    lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += ["Content-Type: image/jpeg", f"Content-Length: {len(data)}", "", ""]
    return "\r\n".join(lines).encode() + data


class _Connection(asyncio.Protocol):
    """One kept connection; one request at a time."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._answered: asyncio.Future[tuple[int, bool]] | None = None
        self._has_retry_after = False
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's own is no subclass of what it behaves like.
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._answered is not None and not self._answered.done():
            self._answered.set_result((0, False))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._has_retry_after = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._has_retry_after |= name.lower() == b"retry-after"

    def on_message_complete(self) -> None:
        assert self._answered is not None
        if not self._parser.should_keep_alive():
            self.is_open = False
            self._transport.close()
        if not self._answered.done():
            self._answered.set_result((self._parser.get_status_code(), self._has_retry_after))

    async def ask(self, request: bytes) -> Answer:
        """Send a request and wait for its answer."""
        self._answered = asyncio.get_running_loop().create_future()
        sent = time.perf_counter()
        self._transport.write(request)
        status, has_retry_after = await self._answered
        return Answer(sent, time.perf_counter() - sent, status, has_retry_after)

    def close(self) -> None:
        """End the connection."""
        self._transport.close()


class _Pool:
    """Connections that are not in use, the latest first."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._idle: list[_Connection] = []

    async def ask(self, request: bytes) -> Answer:
        connection = self._take() or await self._open()
        answer = await connection.ask(request)
        if connection.is_open:
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, *self._address)
        return connection


async def closed_loop(
    url: str, requests: Sequence[bytes], *, clients: int, seconds: float
) -> list[Answer]:
    """The answers to ``clients`` clients that ask again as soon as they are answered."""
    pool, endless = _Pool(url), itertools.cycle(requests)
    end = time.perf_counter() + seconds

    async def client() -> list[Answer]:
        answers = []
        while time.perf_counter() < end:
            answers.append(await pool.ask(next(endless)))
        return answers

    with _without_collections():
        async with asyncio.timeout(seconds + TIMEOUT_S):
            found = await asyncio.gather(*(client() for _ in range(clients)))
    pool.close()
    return [answer for answers in found for answer in answers]


async def open_loop(
    url: str, requests: Sequence[bytes], *, rate: float, seconds: float, seed: int = 0
) -> list[Answer]:
    """The answers to requests that arrive as a Poisson process of ``rate`` a second."""
    pool, endless = _Pool(url), itertools.cycle(requests)
    asked: list[asyncio.Task[Answer]] = []
    with _without_collections():
        async with asyncio.timeout(seconds + TIMEOUT_S):
            start = time.perf_counter()
            for due in _arrivals(rate, seconds, seed):
                if (ahead := start + due - time.perf_counter()) > 0:
                    await asyncio.sleep(ahead)
                asked.append(asyncio.ensure_future(pool.ask(next(endless))))
            answers = await asyncio.gather(*asked)
    pool.close()
    return answers


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage is collected inside: the pauses would be measured as the server's."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    generator, due = random.Random(seed), 0.0
    while (due := due + generator.expovariate(rate)) < seconds:
        yield due


def percentile_ms(answers: Sequence[Answer], share: float) -> float:
    """The time below which ``share`` percent of the answers came, in milliseconds."""
    times = [answer.seconds for answer in answers]
    return float(1000 * np.percentile(times, share)) if times else float("nan")


def goodput(
    answers: Sequence[Answer], *, is_good: Callable[[Answer], bool], seconds: float
) -> float:
    """Good answers a second, of those that came while requests were being sent.

    The first fifth is left out: a queue that fills is no steady state.
    """
    start = min(answer.sent for answer in answers)
    first, last = start + seconds / 5, start + seconds
    counted = sum(
        first <= answer.sent + answer.seconds < last and is_good(answer) for answer in answers
    )
    return counted / (last - first)
