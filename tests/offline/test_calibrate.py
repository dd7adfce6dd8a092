"""Calibration: from two folders of images to a bundle, or to one clear refusal."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from importlib.metadata import version as library_version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import beta
from torch import Tensor, nn

from app.core.images import Preprocessing, load
from app.core.networks import Architecture, build
from app.core.scores import SCORES, SCORES_WITH_HEAD, ScoreName
from app.errors import BundleError, CalibrationError, NetworkError, NormGateError
from app.offline.calibrate import CalibrationOptions, calibrate
from app.store import (
    BUNDLE_FILE,
    CALIBRATION_SCORES_KEY,
    WEIGHTS_FILE,
    LoadedBundle,
    Store,
    reference_score,
)
from tests.conftest import IMAGES, TINY, draw_images, silent

BLOCKS = [f"layer{stage}.{index}" for stage in (1, 2, 3, 4) for index in (0, 1)]
FACTORY = "python/tests.offline.test_calibrate:tiny_network"
NO_HEAD = Architecture(id="python/tests.offline.test_calibrate:network_without_head")
SMALL = Preprocessing(resize=16, crop=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class TinyNetwork(nn.Module):
    """Two convolutions and a linear layer: what a user brings along."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(6, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images."""
        logits: Tensor = self.head(self.second(self.first(images)).mean(dim=(2, 3)))
        return logits


class PooledConvolutions(nn.Sequential):
    """Two convolutions whose pooled maps are the logits: there is no linear layer."""


