"""The server process: it listens, says when it is ready, and ends without losing a request."""

import signal
import socket
import time
from types import FrameType
from typing import Final

import structlog
import uvicorn

from app import logs
from app.api.door import Door
from app.connection import Connection
from app.core.allocator import collect_rarely, keep_memory
from app.errors import NormGateError, SettingsError
from app.listener import Listener
from app.main import create_app
from app.serving.service import ScoringService
from app.settings import Settings

logger = structlog.get_logger()

_BACKLOG: Final = 2048
_KEEP_ALIVE_S: Final = 75
"""Longer than a load balancer keeps an idle connection: it must be the one to close it."""


def serve(settings: Settings) -> None:
    """Listen until SIGTERM or SIGINT, then answer what was accepted and return.

    SIGTERM makes the service unready, lets it serve on for ``shutdown_grace_s``, and then drain.
    SIGINT, or a second SIGTERM, drains at once.

    Raises:
        SettingsError: the address cannot be listened on.
        BundleError: a model cannot be loaded.
    """
    logs.configure(settings.log_level)
    keep_memory()
    failures: list[NormGateError] = []

    def on_started(failure: NormGateError | None) -> None:
        if failure is None:
            print(f"NormGate listens on {url}", flush=True)
            logger.info("ready", url=url, models=_answering(app.state.service))
        else:
            failures.append(failure)
            server.should_exit = True

    with _listen(settings) as listener:
        url = _url(listener)
        app = create_app(settings, on_started=on_started)
        door = Door(app)
        collect_rarely()
        config = uvicorn.Config(
            door,
            http=Connection,
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            # The proxy passes an upstream's Server on, and extends X-Forwarded-For itself.
            server_header=False,
            proxy_headers=False,
        )
        server = _Server(config, door, app.state.service, grace_s=settings.shutdown_grace_s)
        server.run(sockets=[listener])
    if failures:
        raise failures[0]
    logger.info("drained")


class _Server(uvicorn.Server):
    """uvicorn, with a time of grace between SIGTERM and the end."""

    def __init__(
        self, config: uvicorn.Config, door: Door, service: ScoringService, *, grace_s: float
    ) -> None:
        super().__init__(config)
        self._door = door
        self._service = service
        self._grace_s = grace_s
        self._exit_at: float | None = None
        self._has_told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a signal handler, so it only notes what the next tick will do."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        elif sig == signal.SIGTERM and not self._service.is_draining:
            self._exit_at = time.monotonic() + self._grace_s
        else:
            self._exit_at = time.monotonic()
        self._service.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept connections by a listener of our own."""
        await super().startup(sockets=[])
        if not self.should_exit:
            self.servers = [Listener(one, self._make_protocol) for one in sockets or []]  # type: ignore[misc]

    def _make_protocol(self) -> Connection:
        return Connection(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            door=self._door,
        )

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, ten times a second."""
        if self._exit_at is not None and not self._has_told:
            self._has_told = True
            logger.info("shutting down", grace_s=self._grace_s)
        if self._exit_at is not None and time.monotonic() >= self._exit_at:
            self.should_exit = True
        return await super().on_tick(counter)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}"
        ) from error


def _answering(service: ScoringService) -> dict[str, int]:
    """The active version of every model."""
    return {name: service.model(name).bundle.version for name in service.models.names()}


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
