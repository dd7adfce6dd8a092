"""``GET /v1/models``: what is loaded, what is active, and the calibration evidence."""

from typing import Annotated, Final

from fastapi import APIRouter, Path

from app.api.dependencies import ServiceOf
from app.api.problems import responses
from app.api.schemas import ModelList, ModelSummary, ModelVersion
from app.serving.pool import LoadedModel

router = APIRouter(prefix="/v1/models", tags=["models"], responses=responses(404, 503))

_EXAMPLE_NAME: Final = {"bundled": {"value": "cifar10-resnet18"}}
_EXAMPLE_VERSION: Final = {"first": {"value": 1}}

Name = Annotated[str, Path(openapi_examples=_EXAMPLE_NAME)]
Version = Annotated[int, Path(ge=1, openapi_examples=_EXAMPLE_VERSION)]


@router.get("", summary="The loaded models")
async def list_models(service: ServiceOf) -> ModelList:
    """Every loaded model, and the one that answers when a request names none."""
    default = service.model().bundle.name
    return ModelList(default=default, models=[_summary(model) for model in service.models])


@router.get("/{name}", summary="One model", responses=responses(400))
async def get_model(service: ServiceOf, name: Name) -> ModelSummary:
    """The versions of a model and which one answers."""
    return _summary(service.model(name))


@router.get("/{name}/versions/{version}", summary="One version", responses=responses(400))
async def get_version(service: ServiceOf, name: Name, version: Version) -> ModelVersion:
    """The bundle of a version: block, NormRatios, threshold, data and warnings."""
    return ModelVersion(is_active=True, bundle=service.model(name, version).bundle)


def _summary(model: LoadedModel) -> ModelSummary:
    version = model.bundle.version
    return ModelSummary(name=model.bundle.name, active_version=version, versions=[version])
