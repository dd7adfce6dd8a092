"""Probes and metrics: ``/livez``, ``/readyz`` and ``/metrics``."""

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from app.api.dependencies import MetricsOf, ServiceOf
from app.api.problems import responses
from app.api.schemas import Health

router = APIRouter(tags=["operations"])


@router.head("/livez", include_in_schema=False)
@router.get("/livez", summary="Is the process alive?")
async def livez() -> Health:
    """200 as long as the event loop turns."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="Can it answer?", responses=responses(503))
async def readyz(service: ServiceOf) -> Health:
    """200 while it wants requests.

    503 before the models are loaded and warm, while shutting down, and when a device has made no
    progress within the heartbeat.
    """
    service.check_ready()
    return Health(status="ok")


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(metrics: MetricsOf) -> Response:
    """All families in the Prometheus text format."""
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
