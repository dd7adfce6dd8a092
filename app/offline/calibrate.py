"""Calibration: from a network and two folders of ID images to a bundle in the model store."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.core.blocks import Block, BlockNorms, find_blocks
from app.core.detector import Detector
from app.core.head import find_head
from app.core.images import DEFAULT_MAX_PIXELS, Preprocessing, installed_decoder
from app.core.jigsaw import TILES, Edge, draw_permutations, jigsaw
from app.core.networks import (
    Architecture,
    build,
    default_labels,
    default_preprocessing,
    load_weights,
    read_weights,
)
from app.core.norm_ratio import BlockSelection, image_norm_ratios, select_block
from app.core.precision import Dtype, compute_in, on_device
from app.core.scores import SCORES_WITH_HEAD, ScoreName
from app.core.threshold import (
    DEFAULT_ALPHA,
    DEFAULT_DELTA,
    Guarantee,
    Threshold,
    fit_class_thresholds,
    fit_threshold,
    threshold_rank,
)
from app.errors import CalibrationError, NetworkError
from app.offline.progress import Progress
from app.offline.reading import Batch, Findings, ImageSet, Place, Reading, ThisMachine
from app.offline.report import CalibrationScores, calibration_report
from app.offline.sources import find_images
from app.store import (
    Bundle,
    CalibrationData,
    ClassThreshold,
    JigsawOptions,
    Store,
    StoredPreprocessing,
    library_versions,
    reference_score,
)

RANDOM_WEIGHTS: Final = "random"
MAX_SHARED_SHARE: Final = 0.01
_NAMED: Final = 10

ResultT = TypeVar("ResultT", "BatchNorms", "BatchScores")


@dataclass(frozen=True)
class CalibrationOptions:
    """What a calibration is asked for; the defaults are the command line's.

    Images are found as :func:`app.offline.sources.find_images` does, in folders or at URLs.
    """

    name: str
    architecture: Architecture
    selection_images: Path | str
    threshold_images: Path | str
    weights: str | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    blocks: str | None = None
    dtype: Dtype = "float32"
    score: ScoreName = "feature_norm"
    alpha: float = DEFAULT_ALPHA
    guarantee: Guarantee = "conformal"
    delta: float = DEFAULT_DELTA
    has_class_thresholds: bool = False
    abstain_alpha: float | None = None
    edge: Edge = "keep"
    seed: int = 0
    max_images: int | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS
    batch_size: int = 64
    device: str = "cpu"
    has_report: bool = False


@dataclass(frozen=True)
class BlockChoice:
    """The selection, and the FeatureNorms at the selected block that it shows in."""

    selection: BlockSelection
    norms: NDArray[np.float32]
    jigsaw_norms: NDArray[np.float32]


@dataclass(frozen=True)
class HeldOut:
    """The threshold images' scores, ascending, and the classes predicted for them."""

    scores: NDArray[np.float32]
    classes: NDArray[np.int64]


@dataclass(frozen=True)
class Calibration:
    """A bundle just written, and where."""

    bundle: Bundle
    folder: Path | str
    """Of a store that is no folder, the URL."""


def calibrate(
    options: CalibrationOptions,
    store: Store,
    *,
    progress: Progress,
    place: Place | None = None,
) -> Calibration:
    """Choose the block, set the threshold and write the bundle.

    The same options, images and seed give the same bundle but for ``created``, wherever the images
    are read and scored.

    Args:
        options: what is asked for.
        store: gets the bundle.
        progress: told how far it is.
        place: does the work; this machine by default.

    Raises:
        NetworkError: the network cannot be built, filled or read.
        CalibrationError: the images do not carry the calibration asked for.
        BundleError: the bundle cannot be written; nothing is left of it.
    """
    version = store.next_version(options.name)
    run = _Run(options, progress, place or ThisMachine())
    choice = run.select_block()
    held_out = run.held_out_scores(choice.selection.selected)
    bundle = run.describe(choice.selection, held_out)
    folder = store.write(
        lambda weights_sha256: bundle.model_copy(
            update={"version": version, "weights_sha256": weights_sha256}
        ),
        name=options.name,
        weights=run.network.state_dict(),
        calibration_scores=held_out.scores,
        calibration_classes=held_out.classes if options.has_class_thresholds else None,
        attach=_report(choice, held_out) if options.has_report else None,
    )
    return Calibration(store.read(options.name, version), folder)


