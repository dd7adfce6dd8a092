"""``/v1/proxy``: the inline gate, which forwards what passes to the classifier behind it."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Final, cast

from fastapi import APIRouter, Path, Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.api import request_id
from app.api.auth import KEY_HEADER, ApiKeyRequired
from app.api.deadline import DEADLINE_PARAMETER, request_deadline
from app.api.dependencies import settings_of
from app.api.disconnect import unless_disconnected
from app.api.gatekeeper import HEADER_PREFIX, NO_IMAGES, gatekeeper_of
from app.api.problems import problem, responses
from app.api.scoring_lane import ScoringRoute
from app.errors import MalformedRequestError, UpstreamError
from app.serving.upstream import Answer, RawHeaders, Upstream, end_to_end
from app.settings import Settings

router = APIRouter(tags=["gate"], dependencies=ApiKeyRequired, route_class=ScoringRoute)

PREFIX: Final = "/v1/proxy/"
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_NOT_FORWARDED: Final = frozenset(
    {
        b"host",  # the upstream's own
        b"content-length",  # set anew: the body has been read whole
        b"expect",  # the body was asked for already
        KEY_HEADER.lower().encode(),
        request_id.HEADER.lower().encode(),
        b"x-forwarded-for",
        b"via",
    }
)
_NOT_PASSED_BACK: Final = frozenset({b"date"})  # every answer has the server's own
_WITHOUT_LENGTH: Final = frozenset({204, 304})
_DESCRIPTION: Final[dict[str, Any]] = {
    "summary": "Forward the request to the classifier, if its images may pass.",
    "responses": responses(400, 401, 413, 415, 422, 429, 500, 502, 503, 504)
    | {200: {"description": "The classifier's answer, with `x-normgate-*` headers."}},
    "response_class": Response,
    "openapi_extra": {"parameters": [DEADLINE_PARAMETER]},
}


async def proxy(
    request: Request,
    path: Annotated[str, Path(description="Below the upstream's URL.")],
) -> Response:
    """Images are judged before anything is forwarded; a request without a body is not judged.

    Those are an image as the raw body, or every file of a form. One out-of-distribution image is
    enough for 422 (policy `block`) or for the header that says so (policy `tag`).
    """
    settings, gatekeeper = settings_of(request), gatekeeper_of(request)
    upstream = cast(Upstream, request.app.state.upstream)
    deadline = request_deadline(request, settings)
    target = upstream.target(_encoded_path(request), request.scope["query_string"])
    body = await gatekeeper.read(request, deadline=deadline)
    verdict = await gatekeeper.judge(request, body, deadline=deadline) if body else NO_IMAGES
    if verdict.name == "ood" and settings.gate_policy == "block":
        return problem(request, status=422, detail=verdict.reason, headers=verdict.headers)
    answer = await unless_disconnected(
        request,
        upstream.send(
            request.method,
            target,
            _forwarded_headers(request, settings) + _raw(verdict.headers),
            body,
            deadline=deadline,
        ),
    )
    return _Relay(answer, verdict.headers)


class _Relay(Response):
    """The upstream's answer, passed on as it comes."""

    def __init__(self, answer: Answer, headers: Mapping[str, str]) -> None:
        super().__init__(status_code=answer.status)
        self._answer = answer
        self.raw_headers = _returned_headers(answer) + _raw(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # An answer that lacks its end cannot be taken for a whole one: the server breaks the
        # connection. A client that goes away breaks the upstream's.
        with suppress(ClientDisconnect, UpstreamError):
            await unless_disconnected(Request(scope, receive), self._pass_on(send))

    async def _pass_on(self, send: Send) -> None:
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            # The head does not wait for the first part of what may be a slow stream.
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            async for chunk in self._answer.chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            await self._answer.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _encoded_path(request: Request) -> bytes:
    encoded: bytes = request.scope["raw_path"]
    if not encoded.startswith(PREFIX.encode()):
        raise MalformedRequestError(f"{PREFIX} must not be percent-encoded")
    return encoded.removeprefix(PREFIX.encode())


def _forwarded_headers(request: Request, settings: Settings) -> list[tuple[bytes, bytes]]:
    incoming = request.headers.raw
    kept = [
        (name, value)
        for name, value in end_to_end(incoming)
        if name not in _NOT_FORWARDED
        and not _is_ours(name)
        and not (name == b"authorization" and _is_our_key(value, settings))
    ]
    names = {name for name, _ in kept}
    added = {
        b"x-forwarded-for": _appended(incoming, b"x-forwarded-for", _client_host(request)),
        b"via": _appended(incoming, b"via", f"{request.scope['http_version']} normgate"),
        request_id.HEADER.lower().encode(): request.state.request_id.encode(),
    }
    # A proxy before this one knows better what the client asked for.
    if b"x-forwarded-proto" not in names:
        added[b"x-forwarded-proto"] = request.url.scheme.encode()
    if b"x-forwarded-host" not in names and "host" in request.headers:
        added[b"x-forwarded-host"] = request.headers["host"].encode("latin-1")
    return kept + list(added.items())


def _returned_headers(answer: Answer) -> list[tuple[bytes, bytes]]:
    dropped = _NOT_PASSED_BACK | (
        {b"content-length"} if answer.status in _WITHOUT_LENGTH else set()
    )
    lower = [(name.lower(), value) for name, value in end_to_end(answer.headers)]
    return [(name, value) for name, value in lower if name not in dropped and not _is_ours(name)]


def _is_ours(name: bytes) -> bool:
    # CGI and WSGI take an underscore for a hyphen.
    return name.replace(b"_", b"-").startswith(HEADER_PREFIX.encode())


def _is_our_key(authorization: bytes, settings: Settings) -> bool:
    scheme, _, token = authorization.decode("latin-1").partition(" ")
    secrets = [*settings.api_keys, *filter(None, [settings.admin_token])]
    return scheme.lower() == "bearer" and token.strip() in {
        secret.get_secret_value() for secret in secrets
    }


def _appended(headers: RawHeaders, name: bytes, last: str) -> bytes:
    values = [value for header, value in headers if header == name]
    return b", ".join([*values, last.encode()])


def _client_host(request: Request) -> str:
    return request.client.host if request.client else "unknown"


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


for method in METHODS:
    router.add_api_route(PREFIX + "{path:path}", proxy, methods=[method], **_DESCRIPTION)
