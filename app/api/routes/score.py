"""``POST /v1/score``: verdicts and predictions for one or more images."""

import math
import time
from collections.abc import Sequence
from typing import Annotated, Any, Final

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic_core import to_json

from app.api.access_log import describe_results
from app.api.auth import ApiKeyRequired
from app.api.deadline import DEADLINE_PARAMETER, in_time, request_deadline
from app.api.dependencies import metrics_of, service_of, settings_of
from app.api.disconnect import unless_disconnected
from app.api.problems import responses
from app.api.schemas import ScoreResponse
from app.api.scoring_lane import ScoringRoute
from app.api.upload import FIELD, Upload, read_uploads
from app.errors import ForwardError, ImageError
from app.serving.pool import LoadedModel
from app.serving.worker import Detection

router = APIRouter(tags=["score"], dependencies=ApiKeyRequired, route_class=ScoringRoute)

_IMAGE: Final = {"schema": {"type": "string", "format": "binary"}}
_REQUEST_BODY: Final = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {
                    FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}}
                },
            }
        },
        "image/*": _IMAGE,
        "application/octet-stream": _IMAGE,
    },
}


@router.post(
    "/v1/score",
    summary="Is each image one the classifier was trained for?",
    response_model=ScoreResponse,
    responses=responses(400, 401, 404, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra={"parameters": [DEADLINE_PARAMETER], "requestBody": _REQUEST_BODY},
)
async def score(
    request: Request,
    model: Annotated[str | None, Query(description="Default: the default model.")] = None,
    version: Annotated[int | None, Query(ge=1, description="Default: the active one.")] = None,
    top_k: Annotated[int, Query(ge=0, le=1000, description="Predictions an image.")] = 1,
) -> Response:
    """Send images as ``file`` parts of a form, or one image as the raw body.

    With one image its failure is the response's status; with several the status is 200 and each
    result carries its own ``error``.
    """
    started = time.monotonic()
    service, settings, metrics = service_of(request), settings_of(request), metrics_of(request)
    deadline = request_deadline(request, settings)
    with metrics.in_flight.track_inprogress():
        loaded = service.model(model, version)
        async with in_time(request, deadline):
            uploads = await read_uploads(request, max_bytes=settings.max_upload_bytes)
        metrics.observe_stage("read", time.monotonic() - started)
        results = await unless_disconnected(
            request,
            service.score(loaded, [upload.data for upload in uploads], deadline=deadline),
        )
    describe_results(request, loaded, results)
    if len(results) == 1 and isinstance(results[0], ImageError):
        raise results[0]
    metrics.observe_stage("total", time.monotonic() - started)
    answer = {
        "model": loaded.bundle.name,
        "version": loaded.bundle.version,
        "request_id": request.state.request_id,
        "results": [
            _as_json(upload, result, loaded, top_k=top_k)
            for upload, result in zip(uploads, results, strict=True)
        ],
    }
    # A plain response: validating what was just computed would cost more than the scoring.
    return Response(to_json(answer), media_type="application/json")


def _as_json(
    upload: Upload, result: Detection | ImageError, model: LoadedModel, *, top_k: int
) -> dict[str, Any]:
    if isinstance(result, ImageError):
        nothing = dict.fromkeys(("verdict", "feature_norm", "score", "threshold", "p_value"))
        return {"filename": upload.filename} | nothing | {"predictions": [], "error": str(result)}
    return {
        "filename": upload.filename,
        "verdict": result.verdict,
        "feature_norm": result.feature_norm,
        "score": result.score,
        "threshold": result.threshold,
        "p_value": result.p_value,
        "predictions": _top_predictions(result, model.bundle.labels, top_k=top_k),
        "error": None,
    }


def _top_predictions(
    detection: Detection, labels: Sequence[str], *, top_k: int
) -> list[dict[str, Any]]:
    if top_k == 0:
        return []
    assert detection.prediction is not None, "only a gate's detection is without one"
    first, probability = detection.prediction
    if not math.isfinite(probability):
        raise ForwardError("the network gave logits that are not finite")
    best = [(first, probability)] if top_k == 1 else _most_probable(detection, top_k=top_k)
    return [{"label": labels[i], "index": i, "probability": share} for i, share in best]


def _most_probable(detection: Detection, *, top_k: int) -> list[tuple[int, float]]:
    assert detection.logits is not None, "what has a prediction has them"
    best = np.argsort(-detection.logits, kind="stable")[:top_k]
    exponentials = np.exp(detection.logits.astype(np.float64) - detection.logits[best[0]])
    return list(zip(best.tolist(), (exponentials[best] / exponentials.sum()).tolist(), strict=True))
