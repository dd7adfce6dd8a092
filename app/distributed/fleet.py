"""How many replicas there are on a Ray cluster, and what each takes of a machine."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.errors import SettingsError
from app.settings import Settings


class Fleet(BaseModel):
    """What Ray is asked for, beside the service's own settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(1, ge=1, description="fewest replicas")
    max_replicas: int = Field(1, ge=1, description="most replicas; more than the fewest under load")
    replica_cpus: float = Field(
        1, gt=0, description="cores that a replica reserves and computes with"
    )
    replica_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs that a replica reserves, 0.5 for half of one; default: as many as "
        "NORMGATE_DEVICES names",
    )

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}; min_replicas is {self.min_replicas}"
            )
        return self

    @classmethod
    def read(cls, flags: dict[str, Any]) -> Self:
        """The fleet that ``flags`` describe.

        Raises:
            SettingsError: a value is out of bounds; one line, all of them.
        """
        try:
            return cls(**flags)
        except ValidationError as error:
            raise SettingsError("; ".join(map(_describe, error.errors()))) from error

    def gpus(self, settings: Settings) -> float:
        """The GPUs that a replica reserves."""
        if self.replica_gpus is not None:
            return self.replica_gpus
        return sum(name.startswith("cuda") for name in settings.devices.split(","))


def replica_settings(settings: Settings, fleet: Fleet) -> Settings:
    """What the operator set, as it holds for one replica of many.

    Raises:
        SettingsError: a setting that cannot hold where a request reaches any one replica.
    """
    if settings.admin_token is not None:
        raise SettingsError(
            "NORMGATE_ADMIN_TOKEN is set: through Ray an admin route would change one replica of "
            "many; docs/ray.md tells how all of them change their version"
        )
    if fleet.gpus(settings) and ":" in settings.devices and "cuda:0" not in settings.devices:
        raise SettingsError(
            f"NORMGATE_DEVICES is {settings.devices}; Ray numbers the GPUs that a replica reserved "
            "from cuda:0"
        )
    changes: dict[str, Any] = {}
    if not isinstance(settings.model_store, str):
        changes["model_store"] = settings.model_store.absolute()
    if settings.compute_threads is None:
        changes["compute_threads"] = max(1, int(fleet.replica_cpus))
    if settings.devices == "auto" and not fleet.gpus(settings):
        # A GPU that was not reserved is another's.
        changes["devices"] = "cpu"
    return settings.model_copy(update=changes)


def _describe(problem: Any) -> str:
    if not problem["loc"]:  # about several options; the message names them
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{problem['loc'][0]} is {problem['input']!r}: {problem['msg']}"
