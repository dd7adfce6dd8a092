"""What surrounds a request in its route: the memory it holds, and the end of the service."""

from typing import Final

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.budget import Holding
from app.serving.service import ScoringService

_HOLDING: Final = "holding"


def holding_of(request: Request) -> Holding:
    """The request's share of the memory budget, let go when it has been answered."""
    holding: Holding = request.scope["state"][_HOLDING]
    return holding


class AdmissionMiddleware:
    """Counts what a request holds, and parts from clients when the service is about to end.

    Args:
        app: what answers.
        service: has the budget, and knows whether it ends.
    """

    def __init__(self, app: ASGIApp, *, service: ScoringService) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["state"][_HOLDING] = holding = self._service.budget.holding()
        try:
            await self._app(scope, receive, self._closing(send))
        finally:
            holding.release()

    def _closing(self, send: Send) -> Send:
        if not self._service.is_draining:
            return send

        # A client that kept its connection would send the next request into the closing socket.
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        return send_and_close
