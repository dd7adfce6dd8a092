"""What Ray Serve's HTTP proxies answer by themselves, in the words that clients were told.

Imported by the proxies, which load no model: nothing here needs torch or Ray.
"""

from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problem_body import encode_problem
from app.api.request_id import HEADER, request_id_of

CALLBACK: Final = "app.distributed.proxy.middlewares"
"""For ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``, in the environment of the proxies."""

_UNAVAILABLE: Final = 503
_RETRY_AFTER_S: Final = 1
_LOST: Final = "the replica that had the request was lost; another will answer"
_FORWARDING: Final = "/v1/proxy/"


def middlewares() -> list[Middleware]:
    """What the proxies put before themselves."""
    return [Middleware(ProxyAnswers)]


class ProxyAnswers:
    """Tells clients to come back when it was Ray, not NormGate, that had no answer.

    A request whose replica died has no answer at all, and the server would make a bare 500 of it.
    Scoring changes nothing, so it may be asked again: 503 with ``Retry-After``. What is forwarded
    to a classifier of the operator's stays a 500, since nobody knows whether it arrived.

    Args:
        app: the proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_started = False

        async def send_on(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                _amend(message)
            await send(message)

        await self._app(scope, receive, send_on)
        # Serve has noted by now under which prefix the application stands.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not has_started and not path.startswith(_FORWARDING):
            await _send_lost(scope, path, send)


def _amend(start: Message) -> None:
    headers = MutableHeaders(scope=start)
    if start["status"] == _UNAVAILABLE:
        headers.setdefault("Retry-After", str(_RETRY_AFTER_S))
    # The proxy adds the id that it knows to the replica's own.
    if (request_id := headers.get(HEADER)) is not None:
        headers[HEADER] = request_id


async def _send_lost(scope: Scope, path: str, send: Send) -> None:
    request_id = request_id_of(scope)
    body, media_type = encode_problem(
        path, status=_UNAVAILABLE, detail=_LOST, request_id=request_id
    )
    headers = Headers(
        {
            "Content-Type": media_type,
            "Content-Length": str(len(body)),
            "Retry-After": str(_RETRY_AFTER_S),
            HEADER: request_id,
        }
    )
    await send({"type": "http.response.start", "status": _UNAVAILABLE, "headers": headers.raw})
    await send({"type": "http.response.body", "body": body})
