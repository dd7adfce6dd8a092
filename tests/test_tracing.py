"""Traces of requests, as a collector on the loopback interface receives them."""

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from app.api.access_log import describe
from app.api.request_id import RequestIdMiddleware
from app.errors import SettingsError
from app.main import create_app
from app.serving.stages import Interval, Stage, intervals
from app.settings import Settings
from app.tracing import Tracing
from tests.api.conftest import STORE, wait_until_ready
from tests.pictures import jpeg

ROOT = Path(__file__).resolve().parents[1]
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


class Collector(ThreadingHTTPServer):
    """Keeps the spans that are posted to it."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.status = status
        self.paths: list[str] = []
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}

    @property
    def url(self) -> str:
        """Its base address."""
        return f"http://127.0.0.1:{self.server_port}"


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        """Take spans in."""
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.paths.append(self.path)
        for one in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.resource |= values(one.resource.attributes)
            for scope in one.scope_spans:
                self.server.spans.extend(scope.spans)
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


@contextmanager
def collecting(status: int = 200) -> Iterator[Collector]:
    """A collector that answers with ``status``."""
    with Collector(status) as collector:
        serving = threading.Thread(target=collector.serve_forever)
        serving.start()
        try:
            yield collector
        finally:
            collector.shutdown()
            serving.join()


def record(stage: Stage, started: float, ended: float) -> None:
    """Keep an interval, as the service does."""
    if (kept := intervals()) is not None:
        kept.append(Interval(stage, started, ended))


@contextmanager
def traced(endpoint: str) -> Iterator[TestClient]:
    """A small application that is traced; its spans are sent at the exit."""
    app = FastAPI()

    @app.post("/score/{name}")
    async def score(request: Request, name: str) -> None:
        now = time.monotonic()
        record("read", now - 0.5, now - 0.25)
        await asyncio.gather(*(decode(now) for _ in range(2)))
        describe(request, model=name, images=2)

    async def decode(now: float) -> None:
        record("decode", now - 0.25, now)

    @app.post("/many")
    async def many() -> None:
        for _ in range(1000):
            record("decode", 1, 2)

    @app.get("/bug")
    async def fail() -> None:
        raise RuntimeError("a bug")

    @app.get("/livez")
    async def livez() -> None:
        record("read", 1, 2)

    tracing = Tracing(endpoint)
    tracing.install(app)
    app.add_middleware(RequestIdMiddleware)
    try:
        yield TestClient(app, raise_server_exceptions=False)
    finally:
        tracing.stop()


def values(attributes: Any) -> dict[str, Any]:
    """Attributes by name."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


def seconds(span: Span) -> float:
    """How long a span took."""
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_a_request() -> None:
    """The server span continues the caller's trace; the stages are its children, in time."""
    headers = {"traceparent": CALLER, "x-request-id": "abc", "user-agent": "me"}
    with collecting() as collector:
        before_s = time.time()
        with traced(collector.url) as client:
            client.post("/score/m?key=secret", headers=headers)
        after_s = time.time()

    assert set(collector.paths) == {"/v1/traces"}
    assert collector.resource["service.name"] == "normgate"
    [server] = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert server.trace_id.hex() == CALLER.split("-")[1]
    assert server.parent_span_id.hex() == CALLER.split("-")[2]
    assert server.name == "POST /score/{name}"
    told = values(server.attributes)
    assert told.pop("server.port") > 0
    assert told == {
        "http.request.method": "POST",
        "http.route": "/score/{name}",
        "http.response.status_code": 200,
        "network.protocol.version": "1.1",
        "normgate.images": 2,
        "normgate.model": "m",
        "normgate.request_id": "abc",
        "server.address": "testserver",
        "url.path": "/score/m",
        "url.scheme": "http",
        "user_agent.original": "me",
    }
    stages = [span for span in collector.spans if span is not server]
    assert [span.name for span in stages] == ["read", "decode", "decode"]
    for span in stages:
        assert (span.trace_id, span.parent_span_id) == (server.trace_id, server.span_id)
        assert seconds(span) == pytest.approx(0.25, abs=1e-3)
        assert before_s - 0.51 <= span.start_time_unix_nano / 1e9
        assert span.end_time_unix_nano / 1e9 <= after_s


