"""The Prometheus families of DESIGN section 4, in a registry of their own."""

from collections.abc import Iterable
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

Stage = Literal["read", "decode", "queue", "forward", "total"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)

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
    "failed",
]
REJECT_REASONS: Final[tuple[RejectReason, ...]] = get_args(RejectReason)

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


class ModelMetrics:
    """The series of one model version, bound once so that an image costs no look-up."""

    def __init__(self, metrics: "Metrics", *, model: str, version: int, threshold: float) -> None:
        labels = (model, str(version))
        self._threshold = threshold
        self._images = {
            is_ood: metrics.images.labels(*labels, "ood" if is_ood else "id")
            for is_ood in (False, True)
        }
        self._score_ratio = metrics.score_ratio.labels(*labels)
        self._p_value = metrics.p_value.labels(*labels)

    def observe(self, *, score: float, p_value: float, is_ood: bool) -> None:
        """Count one scored image."""
        self._images[is_ood].inc()
        # A threshold of zero or below has no meaningful ratio; the p-value tells the same.
        if self._threshold > 0:
            self._score_ratio.observe(score / self._threshold)
        self._p_value.observe(p_value)


class Metrics:
    """All families; one instance a service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        model = ("model", "version")
        self.images = Counter(
            "normgate_images",
            "Images scored, by verdict.",
            (*model, "verdict"),
            registry=self.registry,
        )
        self.score_ratio = self._histogram(
            "score_ratio", "Score over threshold: below 1 is OOD.", _RATIO_BUCKETS, model
        )
        self.p_value = self._histogram(
            "p_value", "Conformal p-value: uniform while the stream is ID.", _P_VALUE_BUCKETS, model
        )
        self.stage_seconds = self._histogram(
            "stage_seconds", "Time spent in each stage of a request.", _SECONDS_BUCKETS, ("stage",)
        )
        self.batch_size = self._histogram(
            "batch_size", "Images in one forward pass.", _SIZE_BUCKETS, ()
        )
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
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}
        self._rejected = {reason: self.rejected.labels(reason) for reason in REJECT_REASONS}

    def observe_stage(self, stage: Stage, seconds: float) -> None:
        """Take one duration in."""
        self._stages[stage].observe(seconds)

    def reject(self, reason: RejectReason, count: int = 1) -> None:
        """Count images or requests that got no verdict."""
        self._rejected[reason].inc(count)

    def _histogram(
        self, name: str, text: str, buckets: Iterable[float], labels: Iterable[str]
    ) -> Histogram:
        return Histogram(
            f"normgate_{name}", text, tuple(labels), buckets=tuple(buckets), registry=self.registry
        )

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(f"normgate_{name}", text, tuple(labels), registry=self.registry)
