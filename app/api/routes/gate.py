"""``/v1/gate``: a verdict as a status, for Envoy's ``ext_authz`` and its like."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query, Request, Response

from app.api.auth import ApiKeyRequired
from app.api.deadline import DEADLINE_PARAMETER, request_deadline
from app.api.dependencies import settings_of
from app.api.gatekeeper import gatekeeper_of
from app.api.problems import problem, responses
from app.api.scoring_lane import ScoringRoute
from app.errors import RequestTooLargeError

router = APIRouter(tags=["gate"], dependencies=ApiKeyRequired, route_class=ScoringRoute)

METHODS: Final = ("POST", "PUT")
"""Envoy asks with the method of the request that it holds back."""
_PARTIAL: Final = "x-envoy-auth-partial-body"
_IMAGE: Final = {"schema": {"type": "string", "format": "binary"}}
_DESCRIPTION: Final[dict[str, Any]] = {
    "responses": responses(400, 401, 404, 413, 415, 422, 429, 500, 503, 504)
    | {
        200: {"description": "In-distribution; the evidence is in the `x-normgate-*` headers."},
        403: {"description": "Out-of-distribution; the same headers."} | responses(403)[403],
    },
    "response_class": Response,
    "openapi_extra": {
        "parameters": [DEADLINE_PARAMETER],
        "requestBody": {
            "required": True,
            "content": {"image/*": _IMAGE, "application/octet-stream": _IMAGE},
        },
    },
}


async def gate(
    request: Request,
    model: Annotated[str | None, Query(description="Default: the default model.")] = None,
    version: Annotated[int | None, Query(ge=1, description="Default: the active one.")] = None,
) -> Response:
    """Send the image as the raw body: 200 lets it pass, 403 does not."""
    if request.headers.get(_PARTIAL) == "true":
        raise RequestTooLargeError("Envoy sent the beginning of the body; raise max_request_bytes")
    deadline = request_deadline(request, settings_of(request))
    verdict = await gatekeeper_of(request).judge(
        request, deadline=deadline, model=model, version=version
    )
    if verdict.name == "ood":
        return problem(request, status=403, detail=verdict.reason, headers=verdict.headers)
    return Response(headers=verdict.headers)


async def gate_path(
    request: Request,
    path: Annotated[str, Path(description="Of the request that is held back.")],
) -> Response:
    """The same for a request that is held back, whose path and query follow.

    That query is meant for another service, and is not read: it chooses no model.
    """
    return await gate(request)


for method in METHODS:
    router.add_api_route(
        "/v1/gate", gate, methods=[method], summary="May this image pass?", **_DESCRIPTION
    )
    router.add_api_route(
        "/v1/gate/{path:path}",
        gate_path,
        methods=[method],
        summary="May the request with this image pass?",
        **_DESCRIPTION,
    )
