"""Evaluation: what it reports."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core.images import load
from app.errors import CalibrationError
from app.offline.calibrate import CalibrationOptions, calibrate
from app.offline.evaluate import evaluate
from app.offline.methods import FITTED
from app.store import Store
from tests.conftest import IMAGES, draw_images, silent
from tests.pictures import jpeg


def test_what_an_evaluation_reports(tiny_store: Store, tiny_options: CalibrationOptions) -> None:
    """On the calibration images k - 1 of n lie below the threshold, which is the k-th."""
    loaded = tiny_store.load("tiny")

    evaluation = evaluate(
        loaded,
        id_images=Path(tiny_options.threshold_images),
        ood_images={
            "same": Path(tiny_options.threshold_images),
            "other": Path(tiny_options.selection_images),
        },
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
            id_images=Path(tiny_options.threshold_images),
            ood_images={"same": Path(tiny_options.threshold_images)},
            progress=silent,
            codec=codec,
        )
        for codec in ("raw", "jpeg75")
    )

    assert (raw.codec, jpeg75.codec) == ("raw", "jpeg75")
    assert raw.false_alarm_rate == jpeg75.false_alarm_rate
    assert raw.results["energy"]["same"].auroc == pytest.approx(0.5)
    assert jpeg75.results["energy"]["same"].auroc != pytest.approx(0.5, abs=1e-9)


def test_a_bundle_in_bfloat16(half_store: Store, tiny_options: CalibrationOptions) -> None:
    """Every method measures it, and the false alarms are those of its own threshold."""
    evaluation = evaluate(
        half_store.load("tiny"),
        id_images=Path(tiny_options.threshold_images),
        ood_images={"drawn": Path(tiny_options.selection_images)},
        training_images=Path(tiny_options.selection_images),
        progress=silent,
        resamples=10,
    )

    bundle = half_store.read("tiny")
    assert evaluation.left_out == {}
    assert evaluation.false_alarm_rate == (bundle.threshold.k - 1) / bundle.threshold.n


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
        id_images=Path(tiny_options.threshold_images),
        ood_images={"drawn": Path(tiny_options.selection_images)},
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
            id_images=Path(tiny_options.threshold_images),
            ood_images={"absent": tmp_path / "absent"},
            progress=silent,
        )


def test_methods_fitted_on_training_images(
    tiny_store: Store, tiny_options: CalibrationOptions
) -> None:
    """With training images every method is there; without them the fitted ones say why not."""
    folders: dict[str, Any] = {
        "id_images": tiny_options.threshold_images,
        "ood_images": {"drawn": tiny_options.selection_images},
    }
    loaded = tiny_store.load("tiny")

    fitted = evaluate(
        loaded, **folders, training_images=Path(tiny_options.selection_images), progress=silent
    )
    unfitted = evaluate(loaded, **folders, progress=silent, with_odin=False)

    assert fitted.training_images == IMAGES
    assert fitted.left_out == {}
    assert set(fitted.results) - set(unfitted.results) == {*FITTED, "odin", "selected_norm_odin"}
    assert {unfitted.left_out[name] for name in FITTED} == {"no training images were given"}


def test_averages_and_groups(tiny_store: Store, tiny_options: CalibrationOptions) -> None:
    """Means are over all data sets and over those called near or far; intervals hold them."""
    ood = {
        "one": Path(tiny_options.selection_images),
        "two": Path(tiny_options.threshold_images),
        "three": Path(tiny_options.selection_images),
    }
    evaluation = evaluate(
        tiny_store.load("tiny"),
        id_images=Path(tiny_options.threshold_images),
        ood_images=ood,
        groups={"two": "near", "three": "far"},
        progress=silent,
        with_odin=False,
    )

    for method, averages in evaluation.averages.items():
        results = evaluation.results[method]
        mean = sum(results[name].auroc for name in ood) / 3
        assert averages["all"].auroc == pytest.approx(mean)
        assert averages["near"].auroc == pytest.approx(results["two"].auroc)
        assert averages["far"].fpr95 == pytest.approx(results["three"].fpr95)
        low, high = averages["all"].intervals["auroc"]
        assert 0 <= low <= averages["all"].auroc <= high <= 1
    assert evaluation.groups == {"two": "near", "three": "far"}


def test_every_block_and_the_oracle(tiny_store: Store, tiny_options: CalibrationOptions) -> None:
    """FeatureNorm is measured at every block; the selected one's row is the method's."""
    loaded = tiny_store.load("tiny")
    evaluation = evaluate(
        loaded,
        id_images=Path(tiny_options.threshold_images),
        ood_images={"drawn": Path(tiny_options.selection_images)},
        progress=silent,
        with_odin=False,
    )

    names = [row.block for row in loaded.bundle.norm_ratios.blocks]
    assert list(evaluation.blocks) == names
    own = evaluation.blocks[loaded.bundle.block]["drawn"]
    assert own == evaluation.results["feature_norm"]["drawn"]
    best = max(names, key=lambda name: evaluation.blocks[name]["all"].auroc)
    assert evaluation.oracle_block == best


def test_the_paper_s_conventions(
    tiny_store: Store, tiny_options: CalibrationOptions, tmp_path: Path
) -> None:
    """The block is selected with a zero edge, as a calibration with that edge selects it."""
    zero = Store(tmp_path)
    expected = calibrate(replace(tiny_options, edge="zero"), zero, progress=silent).bundle
    folders: dict[str, Any] = {
        "id_images": tiny_options.threshold_images,
        "ood_images": {"drawn": tiny_options.selection_images},
        "progress": silent,
        "is_paper": True,
        "with_odin": False,
    }

    anew = evaluate(
        tiny_store.load("tiny"), **folders, training_images=Path(tiny_options.selection_images)
    )
    own = evaluate(zero.load("tiny"), **folders)

    assert anew.block == own.block == expected.block
    assert anew.results["feature_norm"] == own.results["feature_norm"]
    with pytest.raises(CalibrationError, match="calibrated with edge keep"):
        evaluate(tiny_store.load("tiny"), **folders)