def build_network(options: CalibrationOptions, *, device: str) -> nn.Module:
    """The network with its weights, on a device, in evaluation mode.

    Raises:
        NetworkError: it cannot be built or filled, or no weights were named.
    """
    torch.manual_seed(options.seed)
    network = build(options.architecture)
    if options.weights not in (None, RANDOM_WEIGHTS):
        load_weights(network, read_weights(Path(options.weights)))
    elif options.weights is None and options.architecture.family != "python":
        raise NetworkError(
            f"{options.architecture.id} needs weights: a file, or {RANDOM_WEIGHTS!r} to try the "
            "structure alone"
        )
    try:
        return on_device(compute_in(network, options.dtype), device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise NetworkError(f"device {device} cannot be used: {reason}") from error


def _report(choice: BlockChoice, held_out: HeldOut) -> Callable[[Bundle], Mapping[str, bytes]]:
    """What is written beside the description: the report and its figures."""
    scores = CalibrationScores(choice.norms, choice.jigsaw_norms, held_out.scores)
    return lambda bundle: calibration_report(bundle, scores).files()


@dataclass(frozen=True)
class BatchNorms:
    """The FeatureNorms of a batch's readable images and of their puzzles, ``[B, blocks]`` each."""

    findings: Findings
    of_images: NDArray[np.float32]
    of_puzzles: NDArray[np.float32]


@dataclass(frozen=True)
class BatchScores:
    """The scores of a batch's readable images and the classes predicted for them, ``[B]`` each."""

    findings: Findings
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]


@dataclass(frozen=True)
class NormWork:
    """What block selection does with a batch.

    Args:
        network: in evaluation mode.
        blocks: the candidates.
        preprocessing: normalises the images.
        permutations: ``[N, tiles * tiles]``, one for each position.
        edge: of the puzzles.
        device: where the network runs.
    """

    network: nn.Module
    blocks: Sequence[Block]
    preprocessing: Preprocessing
    permutations: NDArray[np.int8]
    edge: Edge
    device: str

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> BatchNorms:
        """The norms of the images and their puzzles."""
        indices = batch.indices
        if not indices:
            none = np.empty((0, len(self.blocks)), dtype=np.float32)
            return BatchNorms(batch.findings, none, none)
        inputs = self.preprocessing.normalise(batch.images.to(self.device))
        puzzles = jigsaw(inputs, self.permutations[indices], edge=self.edge)
        return BatchNorms(
            batch.findings,
            of_images=_columns(self._norms.run(inputs)[1]),
            of_puzzles=_columns(self._norms.run(puzzles)[1]),
        )

    @cached_property
    def _norms(self) -> BlockNorms:
        return BlockNorms(on_device(self.network, self.device), self.blocks)


@dataclass(frozen=True)
class ScoreWork:
    """What setting the threshold does with a batch.

    Args:
        network: in evaluation mode.
        block: the selected one.
        preprocessing: normalises the images.
        score: what the threshold is for.
        head: of the scores that need one.
        device: where the network runs.
    """

    network: nn.Module
    block: Block
    preprocessing: Preprocessing
    score: ScoreName
    head: str | None
    device: str

    def __call__(self, batch: Batch) -> BatchScores:
        """The scores and the predicted classes."""
        if not batch.indices:
            none = np.empty(0, dtype=np.float32)
            return BatchScores(batch.findings, none, none.astype(np.int64))
        detections = self._detector.detect(batch.images)
        return BatchScores(batch.findings, detections.scores, detections.logits.argmax(axis=1))

    @cached_property
    def _detector(self) -> Detector:
        return self.detector(np.empty(0, dtype=np.float32), -np.inf)

    def detector(self, scores: NDArray[np.float32], threshold: float) -> Detector:
        """One with a threshold."""
        return Detector(
            on_device(self.network, self.device),
            block=self.block,
            preprocessing=self.preprocessing,
            score=self.score,
            threshold=threshold,
            calibration_scores=scores,
            head=self.head,
        )


