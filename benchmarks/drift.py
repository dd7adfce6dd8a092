"""Drift on simulated weeks of the bundled model's scores: false alarms, and the delay of true ones.

Makes the figures of ``docs/drift.md``::

    python -m benchmarks.drift

The test bounds false alarms where calibration and live scores are exchangeable. So that they are,
each run draws both, independently, from one pool: the scores of the 5,000 calibration and the
10,000 test images of CIFAR-10. (With the bundle's own calibration scores in every run, 200 runs
would tell of one calibration, and the bound is an average over calibrations.) Equal scores, which
drawing with replacement brings, are what the test's lots are for.
"""

import argparse
import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from app.core.images import load as load_image
from app.offline.tables import markdown_table
from app.serving.drift import DriftMonitor
from app.serving.exchangeability import ExchangeabilityTest, lots, quantile_bins
from app.store import LoadedBundle, Store
from benchmarks.datasets import ROOT, cifar10_split, unpack

SCORES: Final = ROOT / "build" / "drift-scores.npz"
BOUND: Final = 0.01
CALIBRATION: Final = 5_000
EARLY: Final = 1_000
SHIFTED: Final = 0.1
SHIFTS: Final = ("svhn", "textures")
_LOTS: Final = 2**32
PATIENCE: Final = 20_000
"""Images after a shift in which it must be found."""

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Pool:
    """Scores to draw from: of ID images, and of OOD images by data set."""

    id_scores: Scores
    ood_scores: Mapping[str, Scores]


@dataclass(frozen=True)
class Run:
    """One simulated week: the largest capital without a shift, and the images until alarms.

    A delay is None where the shift was not found, or the alarm was there before it.
    """

    largest: float
    delays: Mapping[tuple[str, str], int | None]


def main() -> None:
    """Print the table; the exit status tells whether the bound was broken."""
    options = _parse_arguments()
    loaded = Store(options.model_store).load(options.bundle)
    pool, test_scores = _scores(loaded)
    print(
        f"{_seconds_an_image(loaded, pool) * 1e6:.1f} us of a core an image, all of the monitor\n"
    )
    runs = [
        simulate(pool, seed=seed, week=options.week, early=EARLY, calibration=CALIBRATION)
        for seed in range(options.runs)
    ]
    is_held = report_false_alarms(runs, week=options.week)
    print()
    print("\n".join(delay_table(runs)))
    print()
    _report_real_stream(loaded, test_scores, orders=options.runs)
    raise SystemExit(0 if is_held else 1)


def simulate(pool: Pool, *, seed: int, week: int, early: int, calibration: int) -> Run:
    """A week of ID images, and shifts ``early`` in it and at its end.

    Args:
        pool: what is drawn from.
        seed: of everything drawn.
        week: images.
        early: images before the early shift.
        calibration: images of the calibration set.
    """
    chooser = np.random.default_rng(seed)
    # Lots of a generator of their own: those of ``chooser`` would know the scores.
    bins = quantile_bins(chooser.choice(pool.id_scores, calibration), seed=_LOTS + seed)
    lot = lots(seed)
    stream = [bins.of(score, lot()) for score in chooser.choice(pool.id_scores, week).tolist()]
    delays: dict[tuple[str, str], int | None] = {}
    for start, images in (("early", stream[:early]), ("late", stream)):
        test = ExchangeabilityTest(bins.gaps)
        for index in images:
            test.observe(index)
        for name, scores in pool.ood_scores.items():
            shifted = mixed(pool.id_scores, scores, share=SHIFTED, chooser=chooser)
            delays[name, start] = _delay(
                test, (bins.of(score, lot()) for score in shifted.tolist())
            )
    return Run(test.largest, delays)


def mixed(
    id_scores: Scores, ood_scores: Scores, *, share: float, chooser: np.random.Generator
) -> Scores:
    """``PATIENCE`` scores, each of an OOD image with probability ``share``."""
    is_ood = chooser.random(PATIENCE) < share
    drawn: Scores = np.where(
        is_ood, chooser.choice(ood_scores, PATIENCE), chooser.choice(id_scores, PATIENCE)
    )
    return drawn


