"""The store: whole bundles or none, and only bundles that still mean what they say."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save, save_file

from app.core.images import installed_decoder
from app.errors import BundleError, BundleNotFoundError
from app.store import (
    BUNDLE_FILE,
    CALIBRATION_CLASSES_KEY,
    CALIBRATION_SCORES_KEY,
    WEIGHTS_FILE,
    Bundle,
    LoadedBundle,
    Store,
)

Document = dict[str, Any]
Edit = Callable[[Document], None]

PICKLE_SUFFIXES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"}
TOP_LEVEL_KEYS = {
    "schema_version",
    "name",
    "version",
    "created",
    "architecture",
    "labels",
    "preprocessing",
    "dtype",
    "block",
    "norm_ratios",
    "jigsaw",
    "score",
    "threshold",
    "data",
    "weights_sha256",
    "libraries",
    "warnings",
    "evaluation",
}


@pytest.fixture
def store(tiny_store: Store, tmp_path: Path) -> Store:
    """A copy of the store with ``tiny/1``, to be damaged."""
    shutil.copytree(tiny_store.root, tmp_path / "store")
    return Store(tmp_path / "store")


def folder_of(store: Store) -> Path:
    """Where ``tiny/1`` lies."""
    return store.root / "tiny" / "1"


def edit(store: Store, change: Edit) -> None:
    """Change the description of ``tiny/1`` on disk."""
    file = folder_of(store) / BUNDLE_FILE
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def replace_scores(store: Store, scores: NDArray[Any] | None) -> None:
    """Write other calibration scores, or none, with a hash that is right."""
    file = folder_of(store) / WEIGHTS_FILE
    tensors = load_file(file)
    del tensors[CALIBRATION_SCORES_KEY]
    if scores is not None:
        tensors[CALIBRATION_SCORES_KEY] = torch.from_numpy(scores)
    save_file(tensors, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(store, lambda document: document.update(weights_sha256=digest))


def write_again(store: Store, loaded: LoadedBundle, *, version: int) -> Path:
    """Write a bundle's content as another version."""
    written = store.write(
        lambda digest: loaded.bundle.model_copy(
            update={"version": version, "weights_sha256": digest}
        ),
        name=loaded.bundle.name,
        weights=loaded.weights,
        calibration_scores=loaded.calibration_scores,
    )
    return Path(written)


def left_in(folder: Path) -> list[str]:
    """Everything in a folder, dot files included."""
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_what_is_read(tiny_store: Store, tmp_path: Path) -> None:
    """Description, weights and calibration scores survive a round trip bit by bit."""
    loaded = tiny_store.load("tiny")
    other = Store(tmp_path)

    folder = write_again(other, loaded, version=1)
    again = other.load("tiny", 1)

    assert folder == tmp_path / "tiny" / "1"
    assert again.bundle == loaded.bundle
    assert again.weights.keys() == loaded.weights.keys()
    assert all(torch.equal(again.weights[key], loaded.weights[key]) for key in again.weights)
    assert again.calibration_scores.tobytes() == loaded.calibration_scores.tobytes()
    assert again.detector().detect(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).scores.shape == (
        2,
    )


def test_a_bundle_is_two_files_without_pickle(tiny_store: Store) -> None:
    """A bundle is a JSON document and a safetensors file, nothing that runs code when read."""
    folder = folder_of(tiny_store)

    assert left_in(folder) == [BUNDLE_FILE, WEIGHTS_FILE]
    for file in folder.iterdir():
        assert file.suffix not in PICKLE_SUFFIXES
        content = file.read_bytes()
        # A pickle begins with its protocol's opcode, a torch file with a zip header.
        assert not content.startswith((b"\x80", b"PK"))


def test_the_description_has_the_designs_keys(tiny_store: Store) -> None:
    """``bundle.json`` has every top-level key of the design, the golden score and the options."""
    document = json.loads((folder_of(tiny_store) / BUNDLE_FILE).read_text())

    assert document.keys() == TOP_LEVEL_KEYS | {
        *("golden_score", "head", "abstain", "class_thresholds")
    }
    assert document["schema_version"] == 1
    assert document["threshold"].keys() >= {"value", "alpha", "guarantee", "n", "k"}


def test_the_scores_lie_under_a_reserved_key(tiny_store: Store) -> None:
    """The sorted float32 calibration scores lie among the weights, and are no weight."""
    scores = load_file(folder_of(tiny_store) / WEIGHTS_FILE)[CALIBRATION_SCORES_KEY]
    loaded = tiny_store.load("tiny")

    assert scores.dtype == torch.float32
    assert torch.equal(scores, scores.sort().values)
    assert CALIBRATION_SCORES_KEY not in loaded.weights