def test_what_is_not_traced() -> None:
    """Neither probes, nor requests whose caller decided against it."""
    with collecting() as collector, traced(collector.url) as client:
        client.get("/livez")
        client.post("/score/m", headers={"traceparent": UNSAMPLED})

    assert collector.spans == []


def test_a_bug() -> None:
    """A request that the server fails on is an error, with the status that went out."""
    with collecting() as collector, traced(collector.url) as client:
        client.get("/bug")

    [span] = collector.spans
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert values(span.attributes)["http.response.status_code"] == 500
    assert values(span.attributes)["error.type"] == "500"


def test_many_stages() -> None:
    """A request of many images has so many children, and says how many are left out."""
    with collecting() as collector, traced(collector.url) as client:
        client.post("/many")

    assert len(collector.spans) == 1 + 128
    [server] = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert values(server.attributes)["normgate.stages_left_out"] == 1000 - 128


@pytest.mark.parametrize("status", [None, 400, 503])
def test_a_collector_that_is_away(
    status: int | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are answered, one line tells why no trace arrives, and the end is not held up."""
    monkeypatch.setattr("app.tracing._FLUSH_S", 0.2)
    lines: list[MutableMapping[str, Any]]
    with collecting(status or 200) as collector:
        if status is None:
            collector.server_close()
        with capture_logs() as lines, caplog.at_level(logging.WARNING):
            started = time.monotonic()
            with traced(collector.url) as client:
                answers = [client.post("/score/m").status_code for _ in range(200)]
            took_s = time.monotonic() - started

    assert answers == [200] * 200
    failed = [line for line in lines if line["event"] == "traces cannot be sent"]
    assert len(failed) == 1
    assert failed[0]["reason"]
    assert not caplog.records
    assert took_s < 30


def test_the_service() -> None:
    """A scored image is one trace: read, decode, queue and forward, one after the other."""
    with collecting() as collector:
        app = create_app(Settings(model_store=STORE, otlp_endpoint=f"{collector.url}/"))
        with TestClient(app) as client, capture_logs([merge_contextvars]) as lines:
            wait_until_ready(client)
            answer = client.post("/v1/score", content=jpeg(1), headers={"traceparent": CALLER})

    assert answer.status_code == 200
    assert set(collector.paths) == {"/v1/traces"}
    [server] = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    stages = [span for span in collector.spans if span is not server]
    assert [span.name for span in stages] == ["read", "decode", "queue", "forward"]
    times = [server.start_time_unix_nano]
    for span in stages:
        assert (span.trace_id, span.parent_span_id) == (server.trace_id, server.span_id)
        times += [span.start_time_unix_nano, span.end_time_unix_nano]
    # Two clocks are read, one after the other, and float seconds are rounded.
    tolerance_ns = 100_000
    assert all(after - before > -tolerance_ns for before, after in pairwise(times))
    assert times[-1] <= server.end_time_unix_nano + tolerance_ns
    told = values(server.attributes)
    assert (told["normgate.model"], told["normgate.images"]) == ("cifar10-resnet18", 1)
    [line] = [line for line in lines if line.get("path") == "/v1/score"]
    assert line["trace_id"] == CALLER.split("-")[1]


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector without the extra that sends to it ends the start with one clear line."""
    monkeypatch.delitem(sys.modules, "app.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    settings = Settings(model_store=STORE, otlp_endpoint="http://127.0.0.1:4318")

    with pytest.raises(SettingsError, match=r"NORMGATE_OTLP_ENDPOINT .* 'normgate\[otel\]'"):
        create_app(settings)


@pytest.mark.slow
def test_nothing_is_loaded_without_an_endpoint() -> None:
    """A server without a collector loads no SDK."""
    code = (
        "import sys; from app.main import create_app; from app.settings import Settings;"
        "create_app(Settings());"
        "sys.exit(any(name in sys.modules for name in ('app.tracing', 'opentelemetry.sdk')))"
    )

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
