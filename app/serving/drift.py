"""Drift of one model version's live scores against its calibration scores, in fixed memory.

Every scored image is told to the version's :class:`DriftMonitor`, in the event loop; whoever
asks, asks there too.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

import numpy as np
import structlog
from numpy.typing import NDArray
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from scipy.special import betaincinv

from app.core.threshold import Threshold
from app.serving.exchangeability import ExchangeabilityTest, lots, quantile_bins

logger: Final = structlog.get_logger(__name__)

Window = Literal["5m", "1h", "1d"]

CONFIDENCE: Final = 0.95
DEFAULT_BOUND: Final = 0.01
HISTOGRAM_BINS: Final = 40
_TICK_S: Final = 5
_WINDOWS: Final[tuple[tuple[Window, int, int], ...]] = (
    ("5m", _TICK_S, 60),
    ("1h", 60, 60),
    ("1d", 1_200, 72),
)
"""Name, seconds of a bucket (whole ticks), and buckets."""
_RECENT: Final[Window] = "1h"
"""Of the histogram, the Kolmogorov-Smirnov distance and PSI."""
_PSI_GROUPS: Final = 10
_SMOOTHING: Final = 0.5

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class OodRate:
    """How many images of a window were OOD, and where their rate lies."""

    window: Window
    seconds: int
    images: int
    ood: int
    rate: float | None
    """None without images, as the bounds are."""
    lower: float | None
    upper: float | None
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class Evidence:
    """What the test of exchangeability has found since it began."""

    log10: float
    max_log10: float
    alarm: bool
    alarmed_at: datetime | None
    false_alarm_bound: float


@dataclass(frozen=True)
class ScoreHistogram:
    """Scores in bins of equal width; those beyond the edges count in the first and last bin."""

    edges: Sequence[float]
    calibration: Sequence[float]
    """Shares."""
    live: Sequence[int]
    """Counts of the recent window."""


@dataclass(frozen=True)
class Drift:
    """All that is known of a version's drift at one moment."""

    since: datetime
    """When the test began."""
    images: int
    """Those that the test has seen."""
    windows: Sequence[OodRate]
    martingale: Evidence
    ks_distance: float | None
    psi: float | None
    histogram: ScoreHistogram


