"""Errors as RFC 9457 problem details; the one place that knows HTTP status codes."""

import http
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from app.api.access_log import describe
from app.api.problem_body import MEDIA_TYPE, encode_problem
from app.api.request_id import HEADER
from app.errors import (
    ActivationError,
    BundleError,
    BundleNotFoundError,
    BusyError,
    DeadlineExceededError,
    ForbiddenError,
    ForwardError,
    ImageTooLargeError,
    MalformedRequestError,
    MemoryBudgetError,
    NormGateError,
    NotReadyError,
    QueueFullError,
    RequestTooLargeError,
    ReviewNotFoundError,
    StoreUnavailableError,
    UnauthorizedError,
    UndecodableImageError,
    UnsupportedImageError,
    UpstreamError,
    UpstreamTimeoutError,
)
from app.serving.metrics import Metrics, RejectReason

_CLIENT_CLOSED_REQUEST: Final = 499
"""nginx's code for a client that went away first; never on the wire."""
_METHOD_NOT_ALLOWED: Final = 405
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

STATUS: Final[Mapping[type[NormGateError], int]] = {
    MalformedRequestError: 400,
    UnauthorizedError: 401,
    ForbiddenError: 403,
    BundleNotFoundError: 404,
    ReviewNotFoundError: 404,
    ActivationError: 409,
    BundleError: 409,
    RequestTooLargeError: 413,
    UnsupportedImageError: 415,
    ImageTooLargeError: 422,
    UndecodableImageError: 422,
    QueueFullError: 429,
    MemoryBudgetError: 429,
    ForwardError: 500,
    UpstreamError: 502,
    NotReadyError: 503,
    StoreUnavailableError: 503,
    DeadlineExceededError: 504,
    UpstreamTimeoutError: 504,
}
REASONS: Final[Mapping[type[NormGateError], RejectReason]] = {
    MalformedRequestError: "malformed",
    BundleNotFoundError: "malformed",
    ReviewNotFoundError: "malformed",
    ActivationError: "failed",
    BundleError: "failed",
    StoreUnavailableError: "failed",
    UnauthorizedError: "unauthorized",
    ForbiddenError: "unauthorized",
    RequestTooLargeError: "too_large",
    ImageTooLargeError: "too_large",
    UnsupportedImageError: "unsupported",
    UndecodableImageError: "undecodable",
    QueueFullError: "queue_full",
    MemoryBudgetError: "memory",
    ForwardError: "failed",
    NotReadyError: "not_ready",
    DeadlineExceededError: "deadline",
    UpstreamError: "upstream",
    UpstreamTimeoutError: "upstream",
}


class Problem(BaseModel):
    """An error, as RFC 9457 describes it."""

    type: str = Field(examples=["https://www.rfc-editor.org/rfc/rfc9110#status.422"])
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["image is 9000x9000 pixels (81.0 MP); the limit is 50.0 MP"])
    request_id: str


class ErrorMessage(BaseModel):
    """An error, as the Open Inference Protocol has it."""

    error: str = Field(examples=["no model 'unknown' is loaded; there are: cifar10-resnet18"])


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of the problems a route may answer with."""
    return {
        status: {
            "description": http.HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
        }
        for status in statuses
    }


def v2_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of the errors a route under ``/v2`` may answer with."""
    return {
        status: {"description": http.HTTPStatus(status).phrase, "model": ErrorMessage}
        for status in statuses
    }


def problem(
    request: Request, *, status: int, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """A problem response."""
    body, media_type = encode_problem(
        request.scope["path"], status=status, detail=detail, request_id=request.state.request_id
    )
    return Response(body, status, headers, media_type=media_type)


def error_response(request: Request, error: NormGateError, metrics: Metrics) -> Response:
    """The problem that tells of a domain error, which is counted."""
    _reject(request, REASONS.get(type(error), "failed"), metrics)
    status = STATUS.get(type(error), 500)
    detail = str(error) if status != 500 else "the server failed on this request"
    headers = {}
    if isinstance(error, BusyError | NotReadyError | StoreUnavailableError):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, DeadlineExceededError):
        headers["Retry-After"] = str(request.app.state.service.retry_after_s())
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    return problem(request, status=status, detail=detail, headers=headers)


def _reject(request: Request, reason: RejectReason, metrics: Metrics) -> None:
    metrics.reject(reason)
    describe(request, reason=reason)


def _allowed(request: Request) -> list[str]:
    """The methods that the path is answered to; a route that refuses one knows its own alone."""
    scopes = {method: dict(request.scope, method=method) for method in _METHODS}
    return [
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    ]


def install(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error of ``app`` with a problem, and count it."""

    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, NormGateError)
        return error_response(request, error, metrics)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        _reject(request, "malformed", metrics)
        first = error.errors()[0]
        where = " ".join(map(str, first["loc"]))
        detail = f"{where} is {first.get('input')!r}: {first['msg']}"
        return problem(request, status=400, detail=detail)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = error.headers
        if error.status_code == _METHOD_NOT_ALLOWED:
            headers = {"Allow": ", ".join(_allowed(request))}
        return problem(request, status=error.status_code, detail=str(error.detail), headers=headers)

    async def on_disconnect(request: Request, error: Exception) -> Response:
        _reject(request, "abandoned", metrics)
        return Response(status_code=_CLIENT_CLOSED_REQUEST)  # nobody is there to read it

    async def on_bug(request: Request, error: Exception) -> Response:
        # The server logs the traceback; a client never sees internals. This answer does not pass
        # through the middleware that adds the header.
        _reject(request, "failed", metrics)
        return problem(
            request,
            status=500,
            detail="the server failed on this request",
            headers={HEADER: request.state.request_id},
        )

    app.add_exception_handler(NormGateError, on_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_bug)
