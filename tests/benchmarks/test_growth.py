"""Costs that are measured in turns."""

from collections.abc import Callable

import pytest

from benchmarks.growth import in_turns, times_as_long


def test_cost_of_an_image() -> None:
    """Milliseconds of the clock over images; the first run of a way is warm-up, not counted."""
    now = 0.0
    runs: list[str] = []

    def taking(name: str, seconds: float, images: int) -> Callable[[], int]:
        def run() -> int:
            nonlocal now
            now += seconds if name in runs else 100
            runs.append(name)
            return images

        return run

    costs = in_turns(
        {"slow": taking("slow", 0.2, 1), "batched": taking("batched", 0.4, 8)},
        rounds=3,
        seconds=0.5,
        clock=lambda: now,
    )

    assert costs == {"slow": pytest.approx(200), "batched": pytest.approx(50)}
    assert runs == ["slow", "batched", *3 * ["slow", "slow", "slow", "batched", "batched"]]


def test_what_a_scaled_decode_gives() -> None:
    """Both sides are of one run; what was measured on one side alone has no ratio."""
    assert times_as_long({"4": 30.0, "4, at a scale": 12.0, "layer1": 7.0}) == {"4": 2.5}
