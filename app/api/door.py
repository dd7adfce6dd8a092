"""The door: where a request that would only be refused inside is refused at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from app.api.deadline import deadline_of
from app.api.problem_body import encode_problem
from app.api.request_id import HEADER, request_id_of
from app.errors import MalformedRequestError, NotReadyError, QueueFullError
from app.serving.metrics import Metrics
from app.serving.service import ScoringService
from app.settings import Settings

ASKED: Final = "normgate.door"
"""Extension of a scope whose request has been let in already."""
STATUS: Final = 429
_WITH_BODY: Final = ("POST", "PUT")
_PROXY: Final = "/v1/proxy/"


@dataclass(frozen=True)
class Refusal:
    """An answer of ``STATUS``."""

    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


class Door:
    """Stands before the whole application, and costs a small part of it.

    Under overload most requests are refused; what each of them costs is taken from those that are
    answered. A connection asks for the refusal as soon as it has read a request's head; what did
    not come that way is refused when it gets here. A refusal is counted, and leaves no line in the
    log.

    Args:
        app: as ``create_app`` makes it.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._service: ScoringService = app.state.service
        self._metrics: Metrics = app.state.metrics
        self._settings: Settings = app.state.settings
        self._paths = _scoring_paths(self._settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        refusal = None
        if scope["type"] == "http" and ASKED not in scope.get("extensions", ()):
            refusal = self.refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        start = {"type": "http.response.start", "status": STATUS, "headers": refusal.headers}
        await send(start)
        await send({"type": "http.response.body", "body": refusal.body})

    def refusal(self, scope: Scope) -> Refusal | None:
        """Why a request may not come in now; None lets it in.

        Args:
            scope: of which the method, the path and the headers count.
        """
        if (
            scope["method"] in _WITH_BODY
            and scope["path"].startswith(self._paths)
            and not self._is_exempt(scope)
            and (error := self._error(scope))
        ):
            return self._told(error, scope)
        return None

    def _is_exempt(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        # A script may read only what says so, and the door does not know how.
        is_cross_origin = bool(self._settings.cors_origins) and b"origin" in headers
        # The proxy passes on what has no body, and needs no room for it.
        has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        return is_cross_origin or (not has_body and scope["path"].startswith(_PROXY))

    def _error(self, scope: Scope) -> QueueFullError | None:
        try:
            self._service.check_room(deadline=deadline_of(scope, self._settings))
        except QueueFullError as error:
            return error
        except (MalformedRequestError, NotReadyError):
            return None  # for the route to say
        return None

    def _told(self, error: QueueFullError, scope: Scope) -> Refusal:
        self._metrics.reject("queue_full")
        request_id = request_id_of(scope)
        body, media_type = encode_problem(
            scope["path"], status=STATUS, detail=str(error), request_id=request_id
        )
        headers = [
            (b"content-type", media_type.encode()),
            (b"content-length", b"%d" % len(body)),
            (b"retry-after", b"%d" % error.retry_after_s),
            (HEADER.lower().encode(), request_id.encode()),
        ]
        return Refusal(headers, body)


def _scoring_paths(settings: Settings) -> tuple[str, ...]:
    always = ("/v1/score", "/v2/models/")
    # An open gate lets images pass that nobody has room for: only its own route knows how.
    return (*always, "/v1/gate", _PROXY) if settings.gate_on_failure == "closed" else always