def test_versions_count_up(store: Store) -> None:
    """The next version follows the largest, compared as numbers; the newest is the default."""
    loaded = store.load("tiny")
    assert store.next_version("other") == 1

    write_again(store, loaded, version=store.next_version("tiny"))
    write_again(store, loaded, version=10)

    assert store.versions("tiny") == [1, 2, 10]
    assert store.next_version("tiny") == 11
    assert store.read("tiny").version == 10
    assert store.read("tiny", 2).version == 2


def test_versions_are_immutable(store: Store) -> None:
    """A version that exists is refused, and stays as it was."""
    before = (folder_of(store) / BUNDLE_FILE).read_bytes()
    loaded = store.load("tiny")

    with pytest.raises(BundleError, match="could not be written"):
        write_again(store, loaded, version=1)

    assert (folder_of(store) / BUNDLE_FILE).read_bytes() == before
    assert left_in(store.root / "tiny") == ["1"]


@pytest.mark.parametrize(
    ("failure", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), BundleError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk-full", "interrupt"],
)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failed_write_leaves_nothing(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    seen: type[BaseException],
    call: int,
) -> None:
    """Whether weights, description or folder fail to reach the disk, no half bundle stays."""
    loaded = store.load("tiny")
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise failure

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(seen):
        write_again(store, loaded, version=2)

    assert left_in(store.root / "tiny") == ["1"]
    assert store.versions("tiny") == [1]


def test_a_failed_description_leaves_nothing(store: Store) -> None:
    """An error while the description is made goes up, and no temporary folder stays."""
    loaded = store.load("tiny")

    def refuse(digest: str) -> Bundle:
        raise RuntimeError("no description")

    with pytest.raises(RuntimeError, match="no description"):
        store.write(
            refuse,
            name="tiny",
            weights=loaded.weights,
            calibration_scores=loaded.calibration_scores,
        )

    assert left_in(store.root / "tiny") == ["1"]


def test_a_left_over_folder_is_no_version(store: Store) -> None:
    """What a killed process leaves is neither a version nor a model."""
    (store.root / "tiny" / ".partial-abc" / "bundle").mkdir(parents=True)
    (store.root / "tiny" / "2").mkdir()
    (store.root / "empty").mkdir()

    assert store.versions("tiny") == [1]
    assert store.names() == ["tiny"]


@pytest.mark.parametrize("root", ["", "absent"])
def test_an_empty_store_has_no_names(tmp_path: Path, root: str) -> None:
    """A store without bundles, or without a folder, lists nothing and finds nothing."""
    store = Store(tmp_path / root)

    assert store.names() == []
    with pytest.raises(BundleNotFoundError, match=r"no model 'tiny' in .*; there are: none"):
        store.read("tiny")


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("absent", None, "no model 'absent' in .*; there are: tiny"),
        ("tiny", 7, "model 'tiny' has no version 7; it has: 1"),
        ("tiny", 0, "model 'tiny' has no version 0; it has: 1"),
        pytest.param("a" * 5000, None, "no model 'a+' in .*; there are: tiny", id="long name"),
    ],
)
def test_what_is_not_there_is_named(
    tiny_store: Store, name: str, version: int | None, message: str
) -> None:
    """The message says what was asked for and what there is."""
    with pytest.raises(BundleNotFoundError, match=message):
        tiny_store.load(name, version)


@pytest.mark.parametrize(
    "name", ["", "..", "../up", "a/b", "/abs", "Upper", "sp ace", ".hidden", "-x", "a" * 64, "ä"]
)
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    """A name that could leave the store, or surprise a file system, gets no version."""
    with pytest.raises(BundleError, match="name is"):
        Store(tmp_path).next_version(name)


@pytest.mark.parametrize("name", ["a", "0", "cifar10-resnet18", "a.b_c-d", "a" * 63])
def test_plain_names_are_accepted(tmp_path: Path, name: str) -> None:
    """Lower-case letters, digits, dots, dashes and underscores make a name."""
    assert Store(tmp_path).next_version(name) == 1


