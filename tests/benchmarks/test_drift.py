"""The simulated weeks, shorter: false alarms within their bound, shifts found."""

from pathlib import Path

import pytest

from app.store import Store
from benchmarks.drift import Pool, delay_table, report_false_alarms, simulate

STORE = Path(__file__).resolve().parents[2] / "model_store"


def test_false_alarms_and_delays(capsys: pytest.CaptureFixture[str]) -> None:
    """In 200 seeded weeks the bound explains the alarms, and nearly all shifts are found."""
    scores = Store(STORE).load("cifar10-resnet18").calibration_scores
    pool = Pool(scores, {"lowest": scores[:100]})

    runs = [
        simulate(pool, seed=seed, week=2_000, early=300, calibration=1_000) for seed in range(200)
    ]

    assert report_false_alarms(runs, week=2_000)
    assert "200 weeks of 2,000 ID images" in capsys.readouterr().out
    for start in ("early", "late"):
        delays = sorted(run.delays["lowest", start] or 10**9 for run in runs)
        assert delays[100] < 300
        assert delays[180] < 1_000
    assert len(delay_table(runs)) == 4
