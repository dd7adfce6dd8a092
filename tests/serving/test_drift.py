"""Drift: windows that slide, plain effect sizes, an alarm that latches, memory that is fixed."""

import math
import tracemalloc
from datetime import UTC, datetime

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from scipy.stats import binomtest
from structlog.testing import capture_logs

from app.core.threshold import fit_threshold
from app.serving.drift import (
    DriftCollector,
    DriftMonitor,
    SlidingCounts,
    ks_distance,
    ood_rate,
    psi,
)

SCORES = np.linspace(0, 1, 1_000, dtype=np.float32)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        """The time now."""
        return self.now


def make_monitor(clock: Clock, *, version: int = 1, bound: float = 0.01) -> DriftMonitor:
    """A monitor of 1,000 scores spread evenly over 0 to 1."""
    return DriftMonitor(
        SCORES,
        threshold=fit_threshold(SCORES),
        model="m",
        version=version,
        bound=bound,
        clock=clock,
        utc_now=lambda: NOON,
    )


def counts(monitor: DriftMonitor) -> list[tuple[int, int]]:
    """Images and OOD images of the three windows."""
    return [(rate.images, rate.ood) for rate in monitor.drift().windows]


def test_windows_slide() -> None:
    """An image leaves each window once it is older than that, within a bucket."""
    clock = Clock()
    monitor = make_monitor(clock)
    monitor.observe(score=0.01, is_ood=True)
    assert counts(monitor) == [(1, 1)] * 3

    clock.now += 290
    monitor.observe(score=0.5, is_ood=False)
    assert counts(monitor) == [(2, 1)] * 3

    clock.now += 15
    assert counts(monitor) == [(1, 0), (2, 1), (2, 1)]
    clock.now += 3_300
    assert counts(monitor) == [(0, 0), (1, 0), (2, 1)]
    clock.now += 86_400
    assert counts(monitor) == [(0, 0)] * 3


def test_reading_loses_nothing() -> None:
    """Images of one tick count once, however often somebody asks in between."""
    clock = Clock()
    monitor = make_monitor(clock)
    for _ in range(7):
        monitor.observe(score=0.5, is_ood=False)
        clock.now += 1
        monitor.drift()

    assert counts(monitor) == [(7, 0)] * 3


def test_sliding_counts() -> None:
    """Two buckets of 10 s hold what is 10 to 20 s old at most."""
    sliding = SlidingCounts(seconds=10, buckets=2, size=1)
    sliding.add([1], now=5)
    sliding.add([2], now=15)

    assert [int(sliding.total(now=now)[0]) for now in (19, 20, 29, 30, 1e9)] == [3, 2, 2, 0, 0]


@pytest.mark.parametrize(("ood", "images"), [(0, 10), (10, 10), (3, 40), (500, 10_000)])
def test_interval(ood: int, images: int) -> None:
    """The interval is scipy's exact one."""
    expected = binomtest(ood, images).proportion_ci(0.95, method="exact")

    rate = ood_rate("5m", 300, images=images, ood=ood)

    assert rate.rate == ood / images
    assert (rate.lower, rate.upper) == pytest.approx((expected.low, expected.high))


def test_no_images_no_rate() -> None:
    """Without images nothing is claimed."""
    drift = make_monitor(Clock()).drift()

    assert [(one.rate, one.lower, one.upper) for one in drift.windows] == [(None,) * 3] * 3
    assert (drift.ks_distance, drift.psi) == (None, None)


def test_effect_sizes_by_hand() -> None:
    """KS is the largest gap of the cumulated shares; PSI sums (q - p) ln(q / p) over groups."""
    live, calibration = np.array([6, 2, 2]), [2, 2, 4]

    assert ks_distance(live, calibration) == pytest.approx(6 / 10 - 2 / 8)
    groups = np.array([0, 0, 1])
    q, p = (8.5 / 11, 2.5 / 11), (0.5, 0.5)
    by_hand = sum((a - b) * math.log(a / b) for a, b in zip(q, p, strict=True))
    assert psi(live, calibration, groups=groups) == pytest.approx(by_hand)


def test_effect_sizes_of_a_shift() -> None:
    """Near 0 for the calibration scores themselves; near their largest for scores beyond all."""
    clock = Clock()
    same, beyond = make_monitor(clock), make_monitor(clock)
    for score in SCORES.tolist():
        same.observe(score=score, is_ood=False)
        beyond.observe(score=9.0, is_ood=False)

    unmoved, moved = same.drift(), beyond.drift()
    assert unmoved.ks_distance == pytest.approx(0, abs=0.005)
    assert unmoved.psi == pytest.approx(0, abs=0.005)
    assert moved.ks_distance == pytest.approx(0.99, abs=0.005)
    assert moved.psi is not None
    assert moved.psi > 5


