"""The JSON the service answers with."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.core.engines import EngineName
from app.store import Bundle


class Prediction(BaseModel):
    """One label the classifier considers."""

    label: str = Field(examples=["cat"])
    index: int = Field(ge=0, examples=[3])
    probability: float = Field(ge=0, le=1, examples=[0.97])


class ImageResult(BaseModel):
    """The verdict on one image, or why there is none."""

    filename: str | None = Field(None, description="As the form named it.", examples=["cat.jpg"])
    verdict: Literal["id", "uncertain", "ood"] | None = None
    feature_norm: float | None = Field(None, description="FeatureNorm of the selected block.")
    score: float | None = Field(None, description="Compared with the threshold; high means ID.")
    threshold: float | None = None
    p_value: float | None = Field(
        None, description="Share of calibration images at least as odd as this one."
    )
    predictions: list[Prediction] = Field(description="Most probable first.")
    error: str | None = Field(None, description="Why this image has no verdict.")


class ScoreResponse(BaseModel):
    """The answer to ``POST /v1/score``: one result an image, in order."""

    model: str = Field(examples=["cifar10-resnet18"])
    version: int = Field(examples=[1])
    request_id: str
    results: list[ImageResult]


class ShadowSummary(BaseModel):
    """A version that scores a share of the live images and never answers."""

    version: int
    share: float = Field(gt=0, le=1)


class ModelSummary(BaseModel):
    """A loaded model and its versions."""

    name: str = Field(examples=["cifar10-resnet18"])
    active_version: int = Field(examples=[1])
    versions: list[int] = Field(description="Loaded: those a request may name.")
    shadow: ShadowSummary | None = None


class ModelList(BaseModel):
    """The loaded models; ``default`` answers when a request names none."""

    default: str
    models: list[ModelSummary]


class VersionStatus(BaseModel):
    """What one version does, or why it cannot."""

    model_config = ConfigDict(from_attributes=True)

    name: str = Field(examples=["cifar10-resnet18"])
    version: int = Field(examples=[1])
    state: Literal["active", "loaded", "shadow", "stored", "failed"]
    reason: str = Field("", description="Why it could not be loaded.")


class VersionList(BaseModel):
    """Versions, by name and number."""

    versions: list[VersionStatus]


class ModelVersion(BaseModel):
    """One version: what it does, and the calibration evidence."""

    model_config = ConfigDict(protected_namespaces=())

    is_active: bool
    state: Literal["active", "loaded", "shadow", "stored", "failed"]
    engines: list[EngineName] = Field(description="What runs it; none while it is not loaded.")
    bundle: Bundle


class Health(BaseModel):
    """The state a probe asks for."""

    status: Literal["ok"]
