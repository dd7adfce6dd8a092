"""The access log: one line a request, with what its route tells of it."""

import random
import time
from collections.abc import Sequence
from typing import Any, Final

import structlog
from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ImageError
from app.serving.pool import LoadedModel
from app.serving.worker import Detection

_PROBES: Final = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live"})
_PROBE_PATTERNS: Final = (("/v2/", "/ready"), ("/v1/models/", "/drift"), ("/static/", ""))
"""How their paths begin and end; the live page asks for the drift every other second."""
_OTHERS_PATHS: Final = ("/v1/gate/", "/v1/proxy/")
_MAX_PATH: Final = 256
_FAILED: Final = 500

logger = structlog.get_logger()


def describe(request: Request, **fields: str | int) -> None:
    """Add to the request's line; never an image's content or file name, never a key."""
    request.scope["state"].setdefault("log", {}).update(fields)


def describe_results(
    request: Request, model: LoadedModel, results: Sequence[Detection | ImageError]
) -> None:
    """Add to the request's line which version scored how many images, and what it found."""
    detections = [result for result in results if isinstance(result, Detection)]
    describe(
        request,
        model=model.bundle.name,
        version=model.bundle.version,
        images=len(results),
        ood=sum(detection.is_ood for detection in detections),
        failed=len(results) - len(detections),
    )


def description_of(scope: Scope) -> dict[str, Any]:
    """What :func:`describe` was told."""
    fields: dict[str, Any] = scope.get("state", {}).get("log", {})
    return fields


def path_of(scope: Scope) -> str:
    """The request's path, bounded, without its query.

    What follows behind a gate is another service's path, and may name files and customers.
    """
    path: str = scope["path"]
    for prefix in _OTHERS_PATHS:
        if path.startswith(prefix):
            return f"{prefix}{{path}}"
    return path[:_MAX_PATH]


def is_probe(scope: Scope) -> bool:
    """Whether a machine asks this every few seconds; logged at DEBUG and never traced."""
    path: str = scope["path"]
    return path in _PROBES or any(
        path.startswith(start) and path.endswith(end) for start, end in _PROBE_PATTERNS
    )


class AccessLogMiddleware:
    """Logs requests at INFO, the probes' at DEBUG.

    Args:
        app: what answers.
        sample: share of the requests that are logged; those with a status of 500 or more all are.
    """

    def __init__(self, app: ASGIApp, *, sample: float) -> None:
        self._app = app
        self._sample = sample

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        bytes_in = 0
        # An exception that passes through here is answered with it, further out.
        status = _FAILED

        async def counted() -> Message:
            nonlocal bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            return message

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, counted, watched)
        finally:
            if status >= _FAILED or random.random() < self._sample:
                duration_s = time.perf_counter() - started
                _log(scope, status=status, duration_s=duration_s, bytes_in=bytes_in)


def _log(scope: Scope, *, status: int, duration_s: float, bytes_in: int) -> None:
    log = logger.debug if is_probe(scope) else logger.info
    # The request's id and trace come from the context.
    log(
        "request",
        method=scope["method"],
        path=path_of(scope),
        status=status,
        duration_ms=round(duration_s * 1000, 3),
        bytes_in=bytes_in,
        **description_of(scope),
    )
