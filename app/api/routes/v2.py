"""``/v2``: the Open Inference Protocol with the binary tensor data extension.

What Triton's extensions add is there too: model configuration, statistics and the repository.
"""

import asyncio
import time
from contextlib import suppress
from importlib import metadata
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from app.api.access_log import describe_results
from app.api.admission import holding_of
from app.api.auth import AdminRequired, ApiKeyRequired
from app.api.content_coding import accepted_coding, decode_body, encode_body
from app.api.deadline import DEADLINE_PARAMETER, in_time, request_deadline
from app.api.dependencies import MetricsOf, ServiceOf, SettingsOf
from app.api.disconnect import unless_disconnected
from app.api.problems import v2_responses
from app.api.routes.models import Name
from app.api.tensors import (
    HEADER_LENGTH,
    INPUT,
    OF_THE_LOGITS,
    InferBody,
    InferRequest,
    output_tensors,
    read_json,
    read_request,
    write_response,
)
from app.api.upload import read_body, read_bytes
from app.api.v2_schemas import (
    IndexBody,
    IndexEntry,
    InferAnswer,
    Live,
    LoadBody,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    ModelStatisticsOf,
    Ready,
    ServerMetadata,
    StatisticsList,
    UnloadBody,
    inlined,
)
from app.errors import (
    BundleNotFoundError,
    ImageError,
    MalformedRequestError,
)
from app.serving.pool import LoadedModel
from app.serving.service import ScoringService
from app.serving.worker import Detection
from app.settings import Settings
from app.store import Bundle

health_router = APIRouter(prefix="/v2", tags=["v2"])
"""Open to everybody, as the other probes are."""

router = APIRouter(
    prefix="/v2", tags=["v2"], dependencies=ApiKeyRequired, responses=v2_responses(401)
)

admin_router = APIRouter(
    prefix="/v2/repository/models",
    tags=["v2"],
    dependencies=AdminRequired,
    responses=v2_responses(400, 401, 403, 404, 409, 413, 503, 504),
)
"""Changes what is loaded; only there where an admin token is set."""

_BINARY: Final = {"schema": {"type": "string", "format": "binary"}}
_VERSION: Final[dict[str, Any]] = {
    "name": "version",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"},
    "examples": {"first": {"value": "1"}},
}
_VERSIONED: Final[dict[str, Any]] = {"openapi_extra": {"parameters": [_VERSION]}}
_OF_A_MODEL: Final[dict[str, Any]] = {"responses": v2_responses(400, 404, 503)}
_INFER: Final[dict[str, Any]] = {
    "summary": "Is each image one the classifier was trained for?",
    "response_class": Response,
    "responses": v2_responses(400, 404, 413, 415, 422, 429, 500, 503, 504)
    | {
        200: {
            "model": InferAnswer,
            "description": "The outputs; as octets where some of them are binary.",
            "content": {"application/octet-stream": _BINARY},
        }
    },
}
_INFER_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": inlined(InferBody)},
            "application/octet-stream": _BINARY,
        },
    }
}


async def _model(request: Request, service: ServiceOf, name: Name) -> LoadedModel:
    return service.model(name, _version(request.path_params.get("version")))


ModelOf = Annotated[LoadedModel, Depends(_model)]


@health_router.get("/health/live", summary="Is the process alive?")
async def live() -> Live:
    """200 as long as the event loop turns."""
    return Live()


@health_router.get("/health/ready", summary="Can it answer?", responses=v2_responses(503))
async def ready(service: ServiceOf) -> Ready:
    """200 while it wants requests, as ``/readyz``."""
    service.check_ready()
    return Ready()


@router.get("", summary="The server")
async def server_metadata() -> ServerMetadata:
    """Name, version and the protocol's extensions."""
    return ServerMetadata(version=metadata.version("normgate"))


# Before the models: "stats" stands where a name does.
@router.get("/models/stats", summary="Statistics of all models")
async def all_statistics(service: ServiceOf) -> StatisticsList:
    """The statistics of every version that answers, since it was loaded."""
    return _statistics(service, *service.models.names())


