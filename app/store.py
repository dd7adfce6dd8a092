"""The model store: calibrated classifiers as bundles in ``<name>/<version>/``.

A bundle is ``bundle.json`` and ``weights.safetensors``. It appears whole and is never changed
afterwards, but for graphs for another engine, which may lie beside them in ``onnx/``: no verdict
depends on them, and they can be written again. ``<name>/active.json`` may point to the version that
all who follow the store serve.
"""

import hashlib
import math
import re
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
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

from app.core.cuda_graphs import CudaRecorder
from app.core.detector import ClassLevels, Detector, check_agreement
from app.core.graph_files import read_graphs
from app.core.images import REFERENCE_JPEG, Decoder, Preprocessing, installed_decoder
from app.core.images import load as load_image
from app.core.jigsaw import Edge, draw_permutations, jigsaw
from app.core.networks import Architecture, build, load_weights
from app.core.norm_ratio import BlockSelection
from app.core.onnx_engine import OnnxEngine
from app.core.onnx_graph import Graphs
from app.core.precision import Dtype, compute_in, dtype_of, on_device
from app.core.recorded_engine import Recorder, batch_sizes
from app.core.scores import SCORES_WITH_HEAD, ScoreName
from app.core.threshold import Threshold
from app.errors import (
    BundleError,
    BundleNotFoundError,
    EngineError,
    NetworkError,
    UnfitEngineError,
)
from app.storage import BUNDLE_FILE as BUNDLE_FILE
from app.storage import GRAPHS_FOLDER as GRAPHS_FOLDER
from app.storage import POINTER_FILE, FolderStorage, Storage
from app.storage import WEIGHTS_FILE as WEIGHTS_FILE

DEFAULT_CACHE: Final = Path("~/.cache/normgate")
CALIBRATION_SCORES_KEY: Final = "normgate.calibration_scores"
CALIBRATION_CLASSES_KEY: Final = "normgate.calibration_classes"
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
GOLDEN_TOLERANCE: Final[Mapping[Dtype, float]] = {"float32": 1e-3, "bfloat16": 1e-2}
"""Largest relative difference between the golden score stored and the one a machine computes."""