class _Run:
    """One calibration: the network, the two sets of images and the passes over them."""

    def __init__(self, options: CalibrationOptions, progress: Progress, place: Place) -> None:
        self._options = options
        self._progress = progress
        self._place = place
        self._selection, self._held_out = _image_sets(options, place)
        self._device = place.device(options.device)
        self.network = build_network(options, device=self._device)
        self._preprocessing = options.preprocessing or default_preprocessing(options.architecture)
        side = self._preprocessing.crop
        if side < TILES:
            raise CalibrationError(f"crop is {side} pixels; a jigsaw needs at least {TILES}")
        probe = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self._device)
        inputs = self._preprocessing.normalise(probe)
        try:
            self._blocks = find_blocks(self.network, inputs, pattern=options.blocks)
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise NetworkError(
                f"{options.architecture.id} cannot run on {side}x{side} pixels in "
                f"{options.dtype}: {reason}"
            ) from error
        self._labels = _labels(options, classes=_count_classes(self.network, inputs))
        self._head: str | None = None
        if options.score in SCORES_WITH_HEAD:
            self._head = find_head(self.network, inputs)

    def select_block(self) -> BlockChoice:
        """NormRatio of every block over the selection images."""
        options = self._options
        work = NormWork(
            self.network,
            self._blocks,
            self._preprocessing,
            permutations=draw_permutations(len(self._selection), seed=options.seed),
            edge=options.edge,
            device=options.device,
        )
        of_images: list[NDArray[np.float32]] = []
        of_puzzles: list[NDArray[np.float32]] = []
        for batch in self._pass("choosing the block", self._selection, work):
            of_images.append(batch.of_images)
            of_puzzles.append(batch.of_puzzles)
        image_norms, jigsaw_norms = _joined(of_images), _joined(of_puzzles)
        selection = select_block(
            self._blocks,
            image_norm_ratios(image_norms, jigsaw_norms),
            seed=options.seed,
        )
        column = self._blocks.index(selection.selected)
        return BlockChoice(selection, image_norms[:, column], jigsaw_norms[:, column])

    def held_out_scores(self, block: Block) -> HeldOut:
        """The score and predicted class of every threshold image, by ascending score."""
        scores: list[NDArray[np.float32]] = []
        classes: list[NDArray[np.int64]] = []
        work = self._score_work(block, device=self._options.device)
        for batch in self._pass("setting the threshold", self._held_out, work):
            scores.append(batch.scores)
            classes.append(batch.classes)
        joined = _joined(scores)
        order = np.argsort(joined, kind="stable")
        return HeldOut(joined[order], np.concatenate(classes)[order])

    def describe(self, selection: BlockSelection, held_out: HeldOut) -> Bundle:
        """The bundle's description, its version and weights' hash still to be filled in."""
        options = self._options
        threshold = self._fit_threshold(held_out, alpha=options.alpha)
        abstain = None
        if options.abstain_alpha is not None:
            abstain = self._fit_threshold(held_out, alpha=options.abstain_alpha)
        classes = self._class_thresholds(held_out) if options.has_class_thresholds else None
        detector = self._score_work(selection.selected, device=self._device).detector(
            held_out.scores, threshold.value
        )
        data = CalibrationData(
            selection=self._selection.fingerprint(),
            threshold=self._held_out.fingerprint(),
            shared_images=_shared_images(self._selection, self._held_out),
        )
        return Bundle(
            name=options.name,
            version=1,
            created=datetime.now(UTC),
            architecture=options.architecture,
            labels=self._labels,
            preprocessing=StoredPreprocessing(
                **self._preprocessing.model_dump(),
                decoder=installed_decoder(scaled=self._preprocessing.scaled_decode),
            ),
            dtype=options.dtype,
            block=selection.selected.name,
            norm_ratios=selection,
            jigsaw=JigsawOptions(tiles=TILES, edge=options.edge, seed=options.seed),
            score=options.score,
            threshold=threshold,
            head=self._head,
            abstain=abstain,
            class_thresholds=classes,
            golden_score=reference_score(detector, self._preprocessing)[0],
            data=data,
            weights_sha256="",
            libraries=library_versions(),
            warnings=(
                *selection.warnings,
                *_warnings(options, data),
                *_class_warnings(classes, self._labels),
            ),
        )

    def _fit_threshold(self, held_out: HeldOut, *, alpha: float) -> Threshold:
        return fit_threshold(
            held_out.scores,
            alpha=alpha,
            guarantee=self._options.guarantee,
            delta=self._options.delta,
        )

    def _class_thresholds(self, held_out: HeldOut) -> tuple[ClassThreshold, ...]:
        own, second = (
            {}
            if alpha is None
            else fit_class_thresholds(
                held_out.scores,
                held_out.classes,
                alpha=alpha,
                guarantee=self._options.guarantee,
                delta=self._options.delta,
            )
            for alpha in (self._options.alpha, self._options.abstain_alpha)
        )
        return tuple(
            ClassThreshold(
                index=index,
                label=self._labels[index],
                threshold=threshold,
                abstain=second.get(index),
            )
            for index, threshold in own.items()
        )

    def _score_work(self, block: Block, *, device: str) -> ScoreWork:
        return ScoreWork(
            self.network,
            block,
            self._preprocessing,
            score=self._options.score,
            head=self._head,
            device=device,
        )

    def _pass(
        self, title: str, images: ImageSet, work: Callable[[Batch], ResultT]
    ) -> Iterator[ResultT]:
        """What ``work`` makes of each batch; ``images`` learns what reading them told."""
        options, total, done = self._options, len(images), 0
        reading = Reading(
            images.source, self._preprocessing, options.batch_size, options.max_pixels
        )
        self._progress(title, done=done, total=total)
        for result in self._place.run(reading, work, range(total)):
            images.learn(result.findings)
            yield result
            done += len(result.findings.digests)
            self._progress(title, done=done, total=total)


