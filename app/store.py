"""The model store: calibrated classifiers as bundles in ``<root>/<name>/<version>/``.

A bundle is ``bundle.json`` and ``weights.safetensors``. It is written to a temporary folder,
synced and renamed into place, and never changed afterwards. Graphs for another engine may lie
beside them in ``onnx/``: no verdict depends on them, and they can be written again.
"""

import hashlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version as library_version
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from app.core.detector import ClassLevels, Detector, check_agreement
from app.core.graph_files import read_graphs
from app.core.images import REFERENCE_JPEG, Decoder, Preprocessing, installed_decoder
from app.core.images import load as load_image
from app.core.jigsaw import Edge, draw_permutations, jigsaw
from app.core.networks import Architecture, build, load_weights
from app.core.norm_ratio import BlockSelection
from app.core.onnx_engine import OnnxEngine
from app.core.onnx_graph import Graphs
from app.core.scores import SCORES_WITH_HEAD, ScoreName
from app.core.threshold import Threshold
from app.errors import BundleError, BundleNotFoundError, EngineError, NetworkError

BUNDLE_FILE: Final = "bundle.json"
WEIGHTS_FILE: Final = "weights.safetensors"
GRAPHS_FOLDER: Final = "onnx"
CALIBRATION_SCORES_KEY: Final = "normgate.calibration_scores"
CALIBRATION_CLASSES_KEY: Final = "normgate.calibration_classes"
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
GOLDEN_TOLERANCE: Final = 1e-3
"""Largest relative difference between the golden score stored and the one a machine computes."""

_LIBRARIES: Final = ("torch", "torchvision", "simplejpeg", "pillow", "numpy", "scipy")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredPreprocessing(Preprocessing):
    """The preprocessing, and the decoder whose pixels it was calibrated on."""

    decoder: Decoder


class JigsawOptions(_Part):
    """How the puzzles of the selection images were made."""

    tiles: int
    edge: Edge
    seed: int


class Fingerprint(_Part):
    """Which images were used, without the images."""

    count: int
    sha256: str = Field(description="Over the sorted relative names and the contents' hashes.")
    unreadable: tuple[str, ...] = Field(description="Names of the images left out.")


class CalibrationData(_Part):
    """The images that chose the block and those that set the threshold."""

    selection: Fingerprint
    threshold: Fingerprint
    shared_images: int = Field(description="Threshold images found among the selection images.")


class ClassThreshold(_Part):
    """The levels of one predicted class, calibrated on the images predicted to be of it."""

    index: int = Field(ge=0)
    label: str
    threshold: Threshold
    abstain: Threshold | None = None