@router.get("/models/{name}/stats", summary="Statistics of a model", **_OF_A_MODEL)
async def model_statistics(service: ServiceOf, model: ModelOf) -> StatisticsList:
    """The statistics of every version of the model that answers, since it was loaded."""
    return _statistics(service, model.bundle.name)


@router.get(
    "/models/{name}/versions/{version}/stats",
    summary="Statistics of a version",
    **_OF_A_MODEL,
    **_VERSIONED,
)
async def version_statistics(model: ModelOf) -> StatisticsList:
    """Counts and times since the version was loaded."""
    found = ModelStatisticsOf.of(model.bundle, model.statistics.totals())
    return StatisticsList(model_stats=[found])


@router.get("/models/{name}/versions/{version}", **_OF_A_MODEL, **_VERSIONED)
@router.get("/models/{name}", **_OF_A_MODEL)
async def model_metadata(service: ServiceOf, model: ModelOf) -> ModelMetadata:
    """The versions that answer and the tensors."""
    name = model.bundle.name
    return ModelMetadata.of(model.bundle, service.models.loaded_versions(name))


@router.get("/models/{name}/versions/{version}/ready", **_OF_A_MODEL, **_VERSIONED)
@router.get("/models/{name}/ready", **_OF_A_MODEL)
async def model_ready(model: ModelOf) -> ModelReady:
    """200 when the model answers; 404 when it is not loaded."""
    return ModelReady(name=model.bundle.name)


@router.get("/models/{name}/versions/{version}/config", **_OF_A_MODEL, **_VERSIONED)
@router.get("/models/{name}/config", **_OF_A_MODEL)
async def model_config(model: ModelOf) -> ModelConfig:
    """Triton's model configuration."""
    return ModelConfig.of(model.bundle)


@router.post(
    "/models/{name}/versions/{version}/infer",
    **_INFER,
    openapi_extra=_INFER_BODY | {"parameters": [_VERSION, DEADLINE_PARAMETER]},
)
@router.post(
    "/models/{name}/infer",
    **_INFER,
    openapi_extra=_INFER_BODY | {"parameters": [DEADLINE_PARAMETER]},
)
async def infer(
    request: Request,
    service: ServiceOf,
    settings: SettingsOf,
    metrics: MetricsOf,
    model: ModelOf,
) -> Response:
    """One input ``image``, ``BYTES`` of shape ``[N]`` or ``[N, 1]``: encoded image files.

    If one image fails, the request does: the status is that image's, and the message names it.
    The binary tensor data extension and gzip and deflate bodies are understood, both ways.
    """
    started = time.monotonic()
    deadline = request_deadline(request, settings)
    with metrics.in_flight.track_inprogress():
        asked = await _read_infer_request(request, settings, deadline=deadline)
        metrics.observe_stage("read", time.monotonic() - started)
        if asked.timeout_s is not None:
            deadline = min(deadline, started + asked.timeout_s)
        results = await unless_disconnected(
            request,
            service.score(
                model,
                asked.images,
                deadline=deadline,
                gate=not OF_THE_LOGITS.intersection(asked.is_binary),
            ),
        )
        describe_results(request, model, results)
        response = await asyncio.to_thread(
            _answer, asked, model, _detections(results), request.headers.get("accept-encoding", "")
        )
    metrics.observe_stage("total", time.monotonic() - started)
    return response


@router.post(
    "/repository/index",
    summary="The versions in the store",
    responses=v2_responses(400, 413, 504),
    openapi_extra={
        "requestBody": {"content": {"application/json": {"schema": inlined(IndexBody)}}}
    },
)
async def repository_index(
    request: Request, service: ServiceOf, settings: SettingsOf
) -> list[IndexEntry]:
    """Every version, loaded or not; with ``ready`` only those that answer."""
    body = await _read(request, settings)
    asked = read_json(IndexBody, body or b"{}")
    entries = [IndexEntry.of(found) for found in await asyncio.to_thread(service.models.index)]
    return [entry for entry in entries if entry.state == "READY" or not asked.ready]


