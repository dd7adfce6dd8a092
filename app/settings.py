"""The service's settings: ``NORMGATE_*`` in the environment, a flag of the same name each."""

import json
import os
from pathlib import Path
from typing import Any, Final, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.errors import SettingsError

PREFIX: Final = "NORMGATE_"
_NOT_SETTINGS: Final = frozenset({"NORMGATE_DATA"})
"""Read by the benchmarks and tests, which may share their environment with a server."""


class Settings(BaseSettings):
    """What an operator may set; every value is checked before the service starts."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    model_store: Path = Field(Path("model_store"), description="folder of the bundles")
    model: str | None = Field(
        None, description="model that answers when a request names none; default: the first"
    )
    allowed_factories: tuple[str, ...] = Field(
        (), description='python/ architecture ids whose code may run, as JSON: ["python/a.b:c"]'
    )
    devices: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?(,cuda:\d+)*)$",
        description="auto, cpu, or a list such as cuda:0,cuda:1",
    )
    max_batch_size: int = Field(32, ge=1, le=4096, description="images in one forward pass")
    max_wait_ms: float = Field(
        0, ge=0, le=1000, description="how long a free device waits for a fuller batch"
    )
    queue_size: int = Field(1024, ge=1, description="images that may wait for a device")
    deadline_ms: float = Field(
        10_000, gt=0, description="longest time from a request's arrival to its answer"
    )
    max_upload_bytes: int = Field(
        32 * 2**20, ge=1, description="largest request body, counted while it is read"
    )
    max_pixels: int = Field(
        50_000_000, ge=1, description="largest width times height, checked before decoding"
    )
    decode_threads: int = Field(2, ge=1, le=256, description="threads that decode images")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")

    @field_validator("allowed_factories", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        # The environment's text arrives parsed, a flag's does not.
        return json.loads(value) if isinstance(value, str) else value

    @classmethod
    def read(cls, flags: dict[str, Any]) -> Self:
        """Settings from the environment, overridden by ``flags``.

        Raises:
            SettingsError: a variable is unknown or a value out of bounds; one line, all of them.
        """
        known = {PREFIX + name.upper() for name in cls.model_fields} | _NOT_SETTINGS
        unknown = sorted(
            name
            for name in os.environ
            if name.upper().startswith(PREFIX) and name.upper() not in known
        )
        if unknown:
            raise SettingsError(f"unknown setting {', '.join(unknown)} in the environment")
        try:
            return cls(**flags)
        except ValidationError as error:
            raise SettingsError("; ".join(map(_describe, error.errors()))) from error
        except ValueError as error:  # a variable that should hold JSON and does not
            raise SettingsError(str(error)) from error


def _describe(problem: Any) -> str:
    name = ".".join(map(str, problem["loc"]))
    return f"{PREFIX}{name.upper()} is {problem['input']!r}: {problem['msg']}"
