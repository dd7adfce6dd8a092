"""What routes are given: the objects that ``main.create_app`` built."""

from typing import Annotated, cast

from fastapi import Depends, Request

from app.serving.metrics import Metrics
from app.serving.service import ScoringService
from app.settings import Settings


async def _service(request: Request) -> ScoringService:
    return cast(ScoringService, request.app.state.service)


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


async def _metrics(request: Request) -> Metrics:
    return cast(Metrics, request.app.state.metrics)


ServiceOf = Annotated[ScoringService, Depends(_service)]
SettingsOf = Annotated[Settings, Depends(_settings)]
MetricsOf = Annotated[Metrics, Depends(_metrics)]
