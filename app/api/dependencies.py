"""What routes are given: the objects that ``main.create_app`` built."""

from typing import Annotated, cast

from fastapi import Depends, Request

from app.serving.metrics import Metrics
from app.serving.service import ScoringService
from app.settings import Settings


def service_of(request: Request) -> ScoringService:
    """The service."""
    return cast(ScoringService, request.app.state.service)


def settings_of(request: Request) -> Settings:
    """The settings."""
    return cast(Settings, request.app.state.settings)


def metrics_of(request: Request) -> Metrics:
    """The metrics."""
    return cast(Metrics, request.app.state.metrics)


# Not the functions themselves: FastAPI would call them in a thread.
async def _service(request: Request) -> ScoringService:
    return service_of(request)


async def _settings(request: Request) -> Settings:
    return settings_of(request)


async def _metrics(request: Request) -> Metrics:
    return metrics_of(request)


ServiceOf = Annotated[ScoringService, Depends(_service)]
SettingsOf = Annotated[Settings, Depends(_settings)]
MetricsOf = Annotated[Metrics, Depends(_metrics)]
