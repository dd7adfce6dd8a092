"""Ray Serve around the application of one process: the same routes and scores, on many machines.

``serve run app.distributed.serving:application max_replicas=4`` or ``normgate serve --ray``.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Self

import ray
import structlog
from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from app.distributed.failures import joining, last_line
from app.distributed.fleet import Fleet, replica_settings
from app.distributed.proxy import CALLBACK
from app.errors import BundleError, NormGateError, SettingsError
from app.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from app.serving.service import ScoringService

NAME: Final = "NormGate"
"""Of the deployment, and of the application that ``normgate serve --ray`` starts."""
_STARTS: Final = 3
_KEEP_ALIVE_S: Final = 75
_LEAST_DRAIN_S: Final = 0.1
_POLL_S: Final = 0.1

logger = structlog.get_logger()


class UserConfig(BaseModel):
    """What Serve's ``user_config`` may hold; replicas take a change in while they answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: Mapping[str, int] = {}
    """Which version of a model answers; the one in force in the store where none is named."""

    @classmethod
    def read(cls, user_config: dict[str, Any]) -> Self:
        """What Serve was given.

        Raises:
            SettingsError: it is something else.
        """
        try:
            return cls.model_validate(user_config)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "user_config"
            raise SettingsError(f"{where} is {first['input']!r}: {first['msg']}") from error


