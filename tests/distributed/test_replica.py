"""What Serve asks of a replica beside answers, without a cluster."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from app.errors import ActivationError, NotReadyError, SettingsError

pytest.importorskip("ray.serve")

from app.distributed.serving import Replica, application


class Service:
    """Version 1 of a model, of which 2 can serve too, and 3 cannot; 4 is in force in the store."""

    def __init__(self) -> None:
        self.version = 1
        self.is_stuck = False

    def model(self, name: str) -> Any:
        """The one that answers."""
        return SimpleNamespace(bundle=SimpleNamespace(version=self.version))

    async def activate(self, name: str, version: int | None) -> None:
        """Switch, or refuse to."""
        if version == 3:
            raise ActivationError("version 3 is damaged")
        self.version = 4 if version is None else version

    def check_ready(self) -> None:
        """Refuse where the device is stuck."""
        if self.is_stuck:
            raise NotReadyError("a device has made no progress")


async def started(service: Service) -> Replica:
    """A replica with its models loaded, of which Serve has asked nothing yet."""
    replica = Replica()
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    state = SimpleNamespace(service=service, started=future)
    replica.app = SimpleNamespace(state=state)  # type: ignore[assignment]
    return replica


def test_versions_come_and_go() -> None:
    """A named version answers; the store decides again when it is named no more."""
    service = Service()

    async def change() -> list[int]:
        replica, seen = await started(service), []
        for versions in ({}, {"tiny": 2}, {}, {}):
            await replica.reconfigure({"versions": versions})
            seen.append(service.version)
        return seen

    assert asyncio.run(change()) == [1, 2, 4, 4]


@pytest.mark.parametrize(
    ("user_config", "kind"),
    [({"versions": {"tiny": 3}}, ActivationError), ({"version": {"tiny": 2}}, SettingsError)],
)
def test_what_cannot_be_followed(user_config: dict[str, Any], kind: type[Exception]) -> None:
    """It ends a replica that is starting, and leaves one that answers as it is."""
    service = Service()

    async def change() -> None:
        replica = await started(service)
        with pytest.raises(kind):
            await replica.reconfigure(user_config)
        await replica.check_health()
        await replica.reconfigure(user_config)

    asyncio.run(change())

    assert service.version == 1


def test_a_damaged_version_holds_no_other_up() -> None:
    """The versions that can serve are followed, and go back to the store's when named no more."""
    services = {"damaged": Service(), "tiny": Service()}

    async def change() -> list[int]:
        replica, seen = await started(_Several(services)), []
        await replica.check_health()
        for versions in ({"damaged": 3, "tiny": 2}, {}):
            await replica.reconfigure({"versions": versions})
            seen.append(services["tiny"].version)
        return seen

    assert asyncio.run(change()) == [2, 4]


class _Several(Service):
    """Models that each have a service's versions."""

    def __init__(self, services: dict[str, Service]) -> None:
        super().__init__()
        self._services = services

    def model(self, name: str) -> Any:
        return self._services[name].model(name)

    async def activate(self, name: str, version: int | None) -> None:
        await self._services[name].activate(name, version)


def test_a_stuck_device_is_unhealthy() -> None:
    """Serve replaces a replica whose device makes no progress."""
    service = Service()
    service.is_stuck = True

    async def check() -> None:
        await (await started(service)).check_health()

    with pytest.raises(NotReadyError):
        asyncio.run(check())


def test_an_unknown_option() -> None:
    """What neither the fleet nor the service knows is named."""
    with pytest.raises(SettingsError, match="unknown option replicas"):
        application({"replicas": 2})