_LIBRARIES: Final = ("torch", "torchvision", "simplejpeg", "pillow", "numpy", "scipy")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredPreprocessing(Preprocessing):
    """The preprocessing, and the decoder whose pixels it was calibrated on."""

    decoder: Decoder

    @model_validator(mode="after")
    def _scales_are_known(self) -> Self:
        if self.scaled_decode != (self.decoder.scaled_sha256 is not None):
            raise ValueError(
                "scaled_decode and the decoder's scaled_sha256 must be there together or not at all"
            )
        return self


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
    dtype: Dtype = Field(description="What the network computes in, here and in calibration.")
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
                on_device(compute_in(network, bundle.dtype), device),
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
        if not math.isclose(score, bundle.golden_score, rel_tol=GOLDEN_TOLERANCE[bundle.dtype]):
            raise BundleError(
                f"{_title(bundle)}: the reference image scores {score:.6g} here, but "
                f"{bundle.golden_score:.6g} when the bundle was made; the threshold is void"
            )
        if classes != len(bundle.labels):
            raise BundleError(
                f"{_title(bundle)}: {len(bundle.labels)} labels for {classes} classes"
            )
        return detector

    def on_onnxruntime(
        self,
        detector: Detector,
        graphs: Graphs | None = None,
        *,
        threads: int | None = None,
        passes: int = 1,
    ) -> Detector:
        """A detector like one of :meth:`detector` on the CPU, run by ONNX Runtime.

        It has scored a few images as the one on torch did.

        Args:
            detector: let it go afterwards: its network is a second copy of the weights.
            graphs: those in the bundle's folder by default.
            threads: of a forward pass; torch's by default.
            passes: that may run at once, and then share the threads. More than one of several
                threads needs a second copy of the weights.

        Raises:
            EngineError: ONNX Runtime is not installed or does not run the bundle's dtype, there
                are no graphs or damaged ones, or the scores differ.
        """
        try:
            check_fits_onnxruntime(self.bundle)
            if graphs is None:
                if self.folder is None:
                    raise EngineError("the bundle has no folder to read graphs from")
                graphs = read_graphs(self.folder / GRAPHS_FOLDER)
            threads = threads or torch.get_num_threads()
            engine = self._agreeing(detector, graphs, threads=threads)
            if passes == 1 or threads == 1:
                return detector.on_engine(engine, passes=passes)
            # A session's passes share all its threads but one: the thread that calls is that one.
            beside = self._agreeing(detector, graphs, threads=max(1, threads - passes + 1))
            return detector.on_engine(engine, beside=beside, passes=passes)
        except EngineError as error:
            raise type(error)(f"{_title(self.bundle)}: {error}") from error
        except Exception as error:  # a graph may fail when it runs, in any way
            reason = " ".join(str(error).split())
            raise EngineError(f"{_title(self.bundle)}: onnxruntime failed: {reason}") from error

    def _agreeing(self, detector: Detector, graphs: Graphs, *, threads: int) -> OnnxEngine:
        engine = OnnxEngine(graphs, self.weights, threads=threads)
        images = _agreement_images(self.bundle.preprocessing)
        check_agreement(detector.on_engine(engine), detector, images)
        return engine

    def on_cuda_graphs(self, detector: Detector, *, device: str, batch_size: int) -> Detector:
        """A detector like one of :meth:`detector` on a GPU, whose passes are recorded as graphs.

        Raises:
            EngineError: as of :meth:`recorded`.
        """
        side = self.bundle.preprocessing.crop
        return self.recorded(
            detector,
            lambda: CudaRecorder(torch.device(device), size=batch_size, side=side),
        )

    def recorded(self, detector: Detector, make_recorder: Callable[[], Recorder]) -> Detector:
        """A detector like the one given, whose passes are recorded and replayed.

        It has scored batches of every size it recorded as that one did.

        Raises:
            EngineError: the passes cannot be recorded, or the scores differ.
        """
        try:
            recorder = make_recorder()
            other = detector.recorded(recorder)
            images = _agreement_images(self.bundle.preprocessing)
            for size in batch_sizes(len(recorder.inputs)):
                batch = images.repeat(1 + size // len(images), 1, 1, 1)[:size]
                check_agreement(other, detector, batch, dtype=self.bundle.dtype)
        except EngineError as error:
            raise type(error)(f"{_title(self.bundle)}: {error}") from error
        except RuntimeError as error:  # of torch, or of CUDA below it
            reason = str(error).partition("\n")[0]
            raise EngineError(f"{_title(self.bundle)}: recording failed: {reason}") from error
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


class Pointer(BaseModel):
    """Which version of a model all who follow the store serve."""

    model_config = ConfigDict(frozen=True)

    version: int = Field(ge=1)
    previous: int | None = Field(None, ge=1, description="What a rollback returns to.")
    written: datetime


class Store:
    """The bundles below a folder or a URL.

    Args:
        location: a folder, or a URL that fsspec knows, such as ``s3://bucket/models``.
        cache: where verified copies of a URL's bundles lie.

    Raises:
        BundleError: the URL is no such URL, or what reads it is not installed.
    """

    def __init__(self, location: Path | str, *, cache: Path = DEFAULT_CACHE) -> None:
        self._storage = _storage(location, cache=cache)

    @property
    def root(self) -> Path:
        """The folder that weights are read from: of a URL, the one with its verified copies."""
        return self._storage.root

    @property
    def title(self) -> str:
        """The folder or the URL, fit for a message."""
        return self._storage.title

    def names(self) -> list[str]:
        """Models with at least one version, sorted."""
        return list(self.index())

    def index(self) -> dict[str, list[int]]:
        """The versions of every model with at least one, sorted."""
        found = {name: self.versions(name) for name in self._storage.names()}
        return {name: versions for name, versions in found.items() if versions}

    def versions(self, name: str) -> list[int]:
        """Versions of a model, ascending; empty when there is no such model."""
        # Not every text is the name of a file: one too long is an error to the system.
        return self._storage.versions(name) if re.fullmatch(NAME_PATTERN, name) else []

    def newest(self, name: str) -> int:
        """The highest version of a model.

        Raises:
            BundleNotFoundError: there is no such model.
        """
        return self._known_versions(name)[-1]

    def current(self, name: str) -> int:
        """The version that the pointer names, or the highest where there is no pointer.

        Raises:
            BundleNotFoundError: there is no such model.
            BundleError: the pointer is damaged.
        """
        newest = self.newest(name)
        pointer = self.pointer(name)
        return newest if pointer is None else pointer.version

    def pointer(self, name: str) -> Pointer | None:
        """The pointer of a model, if there is one.

        Raises:
            BundleError: it is damaged.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            return None
        content = self._storage.pointer(name)
        try:
            return None if content is None else Pointer.model_validate_json(content)
        except ValidationError as error:
            raise BundleError(
                f"{self.title}/{name}/{POINTER_FILE}: {_first_problem(error)}"
            ) from error

    def activate(self, name: str, version: int) -> Pointer:
        """Point to a version: whoever follows the store serves it from their next look on.

        Raises:
            BundleNotFoundError: there is no such bundle.
            BundleError: the bundle is damaged, or the pointer cannot be written.
        """
        bundle, description = self._read(name, version)
        self._weights(bundle, description)  # nobody is sent to a bundle that is not whole
        before = None
        with suppress(BundleError):  # a damaged pointer is replaced like any other
            before = self.pointer(name)
        previous = None
        if before is not None:
            previous = before.previous if before.version == version else before.version
        pointer = Pointer(version=version, previous=previous, written=datetime.now(UTC))
        try:
            self._storage.point(name, (pointer.model_dump_json() + "\n").encode())
        except OSError as error:
            raise BundleError(
                f"{self.title}/{name}/{POINTER_FILE} could not be written: {error}"
            ) from error
        return pointer

    def roll_back(self, name: str) -> Pointer:
        """Point to the version before; a second time returns.

        Raises:
            BundleNotFoundError: there is no such bundle.
            BundleError: there is no pointer, or it knows of no version before.
        """
        pointer = self.pointer(name)
        if pointer is None or pointer.previous is None:
            raise BundleError(
                f"{self.title}/{name}/{POINTER_FILE} names no version before; activate one by "
                "its number"
            )
        return self.activate(name, pointer.previous)

    def push(self, name: str, version: int | None, to: "Store") -> str:
        """Copy a verified bundle to another store, byte for byte; where it lies there.

        Args:
            name: the model.
            version: the current one when None.
            to: the other store; the version must not be in it.

        Raises:
            BundleNotFoundError: there is no such bundle.
            BundleError: it is damaged, or cannot be written.
        """
        bundle, description = self._read(name, version)
        files = {WEIGHTS_FILE: self._weights(bundle, description)}
        for file in self._storage.files(name, bundle.version):
            if file not in (WEIGHTS_FILE, BUNDLE_FILE):
                files[file] = self._storage.read(name, bundle.version, file)
        to._add(bundle, {**files, BUNDLE_FILE: description})
        return to._storage.where(name, bundle.version)

    def signature(self, name: str, version: int) -> Hashable:
        """Something that changes when a file of the bundle does; for versions written by hand."""
        return self._storage.signature(name, version)

    def read(self, name: str, version: int | None = None) -> Bundle:
        """The description of a bundle; the current version by default.

        Raises:
            BundleNotFoundError: there is no such bundle.
            BundleError: ``bundle.json`` is damaged or of another schema.
        """
        return self._read(name, version)[0]

    def load(
        self, name: str, version: int | None = None, *, allowed_factories: Collection[str] = ()
    ) -> LoadedBundle:
        """A bundle with its weights, verified.

        Args:
            name: the model.
            version: the current one by default.
            allowed_factories: ``python/`` architecture ids whose code may be run.

        Raises:
            BundleNotFoundError: there is no such bundle.
            BundleError: a hash differs, a file is damaged, the decoder gives other pixels, the
                weights are of another dtype, or the architecture's code may not be run.
        """
        bundle, description = self._read(name, version)
        architecture = bundle.architecture
        if architecture.family == "python" and architecture.id not in allowed_factories:
            raise BundleError(
                f"{_title(bundle)} runs code of {architecture.id}; list it in the setting "
                "allowed_factories to permit that"
            )
        _check_decoder(bundle)
        weights = self._tensors(bundle, self._weights(bundle, description))
        scores = weights.pop(CALIBRATION_SCORES_KEY, torch.empty(0)).numpy()
        stored_classes = weights.pop(CALIBRATION_CLASSES_KEY, None)
        classes = None if stored_classes is None else stored_classes.numpy()
        _check_dtype(bundle, weights)
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
        return max(self._storage.taken(name), default=0) + 1

    def write(
        self,
        describe: Callable[[str], Bundle],
        *,
        name: str,
        weights: Mapping[str, Tensor],
        calibration_scores: NDArray[np.float32],
        calibration_classes: NDArray[np.int64] | None = None,
        attach: Callable[[Bundle], Mapping[str, bytes]] | None = None,
    ) -> Path | str:
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
            The folder or the URL of the new version.

        Raises:
            BundleError: the version exists, or the storage is full or refuses.
        """
        tensors = dict(weights) | {CALIBRATION_SCORES_KEY: torch.from_numpy(calibration_scores)}
        if calibration_classes is not None:
            tensors[CALIBRATION_CLASSES_KEY] = torch.from_numpy(calibration_classes)
        content = _as_safetensors(tensors)
        bundle = describe(hashlib.sha256(content).hexdigest())
        files = {WEIGHTS_FILE: content, BUNDLE_FILE: _as_json(bundle)}
        self._add(bundle, files | dict(attach(bundle) if attach else {}))
        where = self._storage.where(name, bundle.version)
        return where if "://" in where else Path(where)

    def _add(self, bundle: Bundle, files: Mapping[str, bytes]) -> None:
        try:
            self._storage.add(bundle.name, bundle.version, files)
        except OSError as error:
            where = f"{self.title}/{bundle.name}"
            raise BundleError(f"the bundle could not be written to {where}: {error}") from error

    def _known_versions(self, name: str) -> list[int]:
        versions = self.versions(name)
        if not versions:
            known = ", ".join(self.names()) or "none"
            raise BundleNotFoundError(f"no model {name!r} in {self.title}; there are: {known}")
        return versions

    def _read(self, name: str, version: int | None) -> tuple[Bundle, bytes]:
        """A description, and the bytes it was read from."""
        versions = self._known_versions(name)
        version = self.current(name) if version is None else version
        if version not in versions:
            known = ", ".join(map(str, versions))
            raise BundleNotFoundError(f"model {name!r} has no version {version}; it has: {known}")
        where = self._storage.where(name, version, BUNDLE_FILE)
        try:
            content = self._storage.read(name, version, BUNDLE_FILE)
            bundle = Bundle.model_validate_json(content)
        except OSError as error:
            raise BundleError(f"{where} cannot be read: {error}") from error
        except ValidationError as error:
            raise BundleError(f"{where}: {_first_problem(error)}") from error
        if (bundle.name, bundle.version) != (name, version):
            raise BundleError(f"{where} says it is {_title(bundle)}")
        return bundle, content

    def _weights(self, bundle: Bundle, description: bytes) -> bytes:
        return self._storage.weights(
            bundle.name, bundle.version, sha256=bundle.weights_sha256, description=description
        )

    def _tensors(self, bundle: Bundle, content: bytes) -> dict[str, Tensor]:
        try:
            return load_tensors(content)
        except SafetensorError as error:
            where = self._storage.where(bundle.name, bundle.version, WEIGHTS_FILE)
            raise BundleError(f"{where} cannot be read: {error}") from error


def reference_score(detector: Detector, preprocessing: Preprocessing) -> tuple[float, int]:
    """The score of the reference image that ships with NormGate, and the number of classes."""
    image = load_image(REFERENCE_JPEG.read_bytes(), preprocessing)
    detections = detector.detect(image[None])
    return float(detections.scores[0]), detections.logits.shape[1]


def check_fits_onnxruntime(bundle: Bundle) -> None:
    """Return when ONNX Runtime can run networks of the bundle's dtype.

    Raises:
        UnfitEngineError: it cannot.
    """
    if bundle.dtype != "float32":
        # Its CPU kernels for convolutions are in float32: another dtype, another threshold.
        raise UnfitEngineError(
            f"dtype is {bundle.dtype}; onnxruntime runs networks of dtype float32 alone"
        )


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


def _storage(location: Path | str, *, cache: Path) -> Storage:
    if isinstance(location, str) and "://" in location:
        from app.object_storage import ObjectStorage

        return ObjectStorage(location, cache=cache)
    return FolderStorage(Path(location))


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the document"
    return f"{where}: {first['msg']}"


def _title(bundle: Bundle) -> str:
    return f"bundle {bundle.name}/{bundle.version}"


def _check_decoder(bundle: Bundle) -> None:
    recorded = bundle.preprocessing.decoder
    installed = installed_decoder(scaled=bundle.preprocessing.scaled_decode)
    if (recorded.reference_sha256, recorded.scaled_sha256) != (
        installed.reference_sha256,
        installed.scaled_sha256,
    ):
        raise BundleError(
            f"{_title(bundle)} was calibrated on pixels decoded by {recorded.jpeg}; "
            f"{installed.jpeg} decodes to other pixels, which voids the threshold"
        )


def _check_dtype(bundle: Bundle, weights: Mapping[str, Tensor]) -> None:
    stored = dtype_of(weights)
    if stored != bundle.dtype:
        raise BundleError(
            f"{_title(bundle)}: dtype is {bundle.dtype}, but its weights are {stored}; a "
            f"threshold belongs to a dtype: calibrate with --dtype {bundle.dtype}"
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


def _as_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    # Copies, since safetensors refuses tensors that share memory (tied weights).
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    try:
        return save_tensors(copies)
    except SafetensorError as error:
        raise BundleError(f"the weights could not be written: {error}") from error


def _as_json(bundle: Bundle) -> bytes:
    if bundle.preprocessing.scaled_decode:
        text = bundle.model_dump_json(indent=2)
    else:
        # What does not use them is without these fields, and older servers go on reading it.
        text = bundle.model_dump_json(
            indent=2,
            exclude={"preprocessing": {"scaled_decode": True, "decoder": {"scaled_sha256": True}}},
        )
    return (text + "\n").encode()
