"""The statistics of a model version."""

import threading
import time

from app.serving.statistics import Duration, ModelStatistics


def test_before_the_first_request() -> None:
    """Everything is zero, and every step is there."""
    totals = ModelStatistics().totals()

    assert (totals.images, totals.batches, totals.last_s) == (0, 0, 0)
    assert set(totals.steps.values()) == {Duration(0, 0)}
    assert list(totals.steps) == [
        *("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    ]


def test_a_batch() -> None:
    """Each image of a batch waits on its own, and each takes the whole forward pass."""
    statistics = ModelStatistics()
    before = time.time()
    statistics.observe_batch(waits_s=[0.25, 0.5], forward_s=2)
    statistics.observe_batch(waits_s=[0], forward_s=1)
    totals = statistics.totals()

    assert (totals.images, totals.batches) == (3, 2)
    assert totals.steps["queue"] == Duration(3, 0.75)
    assert totals.steps["compute_infer"] == Duration(3, 5)
    assert totals.forward_by_batch_size == {1: Duration(1, 1), 2: Duration(1, 2)}
    assert before <= totals.last_s <= time.time()


def test_steps_add_up() -> None:
    """Observations of one step are added, whichever thread makes them."""
    statistics = ModelStatistics()

    def observe() -> None:
        for _ in range(1000):
            statistics.observe("success", 0.5)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert statistics.totals().steps["success"] == Duration(4000, 2000)
    assert statistics.totals().steps["fail"] == Duration()