@admin_router.post(
    "/{name}/load",
    summary="Let the newest version answer",
    response_class=Response,
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": inlined(LoadBody)}}}},
)
async def load(request: Request, service: ServiceOf, settings: SettingsOf, name: Name) -> Response:
    """Activates the version the store points to, or its newest; a failure changes nothing.

    A ``config`` or ``file:`` in the parameters is refused: what is served is what is stored.
    """
    body = await _read(request, settings)
    read_json(LoadBody, body or b"{}")
    await service.activate(name)
    return Response()


@admin_router.post(
    "/{name}/unload",
    summary="Let a model go",
    response_class=Response,
    openapi_extra={
        "requestBody": {"content": {"application/json": {"schema": inlined(UnloadBody)}}}
    },
)
async def unload(
    request: Request, service: ServiceOf, settings: SettingsOf, name: Name
) -> Response:
    """Every version of the model finishes its requests and answers no more."""
    body = await _read(request, settings)
    read_json(UnloadBody, body or b"{}")
    await service.unload(name)
    return Response()


async def _read(request: Request, settings: Settings) -> bytes:
    deadline = request_deadline(request, settings)
    async with in_time(request, deadline):
        return await read_bytes(request, max_bytes=settings.max_upload_bytes)


async def _read_infer_request(
    request: Request, settings: Settings, *, deadline: float
) -> InferRequest:
    async with in_time(request, deadline):
        body = await read_body(request, max_bytes=settings.max_upload_bytes)
    # Beside the event loop: a large body takes long to inflate and to parse.
    return await asyncio.to_thread(_parse, request, body, settings)


def _parse(request: Request, body: bytes, settings: Settings) -> InferRequest:
    coding = request.headers.get("content-encoding", "")
    body = decode_body(body, coding, max_bytes=settings.max_upload_bytes)
    holding_of(request).grow_to(len(body))
    # Several are joined, and refused as no number: nobody knows which of them is meant.
    lengths = request.headers.getlist(HEADER_LENGTH)
    return read_request(body, header_length=", ".join(lengths) if lengths else None)


def _detections(results: list[Detection | ImageError]) -> list[Detection]:
    """The detections, of all images or of none: a tensor has no place for a missing element."""
    for index, result in enumerate(results):
        if isinstance(result, ImageError):
            raise type(result)(f"element {index} of {INPUT!r}: {result}")
    return [result for result in results if isinstance(result, Detection)]


def _answer(
    asked: InferRequest, model: LoadedModel, detections: list[Detection], accept_encoding: str
) -> Response:
    headers = {}
    with model.statistics.timing("compute_output"):
        body, header_length = _write(asked, model.bundle, detections)
        if header_length is not None:
            headers[HEADER_LENGTH] = str(header_length)
        if coding := accepted_coding(accept_encoding):
            body = encode_body(body, coding)
            headers["Content-Encoding"] = coding
    media_type = "application/json" if header_length is None else "application/octet-stream"
    return Response(body, headers=headers, media_type=media_type)


def _write(
    asked: InferRequest, bundle: Bundle, detections: list[Detection]
) -> tuple[bytes, int | None]:
    tensors = output_tensors(
        detections,
        asked.is_binary,
        labels=bundle.labels,
        top_k=asked.top_k,
    )
    return write_response(tensors, asked, model_name=bundle.name, model_version=bundle.version)


def _statistics(service: ScoringService, *names: str) -> StatisticsList:
    found = []
    for name in names:
        for version in service.models.loaded_versions(name):
            with suppress(BundleNotFoundError):  # unloaded this very moment
                model = service.model(name, version)
                found.append(ModelStatisticsOf.of(model.bundle, model.statistics.totals()))
    return StatisticsList(model_stats=found)


def _version(text: str | None) -> int | None:
    if text is None:
        return None
    # The count of digits keeps int() quick.
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise MalformedRequestError(f"version is {text[:50]!r}; it must be a positive integer")
    return int(text)
