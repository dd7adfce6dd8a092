"""The JSON the service answers with."""

from datetime import UTC, datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from app.core.engines import EngineName
from app.serving.review_folder import ReviewImage
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


class OodRateWindow(BaseModel):
    """The OOD rate of the last minutes, hour or day; null without images."""

    model_config = ConfigDict(from_attributes=True)

    window: Literal["5m", "1h", "1d"]
    seconds: int
    images: int
    ood: int
    rate: float | None
    lower: float | None = Field(description="Clopper-Pearson.")
    upper: float | None
    confidence: float = Field(examples=[0.95])


class DriftEvidence(BaseModel):
    """What the test of exchangeability has found since it began."""

    model_config = ConfigDict(from_attributes=True)

    log10: float = Field(description="Evidence now; near or below 0: none.")
    max_log10: float
    alarm: bool = Field(description="The evidence once crossed its bound; until a reset.")
    alarmed_at: datetime | None
    false_alarm_bound: float = Field(
        description="Chance that the alarm is ever raised without drift.", examples=[0.01]
    )


class DriftHistogram(BaseModel):
    """Scores in bins of equal width; those beyond the edges count in the first and last bin."""

    model_config = ConfigDict(from_attributes=True)

    edges: list[float]
    calibration: list[float] = Field(description="Shares.")
    live: list[int] = Field(description="Images of the last hour.")


class DriftReport(BaseModel):
    """The live scores of a version against its calibration scores."""

    model: str = Field(examples=["cifar10-resnet18"])
    version: int = Field(examples=[1])
    since: datetime = Field(description="When the test began.")
    images: int = Field(description="Seen by the test.")
    alpha: float = Field(description="Share of ID images that may be called OOD.")
    windows: list[OodRateWindow]
    martingale: DriftEvidence
    ks_distance: float | None = Field(description="Of the last hour; null without images.")
    psi: float | None = Field(description="Of the last hour; null without images.")
    histogram: DriftHistogram
    threshold: float
    score: str = Field(description="What is compared.", examples=["feature_norm"])


class ReviewLabel(BaseModel):
    """What a person says of an image; null takes a label away."""

    model_config = ConfigDict(extra="forbid")

    label: Literal["really_ood", "was_fine"] | None


class ReviewList(BaseModel):
    """Images kept for review, newest first: one page of them, and how many there are."""

    total: int
    unlabelled: int
    images: list[ReviewImage]

    @classmethod
    def of(cls, kept: list[ReviewImage], *, before: datetime | None, limit: int) -> Self:
        """The first ``limit`` images that are older than ``before``."""
        # A time without a zone is taken for UTC, in which ours are.
        end = before if before is None or before.tzinfo else before.replace(tzinfo=UTC)
        page = [image for image in kept if end is None or image.time < end][:limit]
        unlabelled = sum(image.label is None for image in kept)
        return cls(total=len(kept), unlabelled=unlabelled, images=page)


class Health(BaseModel):
    """The state a probe asks for."""

    status: Literal["ok"]