def report_false_alarms(runs: Sequence[Run], *, week: int) -> bool:
    """Whether no more weeks raised an alarm than the bound explains; prints how many did."""
    alarms = sum(run.largest >= 1 / BOUND for run in runs)
    p_value = binomtest(alarms, len(runs), BOUND, alternative="greater").pvalue
    print(
        f"{len(runs)} weeks of {week:,} ID images: {alarms} false alarms, bound {BOUND:.0%}; "
        f"p = {p_value:.2f} that the bound explains them. Largest capital of all: "
        f"{max(run.largest for run in runs):.1f} of the {1 / BOUND:.0f} that an alarm needs"
    )
    return bool(p_value > 0.01)


def delay_table(runs: Sequence[Run]) -> list[str]:
    """Images from a shift to its alarm, as Markdown; weeks with a false alarm are left out."""
    rows, runs = [], [run for run in runs if run.largest < 1 / BOUND]
    for name, start in runs[0].delays:
        found = [delay for run in runs if (delay := run.delays[name, start]) is not None]
        delays = np.quantile(found, [0.5, 0.9]) if found else (np.nan, np.nan)
        rows.append(
            [
                f"{SHIFTED:.0%} {name}, {start}",
                f"{len(found)}/{len(runs)}",
                *(f"{delay:.0f}" for delay in delays),
            ]
        )
    return list(markdown_table(["shift", "found", "median delay, images", "90 % within"], rows))


def _delay(before: ExchangeabilityTest, shifted: Iterable[int]) -> int | None:
    if before.largest >= 1 / BOUND:
        return None
    test = copy.deepcopy(before)
    for images, index in enumerate(shifted, 1):
        if test.observe(index) >= 1 / BOUND:
            return images
    return None


def _report_real_stream(loaded: LoadedBundle, test_scores: Scores, *, orders: int) -> None:
    """The bundle's own calibration against its test images, each once."""
    bins, alarms = quantile_bins(loaded.calibration_scores), 0
    for seed in range(orders):
        lot, test = lots(seed), ExchangeabilityTest(bins.gaps)
        for score in np.random.default_rng(seed).permutation(test_scores).tolist():
            test.observe(bins.of(score, lot()))
        alarms += test.largest >= 1 / BOUND
    print(
        f"The bundle's own calibration against its {len(test_scores):,} test images, "
        f"in {orders} orders: {alarms} alarms"
    )


def _seconds_an_image(loaded: LoadedBundle, pool: Pool, *, images: int = 100_000) -> float:
    """The least of three turns: other work on the machine only adds."""
    monitor = DriftMonitor(
        loaded.calibration_scores, threshold=loaded.bundle.threshold, model="m", version=1
    )
    scores = np.random.default_rng(0).choice(pool.id_scores, images).tolist()
    turns = []
    for _ in range(3):
        started = time.process_time()
        for score in scores:
            monitor.observe(score=score, is_ood=False)
        turns.append((time.process_time() - started) / images)
    return min(turns)


def _scores(loaded: LoadedBundle) -> tuple[Pool, Scores]:
    if not SCORES.exists():
        folders = {"cifar10": cifar10_split()[2], **{name: unpack(name) for name in SHIFTS}}
        found = {name: _score_all(loaded, folder) for name, folder in folders.items()}
        SCORES.parent.mkdir(exist_ok=True)
        np.savez(SCORES, allow_pickle=False, **found)
    with np.load(SCORES, allow_pickle=False) as found:
        ood_scores = {name: found[name] for name in SHIFTS}
        test_scores = found["cifar10"]
    return Pool(np.concatenate([loaded.calibration_scores, test_scores]), ood_scores), test_scores


def _score_all(loaded: LoadedBundle, folder: Path) -> Scores:
    detector, preprocessing = loaded.detector(), loaded.bundle.preprocessing
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    scores = []
    for start in range(0, len(files), 256):
        images = [load_image(file.read_bytes(), preprocessing) for file in files[start:][:256]]
        scores.append(detector.judge(torch.stack(images)).scores)
    return np.concatenate(scores)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", default="cifar10-resnet18")
    parser.add_argument("--model-store", type=Path, default=ROOT / "model_store")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--week", type=int, default=100_000, help="images of a week")
    return parser.parse_args()


if __name__ == "__main__":
    main()