def _image_sets(options: CalibrationOptions, place: Place) -> tuple[ImageSet, ImageSet]:
    selection = _resolved(options.selection_images)
    held_out = _resolved(options.threshold_images)
    if _lies_in(selection, held_out) or _lies_in(held_out, selection):
        raise CalibrationError(
            f"selection images {options.selection_images} and threshold images "
            f"{options.threshold_images} are the same folder, or one lies in the other: the "
            "threshold needs images the classifier was not trained on, whose norms are smaller"
        )
    if options.abstain_alpha is not None and not options.alpha < options.abstain_alpha < 1:
        raise CalibrationError(
            f"abstain alpha is {options.abstain_alpha}; it must lie between alpha, "
            f"{options.alpha}, and 1"
        )
    sets = _found(selection, options, place), _found(held_out, options, place)
    # Fails now rather than after the passes when there are too few images.
    threshold_rank(
        len(sets[1]),
        alpha=options.alpha,
        guarantee=options.guarantee,
        delta=options.delta,
    )
    return sets


def _resolved(location: Path | str) -> str:
    text = os.fspath(location)
    return text.rstrip("/") if "://" in text else os.path.realpath(text)


def _lies_in(inner: str, outer: str) -> bool:
    return f"{inner}/".startswith(f"{outer.rstrip('/')}/")


def _found(location: str, options: CalibrationOptions, place: Place) -> ImageSet:
    source = find_images(
        location, max_images=options.max_images, seed=options.seed, spread=place.spread()
    )
    return ImageSet(source)


def _shared_images(selection: ImageSet, held_out: ImageSet) -> int:
    shared = held_out.digests.shared_with(selection.digests)
    if shared > MAX_SHARED_SHARE * len(held_out):
        raise CalibrationError(
            f"{shared} of {len(held_out)} threshold images are also selection images, more "
            f"than {MAX_SHARED_SHARE:.0%}: the threshold needs images the classifier was not "
            "trained on, whose norms are smaller"
        )
    return shared


def _labels(options: CalibrationOptions, *, classes: int) -> tuple[str, ...]:
    if options.labels is None:
        return default_labels(options.architecture, classes=classes)
    if len(options.labels) != classes:
        raise CalibrationError(
            f"{len(options.labels)} labels were given; the network has {classes} classes"
        )
    return options.labels


@torch.inference_mode()
def _count_classes(network: nn.Module, inputs: Tensor) -> int:
    return int(network(inputs).shape[1])


def _columns(norms: dict[str, Tensor]) -> NDArray[np.float32]:
    """``[B, blocks]`` from one ``[B]`` a block."""
    columns: NDArray[np.float32] = torch.stack(list(norms.values()), dim=1).cpu().numpy()
    return columns


def _joined(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    joined = np.concatenate(parts)
    if not joined.size:
        raise CalibrationError("no image could be read")
    return joined


def _class_warnings(
    thresholds: Sequence[ClassThreshold] | None, labels: Sequence[str]
) -> Iterator[str]:
    if thresholds is None:
        return
    own = {row.index for row in thresholds}
    others = [label for index, label in enumerate(labels) if index not in own]
    if others:
        named = ", ".join(others[:_NAMED])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        yield (
            f"{len(others)} of {len(labels)} classes have too few threshold images and use the "
            f"threshold for all: {named}{more}. The rate of false alarms over all classes may then "
            f"exceed alpha; within a class that has its own threshold it does not"
        )


def _warnings(options: CalibrationOptions, data: CalibrationData) -> Iterator[str]:
    for what, fingerprint in (("selection", data.selection), ("threshold", data.threshold)):
        if fingerprint.unreadable:
            yield f"{len(fingerprint.unreadable)} {what} images were unreadable and left out"
    if data.shared_images:
        yield f"{data.shared_images} threshold images are also selection images"
    if options.weights == RANDOM_WEIGHTS:
        yield "the weights are random: this bundle shows the structure, its verdicts mean nothing"