class SlidingCounts:
    """Counts of the last ``seconds * buckets`` seconds, to within one bucket.

    Args:
        seconds: of a bucket.
        buckets: how many are kept, the current one among them.
        size: counts in each.
    """

    def __init__(self, *, seconds: int, buckets: int, size: int) -> None:
        self._seconds = seconds
        self._buckets = np.zeros((buckets, size), dtype=np.int64)
        self._newest = 0

    def add(self, counts: Sequence[int], *, now: float) -> None:
        """Count what has happened at ``now``."""
        self._advance(now)
        self._buckets[self._newest % len(self._buckets)] += counts

    def total(self, *, now: float) -> Counts:
        """``[size]``: what is no older than the window."""
        self._advance(now)
        total: Counts = self._buckets.sum(axis=0)
        return total

    def _advance(self, now: float) -> None:
        newest = int(now // self._seconds)
        oldest = max(self._newest + 1, newest + 1 - len(self._buckets))
        self._buckets[np.arange(oldest, newest + 1) % len(self._buckets)] = 0
        self._newest = max(newest, self._newest)


class DriftMonitor:
    """Watches the scores of one model version.

    Args:
        calibration_scores: ``[N]`` float32, finite.
        threshold: the bundle's.
        model: named in the log, as is the next.
        version: of the model.
        bound: on the chance that the alarm is ever raised while nothing has drifted.
        clock: seconds, never going back.
        utc_now: the time of day.
    """

    def __init__(
        self,
        calibration_scores: NDArray[np.float32],
        *,
        threshold: Threshold,
        model: str,
        version: int,
        bound: float = DEFAULT_BOUND,
        clock: Callable[[], float] = time.monotonic,
        utc_now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.model, self.version, self.alpha = model, version, threshold.alpha
        self._bins = quantile_bins(calibration_scores)
        self._groups = _psi_groups(self._bins.gaps)
        self._lot = lots()
        self._edges, self._calibration = _histogram_of(calibration_scores)
        self._scale = HISTOGRAM_BINS / (self._edges[-1] - self._edges[0])
        self._bound, self._clock, self._utc_now = bound, clock, utc_now
        self._first_bin = 2 + HISTOGRAM_BINS
        # Of the current tick: images, OOD images, the histogram's bins, the test's bins.
        self._tally = [0] * (self._first_bin + len(self._bins.gaps))
        self._tick_ends = -math.inf
        self._sliding = {
            name: SlidingCounts(seconds=seconds, buckets=buckets, size=len(self._tally))
            for name, seconds, buckets in _WINDOWS
        }
        self.reset()

    def reset(self) -> None:
        """Begin the test anew, without an alarm; the windows go on."""
        self._test = ExchangeabilityTest(self._bins.gaps)
        self._since = self._utc_now()
        self._alarmed_at: datetime | None = None

    def observe(self, *, score: float, is_ood: bool) -> None:
        """Take in one scored image; a score that is no number counts as the lowest."""
        now = self._clock()
        if now >= self._tick_ends:
            self._end_tick(now)
        if not math.isfinite(score):
            score = self._edges[0]
        tally, index = self._tally, self._bins.of(score, self._lot())
        tally[0] += 1
        tally[1] += is_ood
        place = int((score - self._edges[0]) * self._scale)
        tally[2 + min(max(place, 0), HISTOGRAM_BINS - 1)] += 1
        tally[self._first_bin + index] += 1
        if self._test.observe(index) >= 1 / self._bound and self._alarmed_at is None:
            self._raise_alarm()

    def drift(self) -> Drift:
        """Everything at this moment."""
        now = self._clock()
        self._end_tick(now)
        totals = {name: sliding.total(now=now) for name, sliding in self._sliding.items()}
        recent = totals[_RECENT]
        binned = recent[self._first_bin :]
        return Drift(
            since=self._since,
            images=self._test.images,
            windows=[
                ood_rate(
                    name, seconds * buckets, images=int(totals[name][0]), ood=int(totals[name][1])
                )
                for name, seconds, buckets in _WINDOWS
            ],
            martingale=self._evidence(),
            ks_distance=ks_distance(binned, self._bins.gaps),
            psi=psi(binned, self._bins.gaps, groups=self._groups),
            histogram=ScoreHistogram(
                self._edges, self._calibration, recent[2 : self._first_bin].tolist()
            ),
        )

    def _evidence(self) -> Evidence:
        return Evidence(
            log10=math.log10(self._test.capital),
            max_log10=math.log10(self._test.largest),
            alarm=self._alarmed_at is not None,
            alarmed_at=self._alarmed_at,
            false_alarm_bound=self._bound,
        )

    def _raise_alarm(self) -> None:
        self._alarmed_at = self._utc_now()
        logger.warning(
            "scores have drifted",
            model=self.model,
            version=self.version,
            images=self._test.images,
            false_alarm_bound=self._bound,
        )

    def _end_tick(self, now: float) -> None:
        """Move what the tick has counted into the windows."""
        if any(self._tally):
            # All of it lies in one bucket of each window, since buckets hold whole ticks.
            happened = self._tick_ends - _TICK_S
            for sliding in self._sliding.values():
                sliding.add(self._tally, now=happened)
            self._tally = [0] * len(self._tally)
        self._tick_ends = (now // _TICK_S + 1) * _TICK_S


def ood_rate(window: Window, seconds: int, *, images: int, ood: int) -> OodRate:
    """The share of OOD images, with the Clopper-Pearson interval of ``CONFIDENCE``."""
    if images == 0:
        return OodRate(window, seconds, images, ood, None, None, None)
    tail = (1 - CONFIDENCE) / 2
    # Quantiles of beta distributions, without the checks that cost scipy.stats 0.1 ms each.
    lower = float(betaincinv(ood, images - ood + 1, tail)) if ood else 0.0
    upper = float(betaincinv(ood + 1, images - ood, 1 - tail)) if ood < images else 1.0
    return OodRate(window, seconds, images, ood, ood / images, lower, upper)


def ks_distance(live: Counts, calibration: Sequence[int]) -> float | None:
    """Largest difference of the two distribution functions, at the ends of the bins.

    Args:
        live: counts by bin.
        calibration: the same bins' weights.

    Returns:
        In [0, 1]; None without live images.
    """
    if not live.any():
        return None
    weights = np.asarray(calibration)
    differences = np.cumsum(live) / live.sum() - np.cumsum(weights) / weights.sum()
    return float(np.abs(differences).max())


def psi(live: Counts, calibration: Sequence[int], *, groups: Counts) -> float | None:
    """Population stability index, ``sum (q - p) ln(q / p)`` over groups of bins.

    Args:
        live: counts by bin; half an image is added to each group, so that none is empty.
        calibration: the same bins' weights, positive.
        groups: ``[bins]``, ascending from 0 without holes.

    Returns:
        At least 0; None without live images.
    """
    if not live.any():
        return None
    counts = np.bincount(groups, weights=live) + _SMOOTHING
    weights = np.bincount(groups, weights=calibration)
    q, p = counts / counts.sum(), weights / weights.sum()
    return float(((q - p) * np.log(q / p)).sum())


class DriftCollector(Collector):
    """The drift of the loaded versions as gauges, computed when they are scraped."""

    def __init__(self) -> None:
        self._monitors: dict[tuple[str, int], DriftMonitor] = {}

    def add(self, monitor: DriftMonitor) -> None:
        """Show a version from now on. Safe in any thread, like :meth:`remove`."""
        self._monitors = {**self._monitors, (monitor.model, monitor.version): monitor}

    def remove(self, monitor: DriftMonitor) -> None:
        """Show it no more; another monitor of the same version stays."""
        self._monitors = {key: one for key, one in self._monitors.items() if one is not monitor}

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """The families without series."""
        yield from _families().values()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The families with a series for each version, of each window where they have one."""
        families = _families()
        for monitor in self._monitors.values():
            _add_series(families, monitor)
        yield from families.values()


_VERSION_LABELS: Final = ("model", "version")
_HELP: Final = {
    "threshold_alpha": "Share of ID images that the threshold lets be called OOD.",
    "drift_martingale_log10": (
        "Evidence that the live scores are not exchangeable with the calibration scores, as log10 "
        "of a capital that began at 1. Near or below 0: none. 2 is a hundredfold gain."
    ),
    "drift_martingale_max_log10": (
        "Largest evidence since the test began; the alarm is raised at "
        "-log10(normgate_drift_false_alarm_bound)."
    ),
    "drift_alarm": (
        "1 once the evidence has crossed its bound, until a reset: images, camera or codec are no "
        "longer like those of the calibration."
    ),
    "drift_false_alarm_bound": "Chance that the alarm is ever raised while nothing has drifted.",
    "drift_ks_distance": (
        "Kolmogorov-Smirnov distance of the last hour's scores from the calibration scores, 0 to "
        "1. High: the scores have moved. NaN without images."
    ),
    "drift_psi": (
        "Population stability index of the last hour's scores over ten groups. Above 0.25 is "
        "commonly called a large shift, with many hundred images. NaN without images."
    ),
}
_WINDOW_HELP: Final = {
    "drift_ood_rate": (
        "Share of OOD images in the window; about alpha while images are ID. NaN without images."
    ),
    "drift_ood_rate_lower": (
        "Lower end of the 95 % interval of the OOD rate. Above alpha: more than false alarms."
    ),
    "drift_ood_rate_upper": "Upper end of the 95 % interval of the OOD rate.",
    "drift_window_images": "Images in the window; the rates of few are uncertain.",
}


def _families() -> dict[str, GaugeMetricFamily]:
    plain = {
        name: GaugeMetricFamily(f"normgate_{name}", text, labels=_VERSION_LABELS)
        for name, text in _HELP.items()
    }
    windowed = {
        name: GaugeMetricFamily(f"normgate_{name}", text, labels=(*_VERSION_LABELS, "window"))
        for name, text in _WINDOW_HELP.items()
    }
    return {**plain, **windowed}


def _add_series(families: dict[str, GaugeMetricFamily], monitor: DriftMonitor) -> None:
    drift, labels = monitor.drift(), (monitor.model, str(monitor.version))
    values = {
        "threshold_alpha": monitor.alpha,
        "drift_martingale_log10": drift.martingale.log10,
        "drift_martingale_max_log10": drift.martingale.max_log10,
        "drift_alarm": float(drift.martingale.alarm),
        "drift_false_alarm_bound": drift.martingale.false_alarm_bound,
        "drift_ks_distance": drift.ks_distance,
        "drift_psi": drift.psi,
    }
    for name, value in values.items():
        families[name].add_metric(labels, _or_nan(value))
    for rate in drift.windows:
        of_window = {
            "drift_ood_rate": rate.rate,
            "drift_ood_rate_lower": rate.lower,
            "drift_ood_rate_upper": rate.upper,
            "drift_window_images": float(rate.images),
        }
        for name, value in of_window.items():
            families[name].add_metric((*labels, rate.window), _or_nan(value))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _histogram_of(scores: NDArray[np.float32]) -> tuple[list[float], list[float]]:
    """Edges somewhat beyond the scores, more so where OOD images fall, and shares of the bins."""
    low, high = float(scores.min()), float(scores.max())
    width = (high - low) or max(abs(high), 1.0)
    edges = np.linspace(low - 0.3 * width, high + 0.1 * width, HISTOGRAM_BINS + 1)
    counts, _ = np.histogram(scores, edges)
    return edges.tolist(), (counts / len(scores)).tolist()


def _psi_groups(gaps: Sequence[int]) -> Counts:
    """Bins of the same tenth of the calibration scores; fewer groups where bins are few."""
    ends = np.cumsum(gaps)
    # The middle of a bin: bins end at tenths, to within half a score.
    tenths = (ends - np.asarray(gaps) / 2) * _PSI_GROUPS // ends[-1]
    return np.unique(tenths, return_inverse=True)[1]
