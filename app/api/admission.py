"""What happens to a request before its route sees it: room, memory, and the end of the service."""

from typing import Final

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.deadline import request_deadline
from app.api.problems import error_response
from app.errors import NormGateError
from app.serving.budget import Holding
from app.serving.metrics import Metrics
from app.serving.service import ScoringService
from app.settings import Settings

_HOLDING: Final = "holding"


def holding_of(request: Request) -> Holding:
    """The request's share of the memory budget, let go when it has been answered."""
    holding: Holding = request.scope["state"][_HOLDING]
    return holding


class AdmissionMiddleware:
    """Turns away at the door what would be refused inside, before its body is read.

    Args:
        app: what answers.
        service: knows the room there is.
        metrics: told of refusals.
        settings: where images are posted to, and how long they may take.
    """

    def __init__(
        self, app: ASGIApp, *, service: ScoringService, metrics: Metrics, settings: Settings
    ) -> None:
        self._app = app
        self._service = service
        self._metrics = metrics
        self._settings = settings
        self._paths = _scoring_paths(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        holding = self._service.budget.holding()
        scope["state"][_HOLDING] = holding
        send = self._closing(send) if self._service.is_draining else send
        try:
            self._check(Request(scope), holding)
        except NormGateError as error:
            refusal = error_response(Request(scope), error, self._metrics)
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)
        finally:
            holding.release()

    def _check(self, request: Request, holding: Holding) -> None:
        if request.method not in ("POST", "PUT") or not request.url.path.startswith(self._paths):
            return
        self._service.check_room(deadline=request_deadline(request, self._settings))
        announced = request.headers.get("content-length", "")
        # A body beyond the upload limit is refused as such, by whoever reads it.
        if announced.isdecimal() and int(announced) <= self._settings.max_upload_bytes:
            holding.grow_to(int(announced))

    def _closing(self, send: Send) -> Send:
        # A client that kept its connection would send the next request into the closing socket.
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        return send_and_close


def _scoring_paths(settings: Settings) -> tuple[str, ...]:
    always = ("/v1/score", "/v2/models/")
    # An open gate lets images pass that nobody has room for: only its own route knows how.
    return (*always, "/v1/gate", "/v1/proxy/") if settings.gate_on_failure == "closed" else always
