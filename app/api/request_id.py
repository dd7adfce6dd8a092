"""``X-Request-ID``: echoed when it is a sane one, made otherwise, and on every response."""

import random
import re
from typing import Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = "X-Request-ID"
_SANE: Final = re.compile(r"[\x21-\x7e]{1,128}")


def request_id_of(scope: Scope) -> str:
    """The id that a request offers, when it is a sane one, or a new one."""
    offered = Headers(scope=scope).get(HEADER, "")
    if _SANE.fullmatch(offered):
        return offered
    return new_request_id()


def new_request_id() -> str:
    """An id for a request that offers none."""
    # Not uuid4: it asks the system for every one, and waits for the interpreter's lock after.
    return f"{random.getrandbits(128):032x}"


class RequestIdMiddleware:
    """Gives every request, its response and its log lines the request's id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        # Not unbound at the end: uvicorn logs the traceback of a bug after that, in this context.
        structlog.contextvars.bind_contextvars(request_id=request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
