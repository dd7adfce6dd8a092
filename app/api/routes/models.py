"""``/v1/models``: what is loaded, what answers, the calibration evidence; and changes of it."""

import asyncio
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query

from app.api.auth import AdminRequired, ApiKeyRequired
from app.api.dependencies import ServiceOf, SettingsOf
from app.api.problems import responses
from app.api.schemas import (
    ModelList,
    ModelSummary,
    ModelVersion,
    ShadowSummary,
    VersionList,
    VersionStatus,
)
from app.serving.service import ScoringService

router = APIRouter(
    prefix="/v1/models",
    tags=["models"],
    dependencies=ApiKeyRequired,
    responses=responses(401, 503),
)
admin_router = APIRouter(
    prefix="/v1/models",
    tags=["administration"],
    dependencies=AdminRequired,
    responses=responses(401, 403, 503),
)
"""Changes what is loaded; only there where an admin token is set."""

_EXAMPLE_NAME: Final = {"bundled": {"value": "cifar10-resnet18"}}
_EXAMPLE_VERSION: Final = {"first": {"value": 1}}

Name = Annotated[str, Path(openapi_examples=_EXAMPLE_NAME)]
Version = Annotated[int, Path(ge=1, openapi_examples=_EXAMPLE_VERSION)]


@router.get("", summary="The loaded models", responses=responses(404))
async def list_models(service: ServiceOf) -> ModelList:
    """Every loaded model, and the one that answers when a request names none."""
    default = service.model().bundle.name
    return ModelList(
        default=default, models=[_summary(service, name) for name in service.models.names()]
    )


@router.get("/{name}", summary="One model", responses=responses(400, 404))
async def get_model(service: ServiceOf, name: Name) -> ModelSummary:
    """The versions of a model and which one answers."""
    return _summary(service, name)


@router.get("/{name}/versions/{version}", summary="One version", responses=responses(400, 404, 409))
async def get_version(service: ServiceOf, name: Name, version: Version) -> ModelVersion:
    """The bundle of a version, loaded or only stored: block, NormRatios, threshold, warnings."""
    service.model()
    bundle = await asyncio.to_thread(service.models.describe, name, version)
    state = service.models.state(name, version).state
    return ModelVersion(
        is_active=state == "active",
        state=state,
        engines=service.models.engines(name, version),
        bundle=bundle,
    )


@admin_router.post("/refresh", summary="Search the store for new versions")
async def refresh(service: ServiceOf) -> VersionList:
    """The new versions and what they are now, as ``NORMGATE_ON_NEW_VERSION`` says.

    One that cannot serve is ``failed`` and says why; what answered before still does.
    """
    found = await service.refresh()
    return VersionList(versions=[VersionStatus.model_validate(one) for one in found])


@admin_router.post(
    "/{name}/versions/{version}/activate",
    summary="Let a version answer from now on",
    responses=responses(400, 404, 409),
)
async def activate(service: ServiceOf, name: Name, version: Version) -> ModelSummary:
    """Loads, verifies, warms up and checks the version, then switches; the old one finishes.

    A version that cannot serve is a 409 that says why, and nothing changes.
    """
    await service.activate(name, version)
    return _summary(service, name)


@admin_router.post(
    "/{name}/versions/{version}/shadow",
    summary="Let a version look on",
    responses=responses(400, 404, 409),
)
async def start_shadow(
    service: ServiceOf,
    settings: SettingsOf,
    name: Name,
    version: Version,
    share: Annotated[
        float | None, Query(gt=0, le=1, description="Of the live images; default: the setting.")
    ] = None,
) -> ModelSummary:
    """The version scores a share of the images that the active one answers.

    It never answers itself; ``normgate_shadow_*`` in the metrics tell what it would have said.
    """
    await service.start_shadow(
        name, version, share=settings.shadow_share if share is None else share
    )
    return _summary(service, name)


@admin_router.delete("/{name}/shadow", summary="End the shadow", responses=responses(400, 404))
async def stop_shadow(service: ServiceOf, name: Name) -> ModelSummary:
    """The shadow version, if there is one, is let go."""
    await service.stop_shadow(name)
    return _summary(service, name)


def _summary(service: ScoringService, name: str) -> ModelSummary:
    active = service.model(name).bundle.version
    shadow = service.models.shadow(name)
    return ModelSummary(
        name=name,
        active_version=active,
        versions=service.models.loaded_versions(name),
        shadow=shadow and ShadowSummary(version=shadow.model.bundle.version, share=shadow.share),
    )