def _select_another(document: Document) -> None:
    names = [block["block"] for block in document["norm_ratios"]["blocks"]]
    document["block"] = next(name for name in names if name != document["block"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(schema_version=2), "schema_version"),
        (lambda document: document.update(colour="blue"), "colour: Extra inputs"),
        (lambda document: document["threshold"].update(sigma=1), r"threshold\.sigma: Extra"),
        (lambda document: document.pop("threshold"), "threshold: Field required"),
        (lambda document: document.update(version=0), "version: "),
        (lambda document: document.update(name="../up"), "name: "),
        (lambda document: document.update(name="other"), "says it is bundle other/1"),
        (lambda document: document.update(version=3), "says it is bundle tiny/3"),
        (_select_another, "block is '.*', but NormRatio selects"),
    ],
    ids=[
        "schema",
        "extra-key",
        "nested-extra-key",
        "missing-key",
        "version-zero",
        "unsafe-name",
        "other-name",
        "other-version",
        "other-block",
    ],
)
def test_a_wrong_description_is_refused(store: Store, change: Edit, message: str) -> None:
    """A description of another schema, or that contradicts itself, is refused by name."""
    edit(store, change)

    with pytest.raises(BundleError, match=message):
        store.read("tiny")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": 1'], ids=range(5)
)
def test_a_damaged_description_is_refused(store: Store, content: bytes) -> None:
    """Bytes that are no JSON object are refused, and the message names the file."""
    (folder_of(store) / BUNDLE_FILE).write_bytes(content)

    with pytest.raises(BundleError, match=r"tiny/1/bundle\.json"):
        store.read("tiny")


def test_truncated_weights_are_refused(store: Store) -> None:
    """Weights cut short do not have the hash that the description gives."""
    file = folder_of(store) / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(BundleError, match=r"weights\.safetensors has sha256 .*bundle\.json says"):
        store.load("tiny")


def test_a_wrong_hash_is_refused(store: Store) -> None:
    """The message gives the hash of the description."""
    edit(store, lambda document: document.update(weights_sha256="0" * 64))

    with pytest.raises(BundleError, match="says " + "0" * 64):
        store.load("tiny")


def test_weights_that_are_no_safetensors_are_refused(store: Store) -> None:
    """A right hash of something else does not help."""
    content = b"not tensors"
    (folder_of(store) / WEIGHTS_FILE).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit(store, lambda document: document.update(weights_sha256=digest))

    with pytest.raises(BundleError, match=r"weights\.safetensors cannot be read"):
        store.load("tiny")


def test_missing_weights_are_refused(store: Store) -> None:
    """A bundle without its weights file is damaged, not absent."""
    (folder_of(store) / WEIGHTS_FILE).unlink()

    with pytest.raises(BundleError, match=r"weights\.safetensors cannot be read") as caught:
        store.load("tiny")
    assert not isinstance(caught.value, BundleNotFoundError)


def test_a_missing_description_is_no_bundle(store: Store) -> None:
    """A folder without its description is not a version."""
    (folder_of(store) / BUNDLE_FILE).unlink()

    with pytest.raises(BundleNotFoundError, match="no model 'tiny'"):
        store.load("tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": 1e-9}, "threshold 1e-09 is not number 5 of its sorted"),
        ({"k": 4}, "is not number 4 of its sorted"),
        ({"k": 1000}, "is not number 1000 of its sorted"),
        ({"n": 25}, r"must hold 25 float32 calibration scores, it holds float32 \(24,\)"),
    ],
)
def test_a_threshold_of_other_scores_is_refused(
    store: Store, changes: Document, message: str
) -> None:
    """The threshold must be the k-th of the n calibration scores the bundle holds."""
    edit(store, lambda document: document["threshold"].update(changes))

    with pytest.raises(BundleError, match=message):
        store.load("tiny")


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (lambda scores: scores[::-1].copy(), "sorted calibration scores"),
        (lambda scores: scores.astype(np.float64), "it holds float64"),
        (lambda scores: scores[:, None].copy(), r"it holds float32 \(24, 1\)"),
        (lambda scores: None, r"must hold 24 float32 calibration scores, it holds float32 \(0,\)"),
    ],
    ids=["unsorted", "float64", "column", "absent"],
)
def test_other_calibration_scores_are_refused(
    store: Store, replaced: Callable[[NDArray[np.float32]], NDArray[Any] | None], message: str
) -> None:
    """Scores unsorted, of another type or absent are refused though their hash is right."""
    replace_scores(store, replaced(store.load("tiny").calibration_scores))

    with pytest.raises(BundleError, match=message):
        store.load("tiny")


