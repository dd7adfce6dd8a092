"""``/v1/models/{name}/drift``: whether live scores are still like the calibration's."""

from typing import Annotated

from fastapi import APIRouter, Query

from app.api.auth import AdminRequired, ApiKeyRequired
from app.api.dependencies import ServiceOf
from app.api.problems import responses
from app.api.routes.models import Name
from app.api.schemas import DriftEvidence, DriftHistogram, DriftReport, OodRateWindow
from app.serving.pool import LoadedModel
from app.serving.service import ScoringService

router = APIRouter(
    prefix="/v1/models",
    tags=["models"],
    dependencies=ApiKeyRequired,
    responses=responses(400, 401, 404, 503),
)
admin_router = APIRouter(
    prefix="/v1/models",
    tags=["administration"],
    dependencies=AdminRequired,
    responses=responses(400, 401, 403, 404, 503),
)

LoadedVersion = Annotated[
    int | None,
    Query(ge=1, description="A loaded version, the shadow too; default: the active one."),
]


@router.get("/{name}/drift", summary="Have the scores drifted?")
async def get_drift(service: ServiceOf, name: Name, version: LoadedVersion = None) -> DriftReport:
    """The OOD rate of sliding windows, and the live scores against the calibration scores.

    Every scored image counts, whichever route it came by.
    """
    return _report(_loaded(service, name, version))


@admin_router.post("/{name}/drift/reset", summary="Begin the test of drift anew")
async def reset_drift(service: ServiceOf, name: Name, version: LoadedVersion = None) -> DriftReport:
    """The evidence starts again and the alarm is off; the windows go on."""
    model = _loaded(service, name, version)
    model.drift.reset()
    return _report(model)


def _loaded(service: ScoringService, name: str, version: int | None) -> LoadedModel:
    service.model(name)
    return service.models.resolve_loaded(name, version)


def _report(model: LoadedModel) -> DriftReport:
    bundle, drift = model.bundle, model.drift.drift()
    return DriftReport(
        model=bundle.name,
        version=bundle.version,
        since=drift.since,
        images=drift.images,
        alpha=bundle.threshold.alpha,
        windows=[OodRateWindow.model_validate(rate) for rate in drift.windows],
        martingale=DriftEvidence.model_validate(drift.martingale),
        ks_distance=drift.ks_distance,
        psi=drift.psi,
        histogram=DriftHistogram.model_validate(drift.histogram),
        threshold=bundle.threshold.value,
        score=bundle.score,
    )