def network_without_head() -> nn.Module:
    """A user's factory."""
    return PooledConvolutions(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def tiny_network(*, classes: int = 3) -> nn.Module:
    """A user's factory."""
    return TinyNetwork(classes)


def run(options: CalibrationOptions, root: Path) -> LoadedBundle:
    """Calibrate into a store of its own and load what was written."""
    store = Store(root)
    calibration = calibrate(options, store, progress=silent)
    return store.load(
        options.name, calibration.bundle.version, allowed_factories=[options.architecture.id]
    )


def bundle_files(root: Path) -> tuple[bytes, str]:
    """The weights file, and the description without its time of creation."""
    folder = root / "tiny" / "1"
    text = (folder / BUNDLE_FILE).read_text()
    return (folder / WEIGHTS_FILE).read_bytes(), re.sub(r'"created": "[^"]*"', "", text)


def everything_in(root: Path) -> list[Path]:
    """Files and folders of a store, hidden ones included."""
    return list(root.rglob("*"))


def refused(options: CalibrationOptions, root: Path, error: type[NormGateError]) -> str:
    """The message of a calibration that leaves nothing behind; it is one line."""
    with pytest.raises(error) as caught:
        calibrate(options, Store(root), progress=silent)
    assert everything_in(root) == []
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_bundle_says_how_it_was_made(tiny_store: Store) -> None:
    """The description holds the blocks, the puzzles, the threshold's promise and the images."""
    bundle = tiny_store.read("tiny")
    ratios = {block.block: block.ratio for block in bundle.norm_ratios.blocks}
    low, high = beta.interval(0.95, 5, 20)

    assert list(ratios) == BLOCKS
    assert bundle.block == max(ratios, key=lambda name: ratios[name])
    assert all(block.low <= block.ratio <= block.high for block in bundle.norm_ratios.blocks)
    assert bundle.norm_ratios.margin == pytest.approx(
        ratios[bundle.block] - sorted(ratios.values())[-2]
    )
    assert (bundle.jigsaw.tiles, bundle.jigsaw.edge, bundle.jigsaw.seed) == (3, "keep", 0)
    assert (bundle.threshold.n, bundle.threshold.k, bundle.threshold.delta) == (24, 5, None)
    assert bundle.threshold.false_alarm_rate.low == pytest.approx(low)
    assert bundle.threshold.false_alarm_rate.high == pytest.approx(high)
    assert (bundle.data.selection.count, bundle.data.threshold.count) == (IMAGES, IMAGES)
    assert bundle.data.selection.sha256 != bundle.data.threshold.sha256
    assert bundle.data.shared_images == 0
    assert bundle.created.utcoffset() is not None
    assert bundle.libraries["torch"] == library_version("torch")
    assert any("the weights are random" in warning for warning in bundle.warnings)


def test_the_threshold_is_of_the_detectors_scores(
    tiny_store: Store, tiny_options: CalibrationOptions
) -> None:
    """The calibration scores are the detector's on the threshold images, the threshold their k-th.

    One image at a time, which changes the sums' order and so the last digits.
    """
    loaded = tiny_store.load("tiny")
    detector = loaded.detector()
    preprocessing = loaded.bundle.preprocessing
    images = [
        load(file.read_bytes(), preprocessing)[None]
        for file in sorted(Path(tiny_options.threshold_images).iterdir())
    ]
    scores = np.sort([float(detector.detect(image).scores[0]) for image in images])

    np.testing.assert_allclose(loaded.calibration_scores, scores, rtol=1e-4)
    assert loaded.bundle.threshold.value == float(loaded.calibration_scores[4])
    assert sum(bool(detector.detect(image).is_ood[0]) for image in images) == 4


def test_a_bundle_in_bfloat16(
    half_store: Store, tiny_store: Store, tiny_options: CalibrationOptions
) -> None:
    """What is stored is what ran, and loaded again it gives every calibration score to the bit."""
    loaded = half_store.load("tiny")
    detector = loaded.detector()
    files = sorted(Path(tiny_options.threshold_images).iterdir())
    images = [load(file.read_bytes(), loaded.bundle.preprocessing) for file in files]

    detections = detector.detect(torch.stack(images))

    assert (loaded.bundle.dtype, tiny_store.read("tiny").dtype) == ("bfloat16", "float32")
    assert {tensor.dtype for tensor in loaded.weights.values() if tensor.is_floating_point()} == {
        torch.bfloat16
    }
    np.testing.assert_array_equal(np.sort(detections.scores), loaded.calibration_scores)
    assert reference_score(detector, loaded.bundle.preprocessing)[0] == loaded.bundle.golden_score
    assert detections.is_ood.sum() == loaded.bundle.threshold.k - 1
    assert loaded.bundle.threshold.value != tiny_store.read("tiny").threshold.value


def test_the_same_seed_gives_the_same_bytes(
    tiny_options: CalibrationOptions, tmp_path: Path
) -> None:
    """Two runs differ in the time of creation and in nothing else."""
    for name in ("a", "b"):
        run(tiny_options, tmp_path / name)

    assert bundle_files(tmp_path / "a") == bundle_files(tmp_path / "b")


def test_another_seed_gives_other_puzzles(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """The seed draws the random weights and, on the same weights, the puzzles."""
    by_seed = [run(replace(tiny_options, seed=seed), tmp_path / f"{seed}") for seed in (0, 1)]
    weights = tmp_path / "weights.safetensors"
    save_file(dict(by_seed[0].weights), weights)
    fixed = replace(tiny_options, weights=str(weights))
    on_the_same = [run(replace(fixed, seed=seed), tmp_path / f"f{seed}") for seed in (0, 1)]

    assert by_seed[0].bundle.weights_sha256 != by_seed[1].bundle.weights_sha256
    assert not torch.equal(by_seed[0].weights["conv1.weight"], by_seed[1].weights["conv1.weight"])
    assert torch.equal(
        on_the_same[0].weights["conv1.weight"], on_the_same[1].weights["conv1.weight"]
    )
    assert by_seed[0].bundle.norm_ratios == on_the_same[0].bundle.norm_ratios
    assert on_the_same[0].bundle.norm_ratios != on_the_same[1].bundle.norm_ratios


@pytest.mark.parametrize("score", sorted(SCORES))
def test_every_score_can_be_calibrated(
    tiny_options: CalibrationOptions, tmp_path: Path, score: ScoreName
) -> None:
    """The threshold is the k-th of the detector's scores, whichever score was asked for."""
    loaded = run(replace(tiny_options, score=score), tmp_path)
    detector, bundle = loaded.detector(), loaded.bundle
    images = torch.stack(
        [
            load(file.read_bytes(), bundle.preprocessing)
            for file in sorted(Path(tiny_options.threshold_images).iterdir())
        ]
    )

    detections = detector.detect(images)

    assert bundle.score == score
    assert bundle.head == ("fc" if score in SCORES_WITH_HEAD else None)
    np.testing.assert_allclose(np.sort(detections.scores), loaded.calibration_scores, rtol=1e-4)
    # An image next to the threshold may fall on its other side in the last digit.
    assert abs(int(detections.is_ood.sum()) - (bundle.threshold.k - 1)) <= 1


def test_thresholds_of_classes(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """Classes with enough images get their own levels; the others are named in a warning."""
    options = replace(
        tiny_options, alpha=0.4, has_class_thresholds=True, abstain_alpha=0.6, guarantee="conformal"
    )
    loaded = run(options, tmp_path)
    bundle, classes = loaded.bundle, loaded.calibration_classes
    assert bundle.class_thresholds is not None
    assert classes is not None
    counts = np.bincount(classes, minlength=10)
    # floor(0.4 (n + 1)) reaches 5 from n = 12 on.
    expected = {index for index in range(10) if counts[index] >= 12}

    assert {row.index for row in bundle.class_thresholds} == expected
    for row in bundle.class_thresholds:
        own = loaded.calibration_scores[classes == row.index]
        assert row.label == bundle.labels[row.index]
        assert row.threshold.value == own[row.threshold.k - 1]
        assert row.abstain is not None
        assert row.abstain.value >= row.threshold.value
    assert bundle.abstain is not None
    assert bundle.abstain.alpha == 0.6
    assert any(
        f"{10 - len(expected)} of 10 classes have too few" in text for text in bundle.warnings
    )
    loaded.detector()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_does_not_matter(
    tiny_options: CalibrationOptions, tiny_store: Store, tmp_path: Path, batch_size: int
) -> None:
    """Puzzles and images keep together in batches of any size, to rounding."""
    whole = tiny_store.load("tiny")

    parts = run(replace(tiny_options, batch_size=batch_size), tmp_path)

    assert [block.ratio for block in parts.bundle.norm_ratios.blocks] == pytest.approx(
        [block.ratio for block in whole.bundle.norm_ratios.blocks], rel=1e-4
    )
    np.testing.assert_allclose(parts.calibration_scores, whole.calibration_scores, rtol=1e-4)


def test_versions_count_up(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """Calibrating again writes the next version and keeps the one before."""
    store = Store(tmp_path)

    versions = [calibrate(tiny_options, store, progress=silent).bundle.version for _ in range(2)]

    assert versions == store.versions("tiny") == [1, 2]


def test_progress_counts_both_passes(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """Each pass is told from 0 to its number of files, in steps of a batch."""
    seen: list[tuple[str, int, int]] = []

    def watch(title: str, *, done: int, total: int) -> None:
        seen.append((title, done, total))

    calibrate(replace(tiny_options, batch_size=16), Store(tmp_path), progress=watch)

    assert seen == [
        (title, done, 24)
        for title in ("choosing the block", "setting the threshold")
        for done in (0, 16, 24)
    ]


def test_weights_from_a_file_are_the_bundles(
    tiny_options: CalibrationOptions, tmp_path: Path
) -> None:
    """A ``torch.save`` file's tensors are those of the bundle, and no warning calls them random."""
    torch.manual_seed(7)
    state = build(TINY).state_dict()
    torch.save({"state_dict": state}, tmp_path / "checkpoint.pt")

    loaded = run(replace(tiny_options, weights=str(tmp_path / "checkpoint.pt")), tmp_path / "store")

    assert loaded.weights.keys() == state.keys()
    assert all(torch.equal(loaded.weights[key], value) for key, value in state.items())
    assert not any("random" in warning for warning in loaded.bundle.warnings)


def test_a_users_own_network(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """A factory's network needs no weights file; its arguments and classes are in the bundle."""
    options = replace(
        tiny_options,
        architecture=Architecture(id=FACTORY, arguments={"classes": 4}),
        weights=None,
        preprocessing=SMALL,
    )

    loaded = run(options, tmp_path)

    assert loaded.bundle.architecture == options.architecture
    assert len(loaded.bundle.labels) == 4
    assert [block.block for block in loaded.bundle.norm_ratios.blocks] == ["first", "second"]
    assert loaded.bundle.preprocessing.crop == 16
    assert loaded.detector().detect(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).scores.size == 1
    with pytest.raises(BundleError, match="list it in the setting"):
        Store(tmp_path).load("tiny")


def test_labels_are_kept(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """Labels given take the place of the architecture's own."""
    labels = tuple(f"kind {i}" for i in range(10))

    assert run(replace(tiny_options, labels=labels), tmp_path).bundle.labels == labels


def test_blocks_may_be_named(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """A glob leaves the blocks whose names match, in execution order."""
    bundle = run(replace(tiny_options, blocks="layer[34].?"), tmp_path).bundle

    assert [block.block for block in bundle.norm_ratios.blocks] == BLOCKS[4:]
    assert bundle.block in BLOCKS[4:]


def test_zero_edges(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """``edge="zero"`` makes other puzzles and is recorded."""
    keep, zero = (
        run(replace(tiny_options, edge=edge), tmp_path / edge).bundle for edge in ("keep", "zero")
    )

    assert zero.jigsaw.edge == "zero"
    assert zero.norm_ratios != keep.norm_ratios


def test_max_images_draws_from_both_folders(
    tiny_options: CalibrationOptions, tmp_path: Path
) -> None:
    """No more images than asked for are read from either folder."""
    bundle = run(replace(tiny_options, max_images=10), tmp_path).bundle

    assert (bundle.data.selection.count, bundle.data.threshold.count) == (10, 10)
    assert (bundle.norm_ratios.images, bundle.threshold.n) == (10, 10)


def test_a_pac_threshold(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """59 images are the least for alpha = delta = 0.05, and then the smallest score it is."""
    draw_images(tmp_path / "held_out", range(1000, 1059))
    options = replace(
        tiny_options, threshold_images=tmp_path / "held_out", alpha=0.05, guarantee="pac"
    )

    loaded = run(options, tmp_path / "store")

    threshold = loaded.bundle.threshold
    assert (threshold.guarantee, threshold.delta) == ("pac", 0.05)
    assert (threshold.n, threshold.k) == (59, 1)
    assert threshold.value == float(loaded.calibration_scores.min())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.03}, "24 threshold images are too few for alpha 0.03: at least 33 are needed"),
        ({"alpha": 0.05, "guarantee": "pac"}, "with confidence 0.95: at least 59 are needed"),
        ({"alpha": 0.2, "max_images": 3}, "3 threshold images are too few .* at least 4"),
        ({"alpha": 0.0}, "alpha is 0.0; it must lie between 0 and 1"),
        ({"alpha": 1.0}, "alpha is 1.0; it must lie between 0 and 1"),
        ({"alpha": -0.1}, "alpha is -0.1; it must lie"),
        ({"alpha": float("nan")}, "alpha is nan; it must lie"),
        ({"abstain_alpha": 0.2}, "abstain alpha is 0.2; it must lie between alpha, 0.2, and 1"),
        ({"abstain_alpha": 1.0}, "abstain alpha is 1.0; it must lie between"),
        (
            {"architecture": NO_HEAD, "score": "selected_norm_energy"},
            "PooledConvolutions does not end in one linear layer",
        ),
        ({"alpha": float("inf")}, "alpha is inf; it must lie"),
        ({"guarantee": "pac", "delta": 0.0}, "delta is 0.0; it must lie"),
        ({"guarantee": "pac", "delta": 1.0}, "delta is 1.0; it must lie"),
        ({"name": "../up"}, "name is '../up'"),
        ({"labels": ("one", "two")}, "2 labels were given; the network has 10 classes"),
        ({"blocks": "layer9.*"}, r"no block whose name matches 'layer9\.\*'"),
        ({"blocks": "fc"}, "no block whose name matches 'fc'"),
        ({"weights": None}, "cifar/resnet18 needs weights: a file, or 'random'"),
        ({"weights": "absent.safetensors"}, "absent.safetensors cannot be read"),
        ({"weights": "absent.pt"}, "absent.pt cannot be read"),
        ({"device": "cuda:99"}, "device cuda:99 cannot be used"),
        ({"device": "toaster"}, "device toaster cannot be used"),
        ({"architecture": Architecture(id="cifar/resnet99")}, "cifar/resnet99 is unknown"),
        ({"architecture": Architecture(id="torchvision/resnet99")}, "torchvision/resnet99 is not"),
        ({"architecture": Architecture(id="python/absent:net")}, "cannot be imported"),
        ({"architecture": Architecture(id="python/json:dumps")}, "python/json:dumps with"),
        (
            {"preprocessing": Preprocessing(resize=2, crop=2, mean=(0, 0, 0), std=(1, 1, 1))},
            "crop is 2 pixels; a jigsaw needs at least 3",
        ),
        (
            {"architecture": Architecture(id="cifar/vgg11"), "preprocessing": SMALL},
            "cifar/vgg11 cannot run on 16x16 pixels",
        ),
    ],
)
def test_bad_options_are_refused_before_any_pass(
    tiny_options: CalibrationOptions, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """One line tells what is wrong, no image has been read, and nothing is written."""
    options = replace(tiny_options, **changes)

    with pytest.raises(NormGateError, match=message) as caught:
        calibrate(options, Store(tmp_path), progress=_forbidden)

    assert "\n" not in str(caught.value)
    assert everything_in(tmp_path) == []


def _forbidden(title: str, *, done: int, total: int) -> None:
    raise AssertionError(f"the pass {title!r} began")


def test_weights_of_another_network_are_refused(
    tiny_options: CalibrationOptions, tmp_path: Path
) -> None:
    """Weights of a wider network do not fit, and the message lists shapes."""
    wider = Architecture(id="cifar/resnet18", arguments={"width": 8})
    save_file(build(wider).state_dict(), tmp_path / "wider.safetensors")

    message = refused(
        replace(tiny_options, weights=str(tmp_path / "wider.safetensors")),
        tmp_path / "store",
        NetworkError,
    )

    assert re.search(r"weights do not fit ResNet18: \d+ of another shape: ", message)


def test_the_same_folder_is_refused(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """Selection images cannot set the threshold, under whatever name the folder goes."""
    (tmp_path / "link").symlink_to(tiny_options.selection_images)
    for same in (tiny_options.selection_images, tmp_path / "link"):
        message = refused(
            replace(tiny_options, threshold_images=same), tmp_path / "store", CalibrationError
        )

        assert "are the same folder, or one lies in the other" in message


@pytest.mark.parametrize("inner_is", ["selection", "threshold"])
def test_nested_folders_are_refused(
    tiny_options: CalibrationOptions, tmp_path: Path, inner_is: str
) -> None:
    """One folder in the other shares its images with it."""
    draw_images(tmp_path / "outer", range(30))
    inner = draw_images(tmp_path / "outer" / "inner", range(100, 130))
    outer = tmp_path / "outer"
    selection, threshold = (inner, outer) if inner_is == "selection" else (outer, inner)

    message = refused(
        replace(tiny_options, selection_images=selection, threshold_images=threshold),
        tmp_path / "store",
        CalibrationError,
    )

    assert "one lies in the other" in message


@pytest.mark.parametrize(
    ("copies", "count"), [(["0001"], 1), (["0001", "0002", "0003"], 3), (["0001"] * 4, 4)]
)
def test_copied_images_are_refused(
    tiny_options: CalibrationOptions, tmp_path: Path, copies: list[str], count: int
) -> None:
    """More than 1 % of threshold images that also chose the block are counted, repeats too."""
    draw_images(tmp_path / "held_out", range(100, 124))
    for i, name in enumerate(copies):
        shutil.copy(
            Path(tiny_options.selection_images) / f"{name}.jpg",
            tmp_path / "held_out" / f"copy{i}.jpg",
        )

    message = refused(
        replace(tiny_options, threshold_images=tmp_path / "held_out"),
        tmp_path / "store",
        CalibrationError,
    )

    assert f"{count} of {24 + count} threshold images are also selection images" in message


def test_one_copy_in_a_hundred_is_a_warning(
    tiny_options: CalibrationOptions, tmp_path: Path
) -> None:
    """1 % is accepted, counted and warned of."""
    held_out = draw_images(tmp_path / "held_out", range(100, 199))
    shutil.copy(Path(tiny_options.selection_images) / "0001.jpg", held_out)

    bundle = run(replace(tiny_options, threshold_images=held_out), tmp_path / "store").bundle

    assert bundle.data.shared_images == 1
    assert "1 threshold images are also selection images" in bundle.warnings


@pytest.mark.parametrize("which", ["selection", "threshold"])
def test_an_unreadable_image_is_left_out(
    tiny_options: CalibrationOptions, tmp_path: Path, which: str
) -> None:
    """One bad file of a hundred is counted, named in the bundle and warned of."""
    folder = draw_images(tmp_path / "images", range(100, 200))
    (folder / "0150.jpg").write_bytes(b"broken")
    bundle = run(
        replace(tiny_options, selection_images=folder)
        if which == "selection"
        else replace(tiny_options, threshold_images=folder),
        tmp_path / "store",
    ).bundle

    fingerprint = bundle.data.selection if which == "selection" else bundle.data.threshold
    assert fingerprint.count == 99
    assert [line.partition(":")[0] for line in fingerprint.unreadable] == ["0150.jpg"]
    assert f"1 {which} images were unreadable and left out" in bundle.warnings
    assert (bundle.norm_ratios.images, bundle.threshold.n) == (
        (99, IMAGES) if which == "selection" else (IMAGES, 99)
    )


@pytest.mark.parametrize("which", ["selection_images", "threshold_images"])
def test_too_many_unreadable_images_are_refused(
    tiny_options: CalibrationOptions, tmp_path: Path, which: str
) -> None:
    """More than 1 % is an error that names the file, and nothing is written."""
    folder = draw_images(tmp_path / "images", range(100, 130))
    (folder / "0110.jpg").write_bytes(b"broken")
    changes: dict[str, Any] = {which: folder}

    message = refused(
        replace(tiny_options, **changes),
        tmp_path / "store",
        CalibrationError,
    )

    assert re.search(r"1 of 30 images in .* unreadable, more than 1%: 0110\.jpg: ", message)


def test_one_selection_image_is_too_few(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """A mean over one image has no interval."""
    folder = draw_images(tmp_path / "one", [100])

    message = refused(
        replace(tiny_options, selection_images=folder), tmp_path / "store", CalibrationError
    )

    assert message == "1 selection images; at least 2 are needed"


@pytest.mark.parametrize(
    "moment", list(itertools.product(["choosing the block", "setting the threshold"], [0, 16, 24]))
)
def test_an_interrupted_calibration_leaves_nothing(
    tiny_options: CalibrationOptions, tmp_path: Path, moment: tuple[str, int]
) -> None:
    """Ctrl-C at the start, in the middle or at the end of either pass writes no bundle."""

    def interrupt(title: str, *, done: int, total: int) -> None:
        if (title, done) == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(replace(tiny_options, batch_size=16), Store(tmp_path), progress=interrupt)

    assert everything_in(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "last"),
    [
        # Residual blocks, convolutions or layers, and the stems and transitions that are modules.
        ("resnet50", 16, "layer4.2"),
        ("vgg16", 13, "features.29"),
        ("mobilenet_v3_large", 17, "features.16"),
        ("efficientnet_b0", 18, "features.8"),
        ("densenet121", 7, "features.denseblock4"),
        ("convnext_tiny", 22, "features.7.2"),
        ("vit_b_16", 12, "encoder.layers.encoder_layer_11"),
        ("swin_t", 16, "features.7.1"),
    ],
)
def test_torchvision_networks(
    tiny_options: CalibrationOptions, tmp_path: Path, name: str, count: int, last: str
) -> None:
    """Networks of every kind calibrate as they are: their blocks are found, all scores finite."""
    # One batch of images: their number changes no block, and a network of this size is slow.
    images = 4
    options = replace(
        tiny_options,
        name=name.replace("_", "-"),
        architecture=Architecture(id=f"torchvision/{name}"),
        selection_images=draw_images(tmp_path / "selection", range(images)),
        threshold_images=draw_images(tmp_path / "threshold", range(images, 2 * images)),
        batch_size=8,
    )
    store = Store(tmp_path / "store")
    try:
        calibrate(options, store, progress=silent)
        bundle = store.read(options.name)
        scores = load_file(store.root / options.name / "1" / WEIGHTS_FILE)[CALIBRATION_SCORES_KEY]
        document = json.loads((store.root / options.name / "1" / BUNDLE_FILE).read_text())
    finally:
        # Up to half a gigabyte, which pytest would keep for three sessions.
        shutil.rmtree(store.root, ignore_errors=True)

    blocks = [block["block"] for block in document["norm_ratios"]["blocks"]]
    assert (len(blocks), blocks[-1]) == (count, last)
    assert bundle.block in blocks
    assert len(bundle.labels) == 1000
    assert scores.shape == (images,)
    assert torch.isfinite(scores).all()
    assert all(np.isfinite(block.ratio) for block in bundle.norm_ratios.blocks)
    assert np.isfinite(bundle.golden_score)