@pytest.mark.parametrize(
    ("stored", "claimed", "message"),
    [
        ("tiny_store", "bfloat16", "dtype is bfloat16, but its weights are float32"),
        ("half_store", "float32", "dtype is float32, but its weights are bfloat16"),
        ("tiny_store", "float16", "dtype: Input should be 'float32' or 'bfloat16'"),
    ],
)
def test_another_dtype_is_refused(
    request: pytest.FixtureRequest, tmp_path: Path, stored: str, claimed: str, message: str
) -> None:
    """A threshold belongs to the dtype it was set in: a bundle runs in no other."""
    shutil.copytree(request.getfixturevalue(stored).root, tmp_path / "store")
    store = Store(tmp_path / "store")
    edit(store, lambda document: document.update(dtype=claimed))

    with pytest.raises(BundleError, match=message):
        store.load("tiny")


@pytest.mark.parametrize(("stored", "factor"), [("tiny_store", 1.002), ("half_store", 1.03)])
def test_the_golden_score_of_each_dtype(
    request: pytest.FixtureRequest, tmp_path: Path, stored: str, factor: float
) -> None:
    """A reference image that scores further off than the dtype explains voids the threshold."""
    shutil.copytree(request.getfixturevalue(stored).root, tmp_path / "store")
    store = Store(tmp_path / "store")
    edit(store, lambda document: document.update(golden_score=document["golden_score"] * factor))

    with pytest.raises(BundleError, match="the threshold is void"):
        store.load("tiny").detector()


def class_threshold(store: Store) -> dict[str, Any]:
    """A threshold for class 0 of ``tiny/1``, on the assumption that all images are of it."""
    threshold = json.loads((folder_of(store) / BUNDLE_FILE).read_text())["threshold"]
    return {"index": 0, "label": "airplane", "threshold": threshold, "abstain": None}


def test_thresholds_of_classes_need_the_classes(store: Store) -> None:
    """A bundle with thresholds for classes must hold the class of each calibration score."""
    edit(store, lambda document: document.update(class_thresholds=[class_threshold(store)]))

    with pytest.raises(BundleError, match="must hold the predicted class of each of its 24"):
        store.load("tiny")


@pytest.mark.parametrize(
    ("last", "message"),
    [(0, None), (3, "of class airplane is not number 5 of the 24 calibration scores")],
)
def test_a_threshold_is_of_its_class(store: Store, last: int, message: str | None) -> None:
    """It is the k-th of the scores of that class, or the bundle is refused."""
    file = folder_of(store) / WEIGHTS_FILE
    classes = torch.zeros(24, dtype=torch.int64)
    classes[-1] = last
    content = save(load_file(file) | {CALIBRATION_CLASSES_KEY: classes})
    file.write_bytes(content)

    def change(document: dict[str, Any]) -> None:
        document["class_thresholds"] = [class_threshold(store)]
        document["weights_sha256"] = hashlib.sha256(content).hexdigest()

    edit(store, change)

    if message is None:
        loaded = store.load("tiny")
        assert loaded.calibration_classes is not None
        assert CALIBRATION_CLASSES_KEY not in loaded.weights
    else:
        with pytest.raises(BundleError, match=message):
            store.load("tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "selected_norm_msp"}, "score selected_norm_msp needs the head's name"),
        ({"abstain": "threshold"}, "abstain alpha is 0.2; it must lie above alpha, 0.2"),
    ],
)
def test_levels_that_contradict_each_other(
    store: Store, changes: dict[str, str], message: str
) -> None:
    """What the description says of its score and levels has to fit together."""

    def change(document: dict[str, Any]) -> None:
        for key, value in changes.items():
            document[key] = document.get(value, value)

    edit(store, change)

    with pytest.raises(BundleError, match=message):
        store.read("tiny")


def test_other_decoded_pixels_are_refused(store: Store) -> None:
    """A decoder that makes other pixels of the reference image voids the threshold."""
    edit(
        store,
        lambda document: document["preprocessing"]["decoder"].update(
            reference_sha256="0" * 64, jpeg="otherjpeg 1.0"
        ),
    )

    with pytest.raises(BundleError, match=r"bundle tiny/1 .*decoded by otherjpeg 1\.0; simplejpeg"):
        store.load("tiny")


def test_other_pixels_at_a_scale_are_refused(store: Store) -> None:
    """Where JPEGs are decoded at a scale, so is the reference; a bundle says what came of it."""

    def scaled(document: Document, digest: str | None) -> None:
        document["preprocessing"]["scaled_decode"] = True
        document["preprocessing"]["decoder"]["scaled_sha256"] = digest

    edit(store, lambda document: scaled(document, installed_decoder(scaled=True).scaled_sha256))
    assert store.load("tiny").bundle.preprocessing.scaled_decode

    edit(store, lambda document: scaled(document, "0" * 64))
    with pytest.raises(BundleError, match="decodes to other pixels"):
        store.load("tiny")

    edit(store, lambda document: scaled(document, None))
    with pytest.raises(BundleError, match="scaled_sha256 must be there together"):
        store.load("tiny")