class Bundle(_Part):
    """Everything but the weights that a verdict depends on, and the evidence for it."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1)
    created: datetime
    architecture: Architecture
    labels: tuple[str, ...]
    preprocessing: StoredPreprocessing
    dtype: Literal["float32"]
    block: str
    norm_ratios: BlockSelection
    jigsaw: JigsawOptions
    score: ScoreName
    threshold: Threshold
    head: str | None = Field(
        None, description="The last linear layer, for the scores that rescale its input."
    )
    abstain: Threshold | None = Field(
        None, description="A score below this that is not OOD is uncertain."
    )
    class_thresholds: tuple[ClassThreshold, ...] | None = Field(
        None, description="Of single predicted classes; the others use those for all."
    )
    golden_score: float = Field(description="Score of the reference image NormGate ships.")
    data: CalibrationData
    weights_sha256: str
    libraries: dict[str, str]
    warnings: tuple[str, ...]
    evaluation: dict[str, dict[str, dict[str, float]]] | None = None

    @model_validator(mode="after")
    def _block_is_the_selected_one(self) -> Self:
        if self.block != self.norm_ratios.selected.name:
            raise ValueError(
                f"block is {self.block!r}, but NormRatio selects {self.norm_ratios.selected.name!r}"
            )
        return self

    @model_validator(mode="after")
    def _levels_are_consistent(self) -> Self:
        if self.score in SCORES_WITH_HEAD and self.head is None:
            raise ValueError(f"score {self.score} needs the head's name")
        if self.abstain is not None and self.abstain.alpha <= self.threshold.alpha:
            raise ValueError(
                f"abstain alpha is {self.abstain.alpha}; it must lie above alpha, "
                f"{self.threshold.alpha}"
            )
        for row in self.class_thresholds or ():
            if row.index >= len(self.labels):
                raise ValueError(f"class {row.index} has a threshold; there are no such labels")
        return self


@dataclass(frozen=True)
class LoadedBundle:
    """A verified bundle in memory, from which a detector can be built on any device."""

    bundle: Bundle
    weights: Mapping[str, Tensor]
    calibration_scores: NDArray[np.float32]
    calibration_classes: NDArray[np.int64] | None = None
    folder: Path | None = None

    def detector(self, *, device: str = "cpu") -> Detector:
        """A detector of its own network, checked against the golden score.

        Raises:
            BundleError: the weights do not fit the architecture, the block is missing, or the
                golden score differs: this installation would not score as the calibration did.
        """
        bundle = self.bundle
        try:
            network = build(bundle.architecture)
            load_weights(network, self.weights)
            if bundle.block not in dict(network.named_modules()):
                raise NetworkError(f"{bundle.architecture.id} has no block {bundle.block!r}")
            detector = Detector(
                network.to(device),
                block=bundle.norm_ratios.selected,
                preprocessing=bundle.preprocessing,
                score=bundle.score,
                threshold=bundle.threshold.value,
                calibration_scores=self.calibration_scores,
                head=bundle.head,
                uncertain_below=None if bundle.abstain is None else bundle.abstain.value,
                class_levels=self._class_levels(),
            )
        except NetworkError as error:
            raise BundleError(f"{_title(bundle)}: {error}") from error
        score, classes = reference_score(detector, bundle.preprocessing)
        if not math.isclose(score, bundle.golden_score, rel_tol=GOLDEN_TOLERANCE):
            raise BundleError(
                f"{_title(bundle)}: the reference image scores {score:.6g} here, but "
                f"{bundle.golden_score:.6g} when the bundle was made; the threshold is void"
            )
        if classes != len(bundle.labels):
            raise BundleError(
                f"{_title(bundle)}: {len(bundle.labels)} labels for {classes} classes"
            )
        return detector

    def on_onnxruntime(self, detector: Detector, graphs: Graphs | None = None) -> Detector:
        """A detector like one of :meth:`detector` on the CPU, run by ONNX Runtime.

        It has scored a few images as the one on torch did.

        Args:
            detector: let it go afterwards: its network is a second copy of the weights.
            graphs: those in the bundle's folder by default.

        Raises:
            EngineError: ONNX Runtime is not installed, there are no graphs or damaged ones, or
                the scores differ.
        """
        try:
            if graphs is None:
                if self.folder is None:
                    raise EngineError("the bundle has no folder to read graphs from")
                graphs = read_graphs(self.folder / GRAPHS_FOLDER)
            engine = OnnxEngine(graphs, self.weights, threads=torch.get_num_threads())
            other = detector.on_engine(engine)
            check_agreement(other, detector, _agreement_images(self.bundle.preprocessing))
        except EngineError as error:
            raise type(error)(f"{_title(self.bundle)}: {error}") from error
        except Exception as error:  # a graph may fail when it runs, in any way
            reason = " ".join(str(error).split())
            raise EngineError(f"{_title(self.bundle)}: onnxruntime failed: {reason}") from error
        return other

    def _class_levels(self) -> ClassLevels | None:
        rows = self.bundle.class_thresholds
        if rows is None or self.calibration_classes is None:
            return None
        thresholds, uncertain_below = np.full((2, len(self.bundle.labels)), np.nan, np.float32)
        for row in rows:
            thresholds[row.index] = row.threshold.value
            uncertain_below[row.index] = np.nan if row.abstain is None else row.abstain.value
        return ClassLevels(thresholds, uncertain_below, self.calibration_classes)


class Store:
    """The bundles below one folder.

    Args:
        root: holds one folder a model, which holds one folder a version.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Models with at least one version, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if self.versions(path.name))

    def versions(self, name: str) -> list[int]:
        """Versions of a model, ascending; empty when there is no such model."""
        folder = self.root / name
        # Not every text is the name of a file: one too long is an error to the system.
        if not re.fullmatch(NAME_PATTERN, name) or not folder.is_dir():
            return []
        return sorted(
            int(path.name)
            for path in folder.iterdir()
            if path.name.isdecimal() and (path / BUNDLE_FILE).is_file()
        )

    def newest(self, name: str) -> int:
        """The highest version of a model.

        Raises:
            BundleNotFoundError: there is no such model.
        """
        return int(self._folder(name, None).name)

    def signature(self, name: str, version: int) -> Hashable:
        """Something that changes when a file of the bundle does; for versions written by hand."""
        folder = self.root / name / str(version)
        try:
            status = {path.name: path.stat() for path in folder.iterdir()}
        except OSError:
            return None
        return frozenset((file, one.st_size, one.st_mtime_ns) for file, one in status.items())

    def read(self, name: str, version: int | None = None) -> Bundle:
        """The description of a bundle; the newest version by default.

        Raises:
            BundleNotFoundError: there is no such bundle.
            BundleError: ``bundle.json`` is damaged or of another schema.
        """
        folder = self._folder(name, version)
        try:
            bundle = Bundle.model_validate_json((folder / BUNDLE_FILE).read_bytes())
        except OSError as error:
            raise BundleError(f"{folder / BUNDLE_FILE} cannot be read: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise BundleError(f"{folder / BUNDLE_FILE}: {where}: {first['msg']}") from error
        if (bundle.name, str(bundle.version)) != (folder.parent.name, folder.name):
            raise BundleError(f"{folder / BUNDLE_FILE} says it is {_title(bundle)}")
        return bundle

    def load(
        self, name: str, version: int | None = None, *, allowed_factories: Collection[str] = ()
    ) -> LoadedBundle:
        """A bundle with its weights, verified.

        Args:
            name: the model.
            version: the newest by default.
            allowed_factories: ``python/`` architecture ids whose code may be run.

        Raises:
            BundleNotFoundError: there is no such bundle.
            BundleError: a hash differs, a file is damaged, the decoder gives other pixels, or
                the architecture's code may not be run.
        """
        bundle = self.read(name, version)
        architecture = bundle.architecture
        if architecture.family == "python" and architecture.id not in allowed_factories:
            raise BundleError(
                f"{_title(bundle)} runs code of {architecture.id}; list it in the setting "
                "allowed_factories to permit that"
            )
        _check_decoder(bundle)
        weights = self._read_weights(bundle)
        scores = weights.pop(CALIBRATION_SCORES_KEY, torch.empty(0)).numpy()
        stored_classes = weights.pop(CALIBRATION_CLASSES_KEY, None)
        classes = None if stored_classes is None else stored_classes.numpy()
        _check_calibration(bundle, scores)
        _check_classes(bundle, scores, classes)
        return LoadedBundle(
            bundle=bundle,
            weights=weights,
            calibration_scores=scores,
            calibration_classes=classes,
            folder=self.root / bundle.name / str(bundle.version),
        )

    def next_version(self, name: str) -> int:
        """The version a new bundle of this model gets.

        Raises:
            BundleError: the name is not lower-case letters, digits, dots, dashes, underscores.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise BundleError(
                f"name is {name!r}; it must be 1 to 63 lower-case letters, digits, '.', '_' "
                "or '-', and start with a letter or digit"
            )
        return max(self.versions(name), default=0) + 1

    def write(
        self,
        describe: Callable[[str], Bundle],
        *,
        name: str,
        weights: Mapping[str, Tensor],
        calibration_scores: NDArray[np.float32],
        calibration_classes: NDArray[np.int64] | None = None,
        attach: Callable[[Bundle], Mapping[str, bytes]] | None = None,
    ) -> Path:
        """Write a bundle whole, or nothing at all.

        Args:
            describe: makes the description, given the sha256 of the weights file.
            name: the model.
            weights: the network's state dict.
            calibration_scores: ``[N]`` float32, sorted, ascending.
            calibration_classes: ``[N]``, the class predicted for each, where the bundle has
                thresholds for classes.
            attach: makes files for people to read, by their path in the bundle's folder;
                nothing depends on them.

        Returns:
            The folder of the new version.

        Raises:
            BundleError: the version exists, or the disk is full or refuses.
        """
        parent = self.root / name
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as partial:
                staged = Path(partial, "bundle")
                staged.mkdir()
                tensors = dict(weights) | {
                    CALIBRATION_SCORES_KEY: torch.from_numpy(calibration_scores)
                }
                if calibration_classes is not None:
                    tensors[CALIBRATION_CLASSES_KEY] = torch.from_numpy(calibration_classes)
                bundle = describe(_write_weights(staged, tensors))
                _write_synced(staged / BUNDLE_FILE, _as_json(bundle))
                for name, attachment in (attach(bundle) if attach else {}).items():
                    (staged / name).parent.mkdir(exist_ok=True)
                    _write_synced(staged / name, attachment)
                folder = parent / str(bundle.version)
                _sync_folder(staged)
                staged.rename(folder)
                _sync_folder(parent)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"the bundle could not be written to {parent}: {error}") from error
        return folder

    def _folder(self, name: str, version: int | None) -> Path:
        versions = self.versions(name)
        if not versions:
            known = ", ".join(self.names()) or "none"
            raise BundleNotFoundError(f"no model {name!r} in {self.root}; there are: {known}")
        if version is not None and version not in versions:
            known = ", ".join(map(str, versions))
            raise BundleNotFoundError(f"model {name!r} has no version {version}; it has: {known}")
        return self.root / name / str(version or versions[-1])

    def _read_weights(self, bundle: Bundle) -> dict[str, Tensor]:
        path = self.root / bundle.name / str(bundle.version) / WEIGHTS_FILE
        try:
            content = path.read_bytes()
            actual = hashlib.sha256(content).hexdigest()
            if actual != bundle.weights_sha256:
                raise BundleError(
                    f"{path} has sha256 {actual}, but its bundle.json says {bundle.weights_sha256}"
                )
            return load_tensors(content)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{path} cannot be read: {error}") from error


def reference_score(detector: Detector, preprocessing: Preprocessing) -> tuple[float, int]:
    """The score of the reference image that ships with NormGate, and the number of classes."""
    image = load_image(REFERENCE_JPEG.read_bytes(), preprocessing)
    detections = detector.detect(image[None])
    return float(detections.scores[0]), detections.logits.shape[1]


def _agreement_images(preprocessing: Preprocessing) -> Tensor:
    """The reference image, a puzzle of it, and noise: ``[3, 3, crop, crop]`` uint8."""
    image = load_image(REFERENCE_JPEG.read_bytes(), preprocessing)
    puzzle = jigsaw(image[None], draw_permutations(1, seed=0))[0]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, image.shape, generator=generator, dtype=torch.uint8)
    return torch.stack([image, puzzle, noise])


def library_versions() -> dict[str, str]:
    """The versions of the libraries a score depends on."""
    return {library: library_version(library) for library in _LIBRARIES}


def _title(bundle: Bundle) -> str:
    return f"bundle {bundle.name}/{bundle.version}"


def _check_decoder(bundle: Bundle) -> None:
    recorded, installed = bundle.preprocessing.decoder, installed_decoder()
    if recorded.reference_sha256 != installed.reference_sha256:
        raise BundleError(
            f"{_title(bundle)} was calibrated on pixels decoded by {recorded.jpeg}; "
            f"{installed.jpeg} decodes to other pixels, which voids the threshold"
        )


def _check_calibration(bundle: Bundle, scores: NDArray[np.float32]) -> None:
    threshold = bundle.threshold
    if scores.shape != (threshold.n,) or scores.dtype != np.float32:
        raise BundleError(
            f"{_title(bundle)} must hold {threshold.n} float32 calibration scores, it holds "
            f"{scores.dtype} {scores.shape}"
        )
    is_sorted = not (np.diff(scores) < 0).any()
    for level in filter(None, (threshold, bundle.abstain)):
        if not is_sorted or not _is_level_of(scores, level):
            raise BundleError(
                f"{_title(bundle)}: threshold {level.value} is not number {level.k} of its "
                "sorted calibration scores"
            )


def _check_classes(
    bundle: Bundle, scores: NDArray[np.float32], classes: NDArray[np.int64] | None
) -> None:
    if bundle.class_thresholds is None:
        return
    if classes is None or classes.shape != scores.shape:
        raise BundleError(
            f"{_title(bundle)} has thresholds for classes; it must hold the predicted class of "
            f"each of its {len(scores)} calibration scores"
        )
    for row in bundle.class_thresholds:
        own = scores[classes == row.index]
        for level in filter(None, (row.threshold, row.abstain)):
            if not _is_level_of(own, level):
                raise BundleError(
                    f"{_title(bundle)}: threshold {level.value} of class {row.label} is not "
                    f"number {level.k} of the {level.n} calibration scores of that class"
                )


def _is_level_of(scores: NDArray[np.float32], level: Threshold) -> bool:
    # A slice: k may lie beyond the scores.
    return len(scores) == level.n and scores[level.k - 1 : level.k].tolist() == [level.value]


def _write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    # Copies, since safetensors refuses tensors that share memory (tied weights).
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    content = save_tensors(copies)
    _write_synced(folder / WEIGHTS_FILE, content)
    return hashlib.sha256(content).hexdigest()


def _as_json(bundle: Bundle) -> bytes:
    return (bundle.model_dump_json(indent=2) + "\n").encode()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