def test_histogram() -> None:
    """Shares of the calibration add up to 1; live scores beyond the edges count at the ends."""
    monitor = make_monitor(Clock())
    for score in (-100.0, 100.0, math.nan, 0.5):
        monitor.observe(score=score, is_ood=True)

    histogram = monitor.drift().histogram

    assert len(histogram.edges) == len(histogram.live) + 1 == len(histogram.calibration) + 1
    assert sum(histogram.calibration) == pytest.approx(1)
    assert (histogram.live[0], histogram.live[-1], sum(histogram.live)) == (2, 1, 4)
    place = histogram.live.index(1)
    assert histogram.edges[place] <= 0.5 < histogram.edges[place + 1]


def test_equal_calibration_scores() -> None:
    """A calibration of one value has a histogram and effect sizes too."""
    ones = np.ones(100, dtype=np.float32)
    monitor = DriftMonitor(ones, threshold=fit_threshold(ones), model="m", version=1)
    for _ in range(1_000):
        monitor.observe(score=1.0, is_ood=False)

    drift = monitor.drift()

    assert not drift.martingale.alarm
    assert drift.ks_distance is not None
    assert drift.ks_distance < 0.15


def test_the_alarm_latches_and_is_logged_once() -> None:
    """Crossing the bound raises an alarm that stays, is logged once, and ends with a reset."""
    clock = Clock()
    monitor = make_monitor(clock, bound=0.001)
    chooser = np.random.default_rng(0)
    with capture_logs() as lines:
        while not monitor.drift().martingale.alarm:
            monitor.observe(score=-1.0, is_ood=True)
        for score in chooser.random(5_000).tolist():
            monitor.observe(score=score, is_ood=False)

    evidence = monitor.drift().martingale
    assert (evidence.alarm, evidence.alarmed_at) == (True, NOON)
    assert evidence.max_log10 >= 3 > evidence.log10
    [line] = lines
    assert (line["log_level"], line["model"], line["version"]) == ("warning", "m", 1)
    assert 3 <= line["images"] < 100

    monitor.reset()

    drift = monitor.drift()
    assert (drift.images, drift.martingale.log10, drift.martingale.max_log10) == (0, 0, 0)
    assert (drift.martingale.alarm, drift.martingale.alarmed_at) == (False, None)
    assert drift.windows[0].images > 5_000


def test_memory_is_fixed() -> None:
    """More images and more than a day of them take no more memory."""
    clock = Clock()
    monitor = make_monitor(clock)

    def watch(images: int) -> None:
        for _ in range(images):
            clock.now += 12
            monitor.observe(score=0.5, is_ood=False)

    tracemalloc.start()
    try:
        watch(1_000)
        before, _ = tracemalloc.get_traced_memory()
        watch(8_000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert abs(after - before) < 4_096


def test_gauges() -> None:
    """Each version has its series, each window too, and none once it has been let go."""
    registry, collector, clock = CollectorRegistry(), DriftCollector(), Clock()
    registry.register(collector)
    active, shadow = make_monitor(clock), make_monitor(clock, version=2)
    collector.add(active)
    collector.add(shadow)
    active.observe(score=0.01, is_ood=True)

    def read(name: str, version: int, **labels: str) -> float | None:
        labels = {"model": "m", "version": str(version), **labels}
        return registry.get_sample_value(f"normgate_{name}", labels)

    assert read("threshold_alpha", 1) == 0.05
    assert read("drift_ood_rate", 1, window="5m") == 1
    assert read("drift_ood_rate_lower", 1, window="1d") == pytest.approx(0.025)
    assert read("drift_ood_rate_upper", 1, window="1h") == 1
    assert read("drift_window_images", 2, window="1h") == 0
    assert math.isnan(read("drift_ood_rate", 2, window="5m") or 0)
    assert read("drift_alarm", 1) == 0
    assert read("drift_false_alarm_bound", 1) == 0.01
    assert read("drift_martingale_log10", 2) == 0
    assert read("drift_martingale_max_log10", 2) == 0
    assert read("drift_ks_distance", 1) == pytest.approx(0.99, abs=0.01)
    assert (read("drift_psi", 1) or 0) > 0

    collector.remove(shadow)
    assert read("drift_alarm", 2) is None
    assert b'version="2"' not in generate_latest(registry)


def test_a_version_loaded_again_keeps_its_series() -> None:
    """Letting an old monitor go leaves the new one of the same version alone."""
    collector, clock = DriftCollector(), Clock()
    old, new = make_monitor(clock), make_monitor(clock)
    collector.add(old)
    collector.add(new)

    collector.remove(old)

    assert all(len(family.samples) in (1, 3) for family in collector.collect())