def test_bundles_without_the_scaled_decode_do_not_name_it(store: Store) -> None:
    """They mean whole images, as ever, and servers from before it go on reading them."""
    document = json.loads((store.root / "tiny" / "1" / BUNDLE_FILE).read_text())

    assert "scaled_decode" not in document["preprocessing"]
    assert "scaled_sha256" not in document["preprocessing"]["decoder"]
    assert not store.load("tiny").bundle.preprocessing.scaled_decode


def test_another_decoder_version_with_the_same_pixels_is_fine(store: Store) -> None:
    """The pixels decide, not the version number."""
    edit(store, lambda document: document["preprocessing"]["decoder"].update(jpeg="simplejpeg 0.1"))

    assert store.load("tiny").bundle.version == 1


def _other_block(document: Document) -> None:
    name = document["block"]
    for block in document["norm_ratios"]["blocks"]:
        if block["block"] == name:
            block["block"] = document["block"] = "layer9"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda document: document.update(golden_score=document["golden_score"] * 1.01),
            "reference image scores .* here, but .*; the threshold is void",
        ),
        (lambda document: document["labels"].pop(), "bundle tiny/1: 9 labels for 10 classes"),
        (
            lambda document: document["architecture"]["arguments"].update(width=8),
            "bundle tiny/1: weights do not fit ResNet18: .* of another shape",
        ),
        (
            lambda document: document["architecture"].update(id="cifar/resnet99"),
            "cifar/resnet99 is unknown",
        ),
        (_other_block, "bundle tiny/1: cifar/resnet18 has no block 'layer9'"),
    ],
    ids=["golden-score", "labels", "shapes", "architecture", "block"],
)
def test_a_detector_of_something_else_is_refused(store: Store, change: Edit, message: str) -> None:
    """What would not score as the calibration did becomes no detector."""
    edit(store, change)
    loaded = store.load("tiny")

    with pytest.raises(BundleError, match=message):
        loaded.detector()


def test_a_golden_score_within_the_tolerance_is_fine(store: Store) -> None:
    """Another machine's rounding, a ten-thousandth, is not another score."""
    edit(store, lambda document: document.update(golden_score=document["golden_score"] * 1.0001))

    assert store.load("tiny").detector() is not None


def test_foreign_code_must_be_allowed(store: Store) -> None:
    """A ``python/`` bundle is refused unless that very factory is listed."""
    edit(store, lambda document: document.update(architecture={"id": "python/a.b:c"}))

    for allowed in ((), ("python/a.b:d",)):
        with pytest.raises(BundleError, match=r"runs code of python/a\.b:c; list it"):
            store.load("tiny", allowed_factories=allowed)
    assert store.load("tiny", allowed_factories=["python/a.b:c"]).bundle.version == 1


def test_the_pointer_and_the_way_back(store: Store) -> None:
    """The pointer names the version in force and the one before; a second step back returns."""
    write_again(store, store.load("tiny"), version=2)
    assert store.pointer("tiny") is None
    assert store.read("tiny").version == 2
    with pytest.raises(BundleError, match=r"active\.json names no version before"):
        store.roll_back("tiny")

    store.activate("tiny", 2)
    store.activate("tiny", 1)

    pointer = store.pointer("tiny")
    assert pointer is not None
    assert (pointer.version, pointer.previous) == (1, 2)
    assert store.read("tiny").version == store.current("tiny") == 1
    assert store.roll_back("tiny").version == 2
    assert store.roll_back("tiny").version == 1
    assert store.activate("tiny", 1).previous == 2
    assert store.versions("tiny") == [1, 2]
    assert left_in(store.root / "tiny") == ["1", "2", "active.json"]


def test_nobody_is_pointed_to_a_damaged_bundle(store: Store) -> None:
    """The weights are verified first, and what is absent is told."""
    (folder_of(store) / WEIGHTS_FILE).write_bytes(b"cut")

    with pytest.raises(BundleError, match="sha256"):
        store.activate("tiny", 1)
    with pytest.raises(BundleNotFoundError, match="no version 7; it has: 1"):
        store.activate("tiny", 7)
    assert store.pointer("tiny") is None
