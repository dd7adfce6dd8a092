"""The wiring: settings in, application out."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

import uvicorn
from fastapi import FastAPI

from app.api import problems
from app.api.request_id import RequestIdMiddleware
from app.api.routes import models, operations, score
from app.core.allocator import keep_memory
from app.errors import NormGateError, SettingsError
from app.serving.metrics import Metrics
from app.serving.service import ScoringService
from app.settings import Settings

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings, *, on_start_failure: Callable[[NormGateError], None] | None = None
) -> FastAPI:
    """The ASGI application.

    It listens at once and is ready when its models are loaded and warm.

    Args:
        settings: checked already.
        on_start_failure: told when a model cannot be loaded; the application then stays unready.
    """
    metrics = Metrics()
    service = ScoringService(settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start(service, on_start_failure))
        yield
        await starting
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="NormGate",
        version=version("normgate"),
        description=(
            "Tells, for every image, whether the classifier was trained for images like it."
        ),
        lifespan=lifespan,
    )
    app.state.settings, app.state.metrics, app.state.service = settings, metrics, service
    app.add_middleware(RequestIdMiddleware)
    problems.install(app, metrics)
    for router in (score.router, models.router, operations.router):
        app.include_router(router)
    return app


def serve(settings: Settings) -> None:
    """Listen until SIGTERM or SIGINT, then answer what was accepted and return.

    Raises:
        SettingsError: the address cannot be listened on.
        BundleError: a model cannot be loaded.
    """
    keep_memory()
    failures: list[NormGateError] = []

    def give_up(error: NormGateError) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, on_start_failure=give_up)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    with _listen(settings) as listener:
        host, port = listener.getsockname()[:2]
        print(f"NormGate listens on http://{host}:{port}", flush=True)
        # Everything was answered by then; uvicorn raises the signal once more for its caller.
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    if failures:
        raise failures[0]


async def _start(
    service: ScoringService, on_failure: Callable[[NormGateError], None] | None
) -> None:
    try:
        await asyncio.to_thread(service.start)
    except NormGateError as error:
        if on_failure is None:
            raise
        on_failure(error)
    except Exception as error:
        logger.exception("the models could not be loaded")
        if on_failure is None:
            raise
        on_failure(NormGateError(f"the models could not be loaded: {error}"))


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}"
        ) from error