class Replica:
    """One replica: ``build`` makes what it answers with, this is what Serve asks of it beside."""

    app: "FastAPI"
    _pinned: Mapping[str, int] = {}
    _is_serving = False

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Let the versions that are named answer from now on.

        A replica that answers goes on with what it has where a version cannot serve, and logs why:
        Serve would end it. One that is starting fails.

        Raises:
            SettingsError: the replica is starting, and this is no configuration.
            BundleError: the replica is starting, and the version cannot serve.
        """
        await self._started()
        try:
            await self._follow_all(UserConfig.read(user_config).versions)
        except (BundleError, SettingsError) as error:
            if not self._is_serving:
                raise
            logger.error("user_config is not followed", reason=str(error))

    async def check_health(self) -> None:
        """Return when the replica wants requests; Serve replaces one that goes on to fail.

        Raises:
            NotReadyError: a device makes no progress.
        """
        await self._started()
        self._service.check_ready()
        self._is_serving = True

    @property
    def _service(self) -> "ScoringService":
        service: ScoringService = self.app.state.service
        return service

    async def _follow_all(self, versions: Mapping[str, int]) -> None:
        """Let every version that can serve answer.

        Raises:
            BundleError: one of them cannot.
        """
        failure: BundleError | None = None
        for name in sorted(self._pinned.keys() | versions.keys()):
            try:
                await self._follow(name, versions.get(name))
            except BundleError as error:
                failure = error
        # Whatever was named once goes back to the store's version when it is named no more.
        self._pinned = versions if failure is None else {**self._pinned, **versions}
        if failure is not None:
            raise failure

    async def _follow(self, name: str, version: int | None) -> None:
        if version is None or self._service.model(name).bundle.version != version:
            await self._service.activate(name, version)

    async def _started(self) -> None:
        failure: NormGateError | None = await asyncio.shield(self.app.state.started)
        if failure is not None:
            raise failure


def application(args: dict[str, Any]) -> Application:
    """What ``serve run`` and Serve's configuration files start.

    Args:
        args: options of :class:`Fleet` and of :class:`Settings`, the latter before the environment.

    Raises:
        SettingsError: one is unknown or out of bounds.
    """
    fleet = Fleet.read({name: args[name] for name in args.keys() & Fleet.model_fields.keys()})
    flags = {name: args[name] for name in args.keys() - Fleet.model_fields.keys()}
    if unknown := flags.keys() - Settings.model_fields.keys():
        raise SettingsError(f"unknown option {', '.join(sorted(unknown))}")
    return bind(Settings.read(flags), fleet)


def bind(settings: Settings, fleet: Fleet) -> Application:
    """The application with these settings.

    Raises:
        SettingsError: a setting that cannot hold where there are many replicas.
    """
    of_replica = replica_settings(settings, fleet)

    def build() -> "FastAPI":
        return _build(of_replica)

    # NormGate's own queue must be the one that is full first: its refusals say when to come back.
    requests = 2 * (settings.queue_size + settings.max_batch_size)
    deployment = serve.deployment(
        name=NAME,
        ray_actor_options={"num_cpus": fleet.replica_cpus, "num_gpus": fleet.gpus(settings)},
        max_ongoing_requests=requests,
        max_queued_requests=requests,
        autoscaling_config={
            "min_replicas": fleet.min_replicas,
            "max_replicas": fleet.max_replicas,
            # Beyond one full batch, images wait.
            "target_ongoing_requests": settings.max_batch_size,
        },
        user_config=UserConfig().model_dump(),
        graceful_shutdown_wait_loop_s=_grace_s(settings),
        graceful_shutdown_timeout_s=_drain_s(settings),
        max_constructor_retry_count=_STARTS,
        logging_config={"enable_access_log": False},  # the application has one
    )
    return deployment(serve.ingress(build)(Replica)).bind()


def _build(settings: Settings) -> "FastAPI":
    """The application of one replica, told of in the cluster; ``state.started`` is its start."""
    # Not at the top: whoever only starts the application loads no torch.
    from app import logs
    from app.core.allocator import collect_rarely, keep_memory
    from app.distributed import scraping
    from app.main import create_app

    logs.configure(settings.log_level)
    keep_memory()
    started: asyncio.Future[NormGateError | None] = asyncio.get_running_loop().create_future()
    app = create_app(settings, on_started=started.set_result)
    app.state.started = started
    app.add_api_route(
        "/metrics/replicas",
        scraping.targets,
        tags=["operations"],
        summary="Where each replica's metrics are, for Prometheus's http_sd",
    )
    scraping.listen(app.state.metrics.registry)
    collect_rarely()
    return app


def run(settings: Settings, fleet: Fleet) -> None:
    """Serve until SIGTERM or SIGINT, on the cluster that ``RAY_ADDRESS`` names or one of our own.

    Raises:
        SettingsError: a setting that cannot hold where there are many replicas.
        NormGateError: the replicas cannot start.
    """
    if settings.port == 0:
        raise SettingsError("NORMGATE_PORT is 0; Ray's proxies on all machines need the same one")
    target = bind(settings, fleet)
    with _cluster(), _until_told() as told:
        try:
            serve.start(
                proxy_location="EveryNode",
                http_options={
                    "host": settings.host,
                    "port": settings.port,
                    "keep_alive_timeout_s": _KEEP_ALIVE_S,
                },
            )
            serve.run(target, name=NAME)
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            print(f"NormGate listens on http://{host}:{settings.port}", flush=True)
            told.wait()
        except (RuntimeError, TimeoutError, RayError) as error:
            raise NormGateError(f"the replicas cannot start: {last_line(error)}") from error
        finally:
            told.has_ended()
            _withdraw(within_s=_drain_s(settings))


def _drain_s(settings: Settings) -> float:
    # One wait for callers to hear of it, the longest request, and the wait that it ends in.
    return 2 * _grace_s(settings) + settings.max_deadline_ms / 1000


def _grace_s(settings: Settings) -> float:
    return max(settings.shutdown_grace_s, _LEAST_DRAIN_S)


def _withdraw(*, within_s: float) -> None:
    """Take the application away; return once its replicas have answered what they had."""
    # A Serve that is gone has nothing to withdraw.
    with suppress(RayError, RayServeException):
        serve.delete(NAME, _blocking=False)
        end = time.monotonic() + within_s
        while NAME in serve.status().applications and time.monotonic() < end:
            time.sleep(_POLL_S)


@contextmanager
def _cluster() -> Iterator[None]:
    with joining():
        ray.init(
            namespace="serve",
            include_dashboard=False,
            runtime_env={"env_vars": {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK}},
        )
    try:
        yield
    finally:
        ray.shutdown()


class _Told:
    """SIGTERM and SIGINT: they break off a start, and end what has started."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._is_starting = True

    def hear(self, *_: object) -> None:
        """The signals' handler."""
        self._event.set()
        if self._is_starting:
            # Serve waits without end for replicas that the cluster has no room for.
            raise KeyboardInterrupt

    def wait(self) -> None:
        """The start is over: return when told."""
        self._is_starting = False
        self._event.wait()

    def has_ended(self) -> None:
        """Nothing is to be broken off any more."""
        self._is_starting = False


@contextmanager
def _until_told() -> Iterator[_Told]:
    told = _Told()
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(each, told.hear) for each in signals]
    try:
        yield told
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)
