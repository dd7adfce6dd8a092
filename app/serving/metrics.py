"""The Prometheus families of DESIGN section 4, in a registry of their own."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from app.core.detector import Verdict
from app.core.engines import EngineName
from app.serving.drift import DriftCollector
from app.serving.stages import STAGES, Interval, Stage, intervals
from app.store import Bundle

RejectReason = Literal[
    "malformed",
    "too_large",
    "unsupported",
    "undecodable",
    "queue_full",
    "memory",
    "unauthorized",
    "not_ready",
    "deadline",
    "abandoned",
    "upstream",
    "failed",
]
REJECT_REASONS: Final[tuple[RejectReason, ...]] = get_args(RejectReason)

ReviewDropReason = Literal["busy", "too_large", "failed"]

VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)

_RATIO_BUCKETS: Final = (
    *(0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0),
    *(1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 3.0, 5.0),
)
_P_VALUE_BUCKETS: Final = (0.001, 0.01, 0.05, *(tenth / 10 for tenth in range(1, 11)))
_SECONDS_BUCKETS: Final = (
    *(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
    *(0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
)
_SIZE_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ScoreMetrics:
    """The series of one model version, bound once so that an image costs no look-up."""

    def __init__(self, families: "ScoreFamilies", *, model: str, version: int) -> None:
        labels = (model, str(version))
        self._images = {verdict: families.images.labels(*labels, verdict) for verdict in VERDICTS}
        self._score_ratio = families.score_ratio.labels(*labels)
        self._p_value = families.p_value.labels(*labels)

    def observe(self, *, score: float, threshold: float, p_value: float, verdict: Verdict) -> None:
        """Count one scored image."""
        self._images[verdict].inc()
        # A threshold of zero or below has no meaningful ratio; the p-value tells the same. A score
        # that is no number, as a shadow may give, would make one of the sum for good.
        if threshold > 0 and math.isfinite(score):
            self._score_ratio.observe(score / threshold)
        self._p_value.observe(p_value)


class ShadowMetrics(ScoreMetrics):
    """The series of a version that looks on, and how often it disagrees."""

    def __init__(self, metrics: "Metrics", *, model: str, version: int) -> None:
        super().__init__(metrics.shadow_scores, model=model, version=version)
        self._disagreements = {
            verdict: metrics.shadow_disagreements.labels(model, str(version), verdict)
            for verdict in VERDICTS
        }

    def disagree(self, verdict: Verdict) -> None:
        """Count one image that this version finds ``verdict`` and the active one does not."""
        self._disagreements[verdict].inc()


class ScoreFamilies:
    """What is known of scored images: their verdicts, scores and p-values.

    Args:
        registry: where the families are registered.
        prefix: before each name; shadows have families of their own, so that a sum over
            versions counts no image twice.
        who: ends each help text.
    """

    def __init__(self, registry: CollectorRegistry, *, prefix: str = "", who: str = "") -> None:
        model = ("model", "version")
        self.images = Counter(
            f"normgate_{prefix}images",
            f"Images scored{who}, by verdict.",
            (*model, "verdict"),
            registry=registry,
        )
        self.score_ratio = Histogram(
            f"normgate_{prefix}score_ratio",
            f"Score over threshold{who}: below 1 is OOD.",
            model,
            buckets=_RATIO_BUCKETS,
            registry=registry,
        )
        self.p_value = Histogram(
            f"normgate_{prefix}p_value",
            f"Conformal p-value{who}: uniform while the stream is ID.",
            model,
            buckets=_P_VALUE_BUCKETS,
            registry=registry,
        )


class Metrics:
    """All families; one instance a service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        model = ("model", "version")
        self.scores = ScoreFamilies(self.registry)
        self.shadow_scores = ScoreFamilies(
            self.registry, prefix="shadow_", who=" by a shadow version"
        )
        self.shadow_disagreements = Counter(
            "normgate_shadow_disagreements",
            "Images that a shadow version judged otherwise than the active one, by its verdict.",
            (*model, "verdict"),
            registry=self.registry,
        )
        self.shadow_dropped = Counter(
            "normgate_shadow_dropped",
            "Images that a shadow version should have scored and could not: no room, or an error.",
            registry=self.registry,
        )
        self.stage_seconds = self._histogram(
            "stage_seconds", "Time spent in each stage of a request.", _SECONDS_BUCKETS, ("stage",)
        )
        self.batch_size = self._histogram(
            "batch_size", "Images in one forward pass.", _SIZE_BUCKETS, ()
        )
        self.ready = self._gauge("ready", "1 while the service wants requests, as /readyz says.")
        self.queue_depth = self._gauge("queue_depth", "Images that wait for a device.")
        self.in_flight = self._gauge("in_flight", "Scoring requests being answered.")
        self.rejected = Counter(
            "normgate_rejected",
            "Images or requests that got no verdict, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.model_info = self._gauge(
            "model_info",
            "1 for every loaded model version.",
            (*model, "architecture", "block"),
        )
        self.model_load_seconds = self._gauge(
            "model_load_seconds", "Time it took to load and warm up a model version.", model
        )
        self.model_engine = self._gauge(
            "model_engine", "1 for every engine that runs a loaded version.", (*model, "engine")
        )
        self.model_role = self._gauge(
            "model_role",
            "1 for what a loaded version does: answer (active), answer when named (loaded), "
            "or look on (shadow).",
            (*model, "role"),
        )
        self.inflight_bytes = self._gauge(
            "inflight_bytes", "Bytes of uploads and decoded pixels held by requests."
        )
        self.review_images = self._gauge("review_queue_images", "Images kept for review.")
        self.review_bytes = self._gauge("review_queue_bytes", "Bytes of the review folder.")
        self.review_labels = Counter(
            "normgate_review_labels",
            "Labels that people gave to images kept for review; a changed one counts again.",
            (*model, "label"),
            registry=self.registry,
        )
        self.review_dropped = Counter(
            "normgate_review_dropped",
            "Images that were to be kept for review and were not: too many at once (busy), "
            "too large, or a write failed.",
            ("reason",),
            registry=self.registry,
        )
        self.drift = DriftCollector()
        self.registry.register(self.drift)
        self._engines: dict[tuple[str, str], frozenset[EngineName]] = {}
        self._roles: dict[str, set[tuple[str, str]]] = {}
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}
        self._rejected = {reason: self.rejected.labels(reason) for reason in REJECT_REASONS}

    def observe_stage(
        self, stage: Stage, seconds: float, *, kept: list[Interval] | None = None
    ) -> None:
        """Take in a stage that has just ended.

        Args:
            stage: which it was.
            seconds: that it took.
            kept: the request's intervals, where it is traced and this is not its context.
        """
        self._stages[stage].observe(seconds)
        if kept is None:
            kept = intervals()
        if kept is not None:
            now = time.monotonic()
            kept.append(Interval(stage, now - seconds, now))

    def reject(self, reason: RejectReason, count: int = 1) -> None:
        """Count images or requests that got no verdict."""
        self._rejected[reason].inc(count)

    def remember(
        self, bundle: Bundle, *, load_seconds: float, engines: Iterable[EngineName]
    ) -> None:
        """A version has been loaded."""
        key = bundle.name, str(bundle.version)
        self._engines[key] = frozenset(engines)
        for engine in self._engines[key]:
            self.model_engine.labels(*key, engine).set(1)
        self.model_info.labels(*_info_labels(bundle)).set(1)
        self.model_load_seconds.labels(bundle.name, str(bundle.version)).set(load_seconds)

    def forget(self, bundle: Bundle) -> None:
        """A version has been let go; its counters stay, as Prometheus wants them."""
        self.model_info.remove(*_info_labels(bundle))
        key = bundle.name, str(bundle.version)
        for engine in self._engines.pop(key):
            self.model_engine.remove(*key, engine)
        self.model_load_seconds.remove(bundle.name, str(bundle.version))

    def set_roles(self, model: str, roles: Mapping[int, str]) -> None:
        """What the loaded versions of a model do now."""
        now = {(str(version), role) for version, role in roles.items()}
        for version, role in self._roles.get(model, set()) - now:
            self.model_role.remove(model, version, role)
        for version, role in now:
            self.model_role.labels(model, version, role).set(1)
        self._roles[model] = now

    def _histogram(
        self, name: str, text: str, buckets: Iterable[float], labels: Iterable[str]
    ) -> Histogram:
        return Histogram(
            f"normgate_{name}", text, tuple(labels), buckets=tuple(buckets), registry=self.registry
        )

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(f"normgate_{name}", text, tuple(labels), registry=self.registry)


def _info_labels(bundle: Bundle) -> tuple[str, str, str, str]:
    return bundle.name, str(bundle.version), bundle.architecture.id, bundle.block
