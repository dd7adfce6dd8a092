"""The JSON of ``/v2`` beside inference requests: metadata, configuration, statistics, repository.

As the Open Inference Protocol and Triton's extensions of it have them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.api.tensors import DATATYPES, INPUT, OUTPUTS, Body, Datatype, OutputName, Parameters
from app.serving.pool import VersionState
from app.serving.statistics import Duration, Totals
from app.store import Bundle

EXTENSIONS: Final = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "statistics",
)
PLATFORM: Final = "normgate_bundle"

_CONFIG_TYPES: Final[Mapping[Datatype, str]] = {
    "BYTES": "TYPE_STRING",
    "FP32": "TYPE_FP32",
    "FP64": "TYPE_FP64",
    "INT64": "TYPE_INT64",
}
_ANY: Final = -1
"""A dimension that the request decides."""


class Live(BaseModel):
    """The process is alive."""

    live: Literal[True] = True


class Ready(BaseModel):
    """The server wants requests."""

    ready: Literal[True] = True


class ModelReady(Ready):
    """The model answers."""

    name: str


class ServerMetadata(BaseModel):
    """What the server is and understands."""

    name: Literal["normgate"] = "normgate"
    version: str
    extensions: Sequence[str] = EXTENSIONS


class TensorMetadata(BaseModel):
    """One tensor; a dimension of -1 is the request's."""

    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model's tensors and the versions that answer."""

    name: str
    versions: list[str]
    platform: str = PLATFORM
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]

    @classmethod
    def of(cls, bundle: Bundle, versions: Sequence[int]) -> "ModelMetadata":
        """The metadata of a bundle."""
        return cls(
            name=bundle.name,
            versions=[str(version) for version in versions],
            inputs=[TensorMetadata(name=INPUT, datatype="BYTES", shape=[_ANY])],
            outputs=[
                TensorMetadata(name=name, datatype=DATATYPES[name], shape=_shape(name, bundle))
                for name in OUTPUTS
            ],
        )


class TensorConfig(BaseModel):
    """One tensor, in the words of Triton's model configuration."""

    name: str
    data_type: str
    dims: list[int]


class StringParameter(BaseModel):
    """The value of a parameter."""

    string_value: str


class ModelConfig(BaseModel):
    """Triton's model configuration, as far as it applies.

    ``max_batch_size`` is 0: the first dimension is part of the tensors, and images of separate
    requests are batched anyway.
    """

    name: str
    platform: str = PLATFORM
    backend: str = "normgate"
    max_batch_size: int = 0
    input: list[TensorConfig]
    output: list[TensorConfig]
    parameters: Mapping[str, StringParameter] = Field(
        description="The selected block, the score and its threshold."
    )

    @classmethod
    def of(cls, bundle: Bundle) -> "ModelConfig":
        """The configuration of a bundle."""
        facts = {
            "architecture": bundle.architecture.id,
            "block": bundle.block,
            "score": bundle.score,
            "threshold": bundle.threshold.value,
            "alpha": bundle.threshold.alpha,
            "guarantee": bundle.threshold.guarantee,
        }
        return cls(
            name=bundle.name,
            input=[TensorConfig(name=INPUT, data_type=_CONFIG_TYPES["BYTES"], dims=[_ANY])],
            output=[
                TensorConfig(
                    name=name, data_type=_CONFIG_TYPES[DATATYPES[name]], dims=_shape(name, bundle)
                )
                for name in OUTPUTS
            ],
            parameters={
                key: StringParameter(string_value=str(value)) for key, value in facts.items()
            },
        )


class DurationStatistics(BaseModel):
    """How often, and how many nanoseconds altogether."""

    count: int = Field(ge=0)
    ns: int = Field(ge=0)

    @classmethod
    def of(cls, duration: Duration) -> "DurationStatistics":
        """A duration in nanoseconds."""
        return cls(count=duration.count, ns=round(duration.seconds * 1e9))


class InferenceStatistics(BaseModel):
    """``queue`` and ``compute_infer`` are counted for each image, the others for each request."""

    success: DurationStatistics
    fail: DurationStatistics
    queue: DurationStatistics
    compute_input: DurationStatistics
    compute_infer: DurationStatistics
    compute_output: DurationStatistics


class BatchStatistics(BaseModel):
    """The forward passes of one batch size."""

    batch_size: int
    compute_infer: DurationStatistics
    compute_input: DurationStatistics = DurationStatistics(count=0, ns=0)
    compute_output: DurationStatistics = DurationStatistics(count=0, ns=0)


class ModelStatisticsOf(BaseModel):
    """One model version, since it was loaded."""

    name: str
    version: str
    last_inference: int = Field(description="Milliseconds since the epoch.")
    inference_count: int = Field(description="Images scored.")
    execution_count: int = Field(description="Forward passes.")
    inference_stats: InferenceStatistics
    batch_stats: list[BatchStatistics]

    @classmethod
    def of(cls, bundle: Bundle, totals: Totals) -> "ModelStatisticsOf":
        """The statistics of a version."""
        steps = {step: DurationStatistics.of(total) for step, total in totals.steps.items()}
        return cls(
            name=bundle.name,
            version=str(bundle.version),
            last_inference=round(totals.last_s * 1000),
            inference_count=totals.images,
            execution_count=totals.batches,
            inference_stats=InferenceStatistics.model_validate(steps),
            batch_stats=[
                BatchStatistics(batch_size=size, compute_infer=DurationStatistics.of(forward))
                for size, forward in totals.forward_by_batch_size.items()
            ],
        )


class StatisticsList(BaseModel):
    """The statistics of the versions asked for."""

    model_config = ConfigDict(protected_namespaces=())

    model_stats: list[ModelStatisticsOf]


class IndexBody(Body):
    """Which versions to list."""

    ready: bool | None = Field(None, description="Only those that answer.")


class IndexEntry(BaseModel):
    """One version in the store or in memory."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str

    @classmethod
    def of(cls, found: VersionState) -> "IndexEntry":
        """A version's state in the protocol's words."""
        is_ready = found.state in ("active", "loaded")
        return cls(
            name=found.name,
            version=str(found.version),
            state="READY" if is_ready else "UNAVAILABLE",
            reason=found.reason or ("" if is_ready else found.state),
        )


class LoadBody(Body):
    """A load request: it takes no parameters."""

    parameters: Parameters | None = None


class UnloadParameters(Parameters):
    """``unload_dependents`` is understood; no model has dependents."""

    unload_dependents: bool | None = None


class UnloadBody(Body):
    """An unload request."""

    parameters: UnloadParameters | None = None


class ResponseTensor(BaseModel):
    """One output: ``data``, row by row, or so many bytes behind the JSON."""

    name: OutputName
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, int] | None = Field(None, examples=[{"binary_data_size": 4}])
    data: list[str] | list[float] | None = None


class InferAnswer(BaseModel):
    """The JSON of an inference response."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str | None = Field(None, description="The request's, if it had one.")
    outputs: list[ResponseTensor]


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of ``model`` without references, for a place that has no definitions."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(one) for one in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(definitions[node["$ref"].rpartition("/")[2]])
        return {key: inline(value) for key, value in node.items()}

    inlined_schema: dict[str, Any] = inline(schema)
    return inlined_schema


def _shape(name: OutputName, bundle: Bundle) -> list[int]:
    if name == "logits":
        return [_ANY, len(bundle.labels)]
    return [_ANY, _ANY] if name in ("label", "probability", "index") else [_ANY]
