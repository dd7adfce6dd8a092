"""Evaluation: the metrics by hand, the promise on real data."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from app.core.images import load
from app.errors import CalibrationError
from app.offline.calibrate import CalibrationOptions
from app.offline.evaluate import auroc, evaluate, fpr95
from app.store import Store
from benchmarks.datasets import ROOT, cifar10_split, unpack
from tests.conftest import IMAGES, draw_images, silent
from tests.pictures import jpeg


def wide(scores: Sequence[float]) -> NDArray[np.float64]:
    """Scores as the metrics take them."""
    return np.asarray(scores, dtype=np.float64)


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        ([2, 3], [0, 1], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 3], [0, 2], 0.75),
        ([1, 1], [1, 1, 1], 0.5),
        ([1, 2], [1, 0], 0.875),
        ([5], [5, 4, 4, 6], 0.625),
    ],
)
def test_auroc_by_hand(inside: Sequence[float], outside: Sequence[float], expected: float) -> None:
    """The share of pairs in which ID scores higher, a tie counting half."""
    assert auroc(wide(inside), wide(outside)) == pytest.approx(expected, abs=1e-12)


def test_auroc_is_the_share_of_pairs() -> None:
    """On many scores with ties it is the mean over all pairs."""
    generator = np.random.default_rng(0)
    inside = generator.integers(3, 13, 200).astype(np.float64)
    outside = generator.integers(0, 10, 300).astype(np.float64)
    difference = inside[:, None] - outside[None]

    assert auroc(inside, outside) == pytest.approx(
        np.mean((difference > 0) + 0.5 * (difference == 0)), abs=1e-12
    )


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        # Of 1..20 the highest threshold that keeps 19 is 2.
        (range(1, 21), [1.9, 2, 2.1, 0], 0.5),
        (range(1, 21), [0, 1], 0.0),
        (range(1, 21), [30, 40], 1.0),
        # Of 10 images 95 % are kept only when all 10 are.
        (range(1, 11), [0.5, 1, 1.5, 9], 0.75),
        # Ties at the threshold are all kept, ID and OOD.
        ([1] * 19 + [2], [1, 1, 0, 2], 0.75),
        ([7], [7, 6], 0.5),
    ],
)
def test_fpr95_by_hand(inside: Sequence[float], outside: Sequence[float], expected: float) -> None:
    """The share of OOD at or above the highest threshold that keeps 95 % of ID."""
    assert fpr95(wide(inside), wide(outside)) == expected


def test_fpr95_takes_id_as_positive() -> None:
    """As in the paper: a few low ID scores cost nothing, a few high OOD scores count as such.

    With OOD as positive (OpenOOD) the same scores would give 1.0: to catch 95 % of the OOD
    images the threshold has to lie above every ID image.
    """
    inside, outside = wide([0] * 5 + [10] * 95), wide([1] * 90 + [20] * 10)

    assert fpr95(inside, outside) == 0.1


def test_what_an_evaluation_reports(tiny_store: Store, tiny_options: CalibrationOptions) -> None:
    """On the calibration images k - 1 of n lie below the threshold, which is the k-th."""
    loaded = tiny_store.load("tiny")

    evaluation = evaluate(
        loaded,
        id_images=tiny_options.threshold_images,
        ood_images={"same": tiny_options.threshold_images, "other": tiny_options.selection_images},
        progress=silent,
    )

    threshold = loaded.bundle.threshold
    assert (threshold.n, threshold.k) == (IMAGES, 5)
    assert evaluation.bundle == "tiny/1"
    assert evaluation.false_alarm_rate == evaluation.detection_rate["same"] == 4 / 24
    assert evaluation.false_alarms_promised == (
        threshold.false_alarm_rate.low,
        threshold.false_alarm_rate.high,
    )
    assert (evaluation.id_images, evaluation.ood_images) == (24, {"same": 24, "other": 24})
    assert evaluation.accuracy is None
    assert evaluation.results.keys() >= {"feature_norm", "msp", "energy"}
    for results in evaluation.results.values():
        # Images against themselves.
        assert results["same"].auroc == pytest.approx(0.5)
        assert results["same"].fpr95 == pytest.approx(23 / 24)
        assert 0 <= results["other"].auroc <= 1


def test_the_codec_changes_ood_images_alone(
    tiny_store: Store, tiny_options: CalibrationOptions
) -> None:
    """``jpeg75`` puts the OOD images through JPEG once more and leaves the ID images alone."""
    loaded = tiny_store.load("tiny")

    raw, jpeg75 = (
        evaluate(
            loaded,
            id_images=tiny_options.threshold_images,
            ood_images={"same": tiny_options.threshold_images},
            progress=silent,
            codec=codec,
        )
        for codec in ("raw", "jpeg75")
    )

    assert (raw.codec, jpeg75.codec) == ("raw", "jpeg75")
    assert raw.false_alarm_rate == jpeg75.false_alarm_rate
    assert raw.results["energy"]["same"].auroc == pytest.approx(0.5)
    assert jpeg75.results["energy"]["same"].auroc != pytest.approx(0.5, abs=1e-9)


def test_accuracy_needs_folders_named_after_labels(tiny_store: Store, tmp_path: Path) -> None:
    """It is the share of ID images whose folder names the class with the largest logit."""
    loaded = tiny_store.load("tiny")
    detector = loaded.detector()
    images = torch.stack([load(jpeg(seed), loaded.bundle.preprocessing) for seed in range(12)])
    logits = detector.detect(images).logits
    assert logits is not None
    predicted = [loaded.bundle.labels[index] for index in logits.argmax(axis=1)]
    for seed, label in enumerate(predicted):
        # Three of the twelve lie in a folder of another class.
        others = [other for other in loaded.bundle.labels if other != label]
        draw_images(tmp_path / "id" / (others[0] if seed < 3 else label), [seed])

    evaluation = evaluate(
        loaded, id_images=tmp_path / "id", ood_images={"same": tmp_path / "id"}, progress=silent
    )

    assert evaluation.accuracy == 0.75


def test_every_file_of_a_pass_is_told(tiny_store: Store, tiny_options: CalibrationOptions) -> None:
    """Progress runs from 0 to the number of files, once for ID and once a data set."""
    seen: list[tuple[str, int, int]] = []

    def watch(title: str, *, done: int, total: int) -> None:
        seen.append((title, done, total))

    evaluate(
        tiny_store.load("tiny"),
        id_images=tiny_options.threshold_images,
        ood_images={"drawn": tiny_options.selection_images},
        progress=watch,
        batch_size=16,
    )

    assert seen == [(title, done, 24) for title in ("ID", "drawn") for done in (0, 16, 24)]


def test_a_missing_ood_folder_is_named(
    tiny_store: Store, tiny_options: CalibrationOptions, tmp_path: Path
) -> None:
    """A folder that is not there ends the evaluation with its name."""
    with pytest.raises(CalibrationError, match="absent is not a folder"):
        evaluate(
            tiny_store.load("tiny"),
            id_images=tiny_options.threshold_images,
            ood_images={"absent": tmp_path / "absent"},
            progress=silent,
        )


@pytest.mark.slow
def test_the_bundled_model_keeps_its_promise() -> None:
    """On CIFAR-10's test images the false alarms are as promised, and SVHN is told apart.

    The bundle's interval is for the rate itself; 10,000 images measure it with a binomial error.
    """
    try:
        test_images, svhn = cifar10_split()[2], unpack("svhn")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    loaded = Store(ROOT / "model_store").load("cifar10-resnet18")

    evaluation = evaluate(
        loaded, id_images=test_images, ood_images={"svhn": svhn}, progress=silent, codec="jpeg75"
    )

    low, high = evaluation.false_alarms_promised
    n = evaluation.id_images
    assert n == 10_000
    assert (
        low - 1.96 * math.sqrt(low * (1 - low) / n)
        <= evaluation.false_alarm_rate
        <= high + 1.96 * math.sqrt(high * (1 - high) / n)
    )
    assert evaluation.results["feature_norm"]["svhn"].auroc > 0.9
    assert evaluation.accuracy is not None
    assert evaluation.accuracy > 0.85
