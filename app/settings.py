"""The service's settings: ``NORMGATE_*`` in the environment, a flag of the same name each."""

import json
import os
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.errors import SettingsError

PREFIX: Final = "NORMGATE_"
_NOT_SETTINGS: Final = frozenset({"NORMGATE_DATA"})
"""Read by the benchmarks and tests, which may share their environment with a server."""
_SECRETS: Final = frozenset({"api_keys", "admin_token"})
DECODED_BYTES_PER_PIXEL: Final = 16
"""Most that decoding holds for a pixel: two canvases and two copies of a WebP, 4 bytes each."""


class Settings(BaseSettings):
    """What an operator may set; every value is checked before the service starts."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    model_store: Path | str = Field(
        Path("model_store"),
        description="folder of the bundles, or its URL: s3://bucket/models, gs://...",
    )
    model_cache: Path = Field(
        Path("~/.cache/normgate"), description="folder for copies of a URL's bundles"
    )
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
    max_batch_size: int = Field(
        32,
        ge=1,
        le=4096,
        description="most images in one forward pass; fewer where caches are the bound",
    )
    max_wait_ms: float = Field(
        0, ge=0, le=1000, description="how long a free device waits for a fuller batch"
    )
    queue_size: int = Field(1024, ge=1, description="images that may wait for a device")
    deadline_ms: float = Field(
        10_000, gt=0, description="longest time from a request's arrival to its answer"
    )
    max_deadline_ms: float = Field(
        60_000, gt=0, description="largest deadline a request may ask for"
    )
    max_upload_bytes: int = Field(
        32 * 2**20, ge=1, description="largest request body, counted while it is read"
    )
    max_pixels: int = Field(
        50_000_000, ge=1, description="largest width times height, checked before decoding"
    )
    max_inflight_bytes: int = Field(
        2**30, ge=1, description="bytes of uploads and decoded pixels held at once"
    )
    max_jpeg_scans: int = Field(
        100, ge=1, description="most scans of a JPEG; each costs another pass over its pixels"
    )
    decode_threads: int = Field(2, ge=1, le=256, description="threads that decode images")
    compute_threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="cores for forward passes on the CPU; two passes share them while there is "
        "work for both, with tiny images one and a part of it, each on one; with torch one pass "
        "has all; default: all, all but one with torch",
    )
    engine: Literal["auto", "torch", "onnxruntime"] = Field(
        "auto",
        description="what runs networks: torch, onnxruntime, or auto: on the CPU the latter where "
        "it is installed, a bundle was exported and the scores agree; on GPUs torch's CUDA graphs",
    )
    heartbeat_s: float = Field(
        30, gt=0, description="longest a batch may take before the service is called unready"
    )
    shutdown_grace_s: float = Field(
        5, ge=0, le=3600, description="how long SIGTERM lets it serve on, unready, before it drains"
    )
    kept_versions: int = Field(
        1, ge=1, le=100, description="newest versions of each model that are loaded at once"
    )
    watch_s: float = Field(
        0, ge=0, description="how often the store is searched for new versions; 0: never"
    )
    on_new_version: Literal["activate", "shadow", "report"] = Field(
        "activate", description="what a refresh does with a new version: activate, shadow or report"
    )
    shadow_share: float = Field(
        0.1, gt=0, le=1, description="share of live images that a shadow version scores too"
    )
    upstream_url: str | None = Field(
        None,
        pattern=r"^https?://[^/?#]+(/[^?#]*)?$",
        description="classifier behind /v1/proxy; default: the proxy does not exist",
    )
    upstream_timeout_s: float = Field(
        30, gt=0, description="longest silence of the upstream before 504"
    )
    upstream_connections: int = Field(
        100, ge=1, description="most connections to the upstream at once"
    )
    gate_policy: Literal["block", "tag"] = Field(
        "block", description="what the proxy does with ood images: block (422) or tag (forward)"
    )
    gate_on_failure: Literal["closed", "open"] = Field(
        "closed", description="images that get no verdict: closed refuses them, open lets them pass"
    )
    drift_false_alarm_bound: float = Field(
        0.01, ge=1e-12, lt=1, description="chance that the drift alarm is ever raised without drift"
    )
    api_keys: tuple[SecretStr, ...] = Field(
        (), description='keys one of which /v1 and /v2 then ask for, as JSON: ["..."]'
    )
    admin_token: SecretStr | None = Field(
        None, description="token of the admin routes; without one they do not exist"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description='web origins whose scripts may call, as JSON: ["https://..."]'
    )
    docs: bool = Field(True, description="whether /docs and /openapi.json are served")
    page: bool = Field(True, description="whether the pages for people, / and /review, are served")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severity that is logged"
    )
    access_log_sample: float = Field(
        1, ge=0, le=1, description="share of answered requests that are logged; failures all are"
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://.+$",
        description="OpenTelemetry collector that traces are sent to; needs the otel extra",
    )
    review_folder: Path | None = Field(
        None, description="folder of the review queue; default: no image is ever kept"
    )
    review_images: int = Field(
        1000, ge=1, le=100_000, description="newest ood images kept for review"
    )
    review_max_bytes: int = Field(2**30, ge=2**20, description="most bytes of the review folder")
    review_retention_s: float = Field(
        604_800, gt=0, description="longest time an image is kept for review"
    )
    review_share: float = Field(1, gt=0, le=1, description="share of the ood images that are kept")
    review_sample_share: float = Field(
        0, ge=0, le=1, description="share of all images, whatever their verdict, kept beside them"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")

    @field_validator("model_store", mode="after")
    @classmethod
    def _is_folder_or_url(cls, value: Path | str) -> Path | str:
        return value if "://" in str(value) else Path(value)

    @field_validator("allowed_factories", "api_keys", "cors_origins", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        # The environment's text arrives parsed, a flag's does not.
        return json.loads(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        needed = self.max_upload_bytes + DECODED_BYTES_PER_PIXEL * self.max_pixels
        if self.max_inflight_bytes < needed:
            raise ValueError(
                f"max_inflight_bytes is {self.max_inflight_bytes}; one image of max_upload_bytes "
                f"and max_pixels may need {needed}"
            )
        if self.deadline_ms > self.max_deadline_ms:
            raise ValueError(
                f"deadline_ms is {self.deadline_ms:g}; max_deadline_ms is {self.max_deadline_ms:g}"
            )
        return self

    @model_validator(mode="after")
    def _review_has_readers(self) -> Self:
        if self.review_folder is not None and self.admin_token is None:
            raise ValueError(
                f"review_folder is {str(self.review_folder)!r} and admin_token is not set; without "
                "one nobody may see the images kept there"
            )
        return self

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
    if not problem["loc"]:  # about several settings; the message names them
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(problem["loc"][0])
    # A key must not end up in a log.
    value = "not shown" if name in _SECRETS else repr(problem["input"])
    return f"{PREFIX}{name.upper()} is {value}: {problem['msg']}"
