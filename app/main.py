"""The wiring: settings in, application out."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from app.api import problems
from app.api.access_log import AccessLogMiddleware
from app.api.admission import AdmissionMiddleware
from app.api.request_id import RequestIdMiddleware
from app.api.routes import drift, gate, models, operations, page, proxy, review, score, v2
from app.api.scoring_lane import ScoringLane
from app.errors import NormGateError, SettingsError
from app.serving.metrics import Metrics
from app.serving.service import ScoringService
from app.serving.upstream import Upstream
from app.settings import Settings

if TYPE_CHECKING:
    from app.tracing import Tracing

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings, *, on_started: Callable[[NormGateError | None], None] | None = None
) -> FastAPI:
    """The ASGI application; ``app.state.service`` is what it serves.

    It listens at once and is ready when its models are loaded and warm.

    Args:
        settings: checked already.
        on_started: told when the models are loaded, or why they cannot be; the application then
            stays unready.

    Raises:
        SettingsError: traces are wanted, and what sends them is not installed.
    """
    metrics = Metrics()
    service = ScoringService(settings, metrics)
    upstream = _upstream(settings)
    tracing = _tracing(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start(service, on_started))
        watching = [
            asyncio.create_task(service.watch_loop()),
            asyncio.create_task(_watch_store(service, starting)),
            asyncio.create_task(service.watch_review()),
        ]
        yield
        for task in watching:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await asyncio.wait([starting])
        await asyncio.to_thread(service.stop)
        if upstream is not None:
            await upstream.aclose()
        if tracing is not None:
            await asyncio.to_thread(tracing.stop)
        await starting  # its failure, where nobody was told of it

    app = FastAPI(
        title="NormGate",
        version=version("normgate"),
        description=(
            "Tells, for every image, whether the classifier was trained for images like it."
        ),
        lifespan=lifespan,
        docs_url="/docs" if settings.docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.docs else None,
        # Traces and metrics are ours; FastAPI's would ask at every request whether they are wanted.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.settings, app.state.metrics, app.state.service = settings, metrics, service
    problems.install(app, metrics)
    routers = [score.router, gate.router, models.router, drift.router, operations.router]
    routers += [v2.health_router, v2.router]
    if upstream is not None:
        app.state.upstream = upstream
        routers.append(proxy.router)
    if service.review is not None:
        routers.append(review.router)
    if settings.admin_token is not None:
        routers += [models.admin_router, drift.admin_router, v2.admin_router]
    if settings.page:
        app.state.pages = page.Pages.of(settings)
        routers += [page.router] + [page.review_router] * (service.review is not None)
    for router in routers:
        app.include_router(router)
    _add_middleware(app, settings, service, routers)
    _add_logs_and_traces(app, settings, tracing)
    return app


def _add_middleware(
    app: FastAPI, settings: Settings, service: ScoringService, routers: Sequence[APIRouter]
) -> None:
    # The last one added is the first to see a request.
    app.add_middleware(ScoringLane, routers=routers)
    app.add_middleware(AdmissionMiddleware, service=service)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )


def _add_logs_and_traces(app: FastAPI, settings: Settings, tracing: "Tracing | None") -> None:
    # Outside all others: they see every answer, refusals at the door too.
    app.add_middleware(AccessLogMiddleware, sample=settings.access_log_sample)
    if tracing is not None:
        tracing.install(app)
    app.add_middleware(RequestIdMiddleware)


def _tracing(settings: Settings) -> "Tracing | None":
    if settings.otlp_endpoint is None:
        return None
    try:
        # Not at the top: it loads the SDK, which is an extra.
        from app.tracing import Tracing
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"NORMGATE_OTLP_ENDPOINT is set and {error.name} is not installed: "
            "pip install 'normgate[otel]'"
        ) from error
    return Tracing(settings.otlp_endpoint)


def _upstream(settings: Settings) -> Upstream | None:
    if settings.upstream_url is None:
        return None
    return Upstream(
        settings.upstream_url,
        timeout_s=settings.upstream_timeout_s,
        connections=settings.upstream_connections,
    )


async def _start(
    service: ScoringService, on_started: Callable[[NormGateError | None], None] | None
) -> None:
    failure: NormGateError | None = None
    try:
        await asyncio.to_thread(service.start)
    except NormGateError as error:
        failure = error
    except Exception as error:
        logger.exception("the models could not be loaded")
        failure = NormGateError(f"the models could not be loaded: {error}")
    if on_started is not None:
        on_started(failure)
    elif failure is not None:
        raise failure


async def _watch_store(service: ScoringService, starting: "asyncio.Task[None]") -> None:
    await asyncio.wait([starting])
    await service.watch_store()
