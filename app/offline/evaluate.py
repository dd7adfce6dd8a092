"""How well a bundle tells ID from OOD images, beside the other methods on the same network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from app.core.blocks import Block, BlockNorms
from app.core.detector import Detections
from app.core.head import find_head
from app.core.images import DEFAULT_MAX_PIXELS
from app.core.jigsaw import draw_permutations, jigsaw
from app.core.norm_ratio import image_norm_ratios, select_block
from app.errors import CalibrationError, NetworkError
from app.offline.methods import FITTED, Methods
from app.offline.metrics import METRICS, MetricName, Resamples, draw_counts, measure
from app.offline.progress import Progress
from app.offline.reading import Batch, ImageFolder, tracked
from app.store import LoadedBundle

Codec = Literal["raw", "jpeg75"]
Group = Literal["near", "far"]
Interval = tuple[float, float]
Scores = NDArray[np.float64]

RESAMPLES: Final = 300
INTERVAL_LEVEL: Final = 0.95
MAX_TRAINING_IMAGES: Final = 50_000
ORACLE_TOLERANCE: Final = 0.01
_JPEG_QUALITY: Final = 75


class DataSetResult(BaseModel):
    """One score on one OOD data set, or its mean over several; all in [0, 1]."""

    model_config = ConfigDict(frozen=True)

    auroc: float
    fpr95: float
    """Share of OOD images accepted when 95 % of the ID images are kept (the paper's)."""
    aupr_in: float
    aupr_out: float
    fpr95_ood_positive: float
    """Share of ID images refused when 95 % of the OOD images are caught (pytorch-ood's FPR95)."""
    intervals: dict[MetricName, Interval]
    """Bootstrap intervals of all of these."""


class Evaluation(BaseModel):
    """What :func:`evaluate` measured."""

    model_config = ConfigDict(frozen=True)

    bundle: str
    codec: Codec
    is_paper: bool
    """Whether the conventions are those of the authors' code."""
    score: str
    block: str
    id_images: int
    training_images: int
    ood_images: dict[str, int]
    groups: dict[str, Group]
    unreadable: dict[str, tuple[str, ...]]
    false_alarm_rate: float
    """Share of the ID images below the bundle's threshold."""
    false_alarm_interval: Interval
    false_alarms_promised: Interval
    """The interval the bundle gives for the false-alarm rate."""
    detection_rate: dict[str, float]
    """Share of each OOD data set below the bundle's threshold."""
    detection_intervals: dict[str, Interval]
    accuracy: float | None
    """Of the classifier on the ID images, where they lie in folders named after its labels."""
    results: dict[str, dict[str, DataSetResult]]
    """By score, then by data set."""
    averages: dict[str, dict[str, DataSetResult]]
    """By score, then over ``all`` data sets and over those called ``near`` and ``far``."""
    blocks: dict[str, dict[str, DataSetResult]]
    """FeatureNorm at every block, by data set and over ``all``."""
    oracle_block: str
    """The block whose mean AUROC is the largest: what no one can know without OOD images."""
    left_out: dict[str, str]
    """Methods that could not be computed, and why."""
    interval_level: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class Scored:
    """Every score of the images of one folder, in the order of its files."""

    files: Sequence[Path]
    detections: Detections
    methods: Mapping[str, Scores]
    block_norms: NDArray[np.float32]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoredImages:
    """What one pass over all folders gave: raw scores, before anything is summarised."""

    loaded: LoadedBundle
    codec: Codec
    is_paper: bool
    block: Block
    inside: Scored
    puzzles: Scored
    """Jigsaw puzzles of the ID images; the methods with a backward pass are left out."""
    outside: Mapping[str, Scored]
    training_images: int
    left_out: Mapping[str, str]


def evaluate(
    loaded: LoadedBundle,
    *,
    id_images: Path,
    ood_images: Mapping[str, Path],
    progress: Progress,
    groups: Mapping[str, Group] | None = None,
    training_images: Path | None = None,
    codec: Codec = "raw",
    is_paper: bool = False,
    with_odin: bool = True,
    batch_size: int = 64,
    device: str = "cpu",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """:func:`score_images` and :func:`summarise` in one."""
    scored = score_images(
        loaded,
        id_images=id_images,
        ood_images=ood_images,
        progress=progress,
        training_images=training_images,
        codec=codec,
        is_paper=is_paper,
        with_odin=with_odin,
        batch_size=batch_size,
        device=device,
    )
    return summarise(scored, groups=groups or {}, resamples=resamples, seed=seed)


def score_images(
    loaded: LoadedBundle,
    *,
    id_images: Path,
    ood_images: Mapping[str, Path],
    progress: Progress,
    training_images: Path | None = None,
    codec: Codec = "raw",
    is_paper: bool = False,
    with_odin: bool = True,
    batch_size: int = 64,
    device: str = "cpu",
) -> ScoredImages:
    """Every method's score of every image, each image read once.

    Args:
        loaded: the bundle.
        id_images: ID images used neither for training nor for calibration.
        ood_images: a folder for each OOD data set.
        progress: told how far it is.
        training_images: ID training images, on which ReAct, DICE, ViM, Mahalanobis and KNN are
            fitted; without them these are left out.
        codec: ``jpeg75`` re-encodes the resized OOD images as the ID images were.
        is_paper: select the block on ``training_images`` with puzzles whose edge is zero.
        with_odin: ODIN's backward passes cost twice as much as all the rest.
        batch_size: images in one forward pass.
        device: where the network runs.

    Raises:
        CalibrationError: a folder holds no readable images, or none for the paper's selection.
        BundleError: the network cannot be built.
    """
    if is_paper and training_images is None and loaded.bundle.jigsaw.edge != "zero":
        raise CalibrationError(
            f"bundle {loaded.bundle.name}/{loaded.bundle.version} was calibrated with edge "
            f"{loaded.bundle.jigsaw.edge}; the paper's zero edge selects the block anew, on "
            "training images (--train DIR)"
        )
    run = _Run(loaded, with_odin=with_odin, batch_size=batch_size, device=device, progress=progress)
    trained_on = 0
    if training_images is not None:
        trained_on = run.fit(training_images, with_zero_edge=is_paper)
    inside, puzzles = run.score_inside(id_images)
    outside = {name: run.score(name, folder, codec=codec) for name, folder in ood_images.items()}
    return ScoredImages(
        loaded=loaded,
        codec=codec,
        is_paper=is_paper,
        block=run.block,
        inside=inside,
        puzzles=puzzles,
        outside=outside,
        training_images=trained_on,
        left_out=run.left_out,
    )


def summarise(
    scored: ScoredImages,
    *,
    groups: Mapping[str, Group],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """The metrics of every method on every data set, with bootstrap intervals.

    Args:
        scored: from :func:`score_images`.
        groups: which data sets are near and which far OOD; others count in ``all`` alone.
        resamples: of the images, the same for every method.
        seed: of the bootstrap.
    """
    comparison = _Comparison(scored, groups=groups, resamples=resamples, seed=seed)
    inside, bundle = scored.inside, scored.loaded.bundle
    results, averages = comparison.of_methods()
    blocks = comparison.of_blocks()
    interval = bundle.threshold.false_alarm_rate
    return Evaluation(
        bundle=f"{bundle.name}/{bundle.version}",
        codec=scored.codec,
        is_paper=scored.is_paper,
        score=bundle.score,
        block=scored.block.name,
        id_images=len(inside.files),
        training_images=scored.training_images,
        ood_images={name: len(outside.files) for name, outside in scored.outside.items()},
        groups=dict(groups),
        unreadable={
            name: folder.unreadable
            for name, folder in {"ID": inside, **scored.outside}.items()
            if folder.unreadable
        },
        false_alarm_rate=float(inside.detections.is_ood.mean()),
        false_alarm_interval=comparison.false_alarm_interval(),
        false_alarms_promised=(interval.low, interval.high),
        detection_rate={
            name: float(outside.detections.is_ood.mean())
            for name, outside in scored.outside.items()
        },
        detection_intervals=comparison.detection_intervals(),
        accuracy=_accuracy(inside, bundle.labels),
        results=results,
        averages=averages,
        blocks=blocks,
        oracle_block=max(blocks, key=lambda name: blocks[name]["all"].auroc),
        left_out=dict(scored.left_out),
        interval_level=INTERVAL_LEVEL,
        resamples=resamples,
        seed=seed,
    )


class _Run:
    """One network with all its methods, run over several folders."""

    def __init__(
        self,
        loaded: LoadedBundle,
        *,
        with_odin: bool,
        batch_size: int,
        device: str,
        progress: Progress,
    ) -> None:
        bundle = loaded.bundle
        self._bundle = bundle
        self._detector = loaded.detector(device=device)
        self._network = self._detector.network
        self._preprocessing = bundle.preprocessing
        self._with_odin = with_odin
        self._batch_size = batch_size
        self._device = device
        self._progress = progress
        self._blocks = [Block(row.block, row.layout) for row in bundle.norm_ratios.blocks]
        self._norms = BlockNorms(self._network, self._blocks)
        self.block = bundle.norm_ratios.selected
        self.left_out: dict[str, str] = dict.fromkeys(FITTED, "no training images were given")
        if not with_odin:
            self.left_out |= dict.fromkeys(("odin", "selected_norm_odin"), "not asked for")
        self._head = self._find_head()
        self._methods = self._make_methods()

    def fit(self, folder: Path, *, with_zero_edge: bool) -> int:
        """Fit the methods that are fitted on ID training images; how many there were."""
        features: list[Tensor] = []
        ratios: list[NDArray[np.float32]] = []
        predicted: list[NDArray[np.int64]] = []
        images = ImageFolder.find(folder, max_images=MAX_TRAINING_IMAGES)
        permutations = draw_permutations(len(images.files), seed=self._bundle.jigsaw.seed)
        files: list[Path] = []
        for batch, inputs in self._batches("training images", images):
            logits, norms, last = self._forward(inputs)
            if last is not None:
                features.append(last.cpu())
            predicted.append(logits.argmax(dim=1).cpu().numpy())
            files.extend(images.files[i] for i in batch.indices)
            if with_zero_edge:
                puzzles = jigsaw(inputs, permutations[batch.indices], edge="zero")
                ratios.append(image_norm_ratios(norms, self._forward(puzzles)[1]))
        if not files:
            raise CalibrationError(f"no image in {folder} could be read")
        if with_zero_edge:
            selection = select_block(
                self._blocks, np.concatenate(ratios), seed=self._bundle.jigsaw.seed
            )
            self.block = selection.selected
            self._methods = self._make_methods()
        if features:
            truth = _truth(files, self._bundle.labels)
            labels = np.concatenate(predicted) if truth is None else truth
            self._methods.fit(torch.cat(features).float(), labels)
            self.left_out = {
                name: reason for name, reason in self.left_out.items() if name not in FITTED
            }
        return len(files)

    def score(self, title: str, folder: Path, *, codec: Codec) -> Scored:
        """All scores of all readable images of a folder."""
        images = ImageFolder.find(folder)
        scores = _Collected()
        files: list[Path] = []
        for batch, inputs in self._batches(title, images, codec=codec):
            scores.add(*self._scores(inputs, with_gradients=self._with_odin))
            files.extend(images.files[i] for i in batch.indices)
        return scores.joined(files, tuple(images.unreadable))

    def score_inside(self, folder: Path) -> tuple[Scored, Scored]:
        """All scores of the ID images, and those of a jigsaw puzzle of each."""
        images = ImageFolder.find(folder)
        inside, puzzles = _Collected(), _Collected()
        files: list[Path] = []
        options = self._bundle.jigsaw
        permutations = draw_permutations(len(images.files), seed=options.seed)
        for batch, inputs in self._batches("ID", images):
            inside.add(*self._scores(inputs, with_gradients=self._with_odin))
            pieces = jigsaw(inputs, permutations[batch.indices], edge=options.edge)
            puzzles.add(*self._scores(pieces, with_gradients=False))
            files.extend(images.files[i] for i in batch.indices)
        return inside.joined(files, tuple(images.unreadable)), puzzles.joined(files)

    def _find_head(self) -> str | None:
        side = self._preprocessing.crop
        probe = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self._device)
        try:
            return find_head(self._network, self._preprocessing.normalise(probe))
        except NetworkError as error:
            for name in (
                *("selected_norm_energy", "selected_norm_msp", "selected_norm_odin"),
                *("gradnorm", *FITTED),
            ):
                self.left_out[name] = str(error)
            return None

    def _make_methods(self) -> Methods:
        return Methods(
            self._network, block=self.block, head=self._head, std=self._preprocessing.std
        )

    def _batches(
        self, title: str, images: ImageFolder, *, codec: Codec = "raw"
    ) -> Iterator[tuple[Batch, Tensor]]:
        for batch in tracked(
            images.batches(
                self._preprocessing, batch_size=self._batch_size, max_pixels=DEFAULT_MAX_PIXELS
            ),
            title=title,
            total=len(images.files),
            progress=self._progress,
        ):
            prepared = batch.images if codec == "raw" else as_jpeg(batch.images)
            yield batch, self._preprocessing.normalise(prepared.to(self._device))

    @torch.no_grad()
    def _forward(self, inputs: Tensor) -> tuple[Tensor, NDArray[np.float32], Tensor | None]:
        """Logits, the norms of all blocks ``[B, blocks]``, and the last features."""
        features = None
        if self._head is None:
            logits, norms = self._norms.run(inputs)
        else:
            logits, norms, features = self._norms.run_with_features(inputs, head=self._head)
        return logits, torch.stack(list(norms.values()), dim=1).cpu().numpy(), features

    def _scores(
        self, inputs: Tensor, *, with_gradients: bool
    ) -> tuple[Detections, Mapping[str, Scores], NDArray[np.float32]]:
        logits, norms, features = self._forward(inputs)
        own = self._norm_at(self._bundle.norm_ratios.selected, norms)
        detections = self._detector.judge_outputs(own, logits, features)
        methods = self._methods.of_outputs(self._norm_at(self.block, norms), logits, features)
        if with_gradients:
            methods = {**methods, **self._methods.of_inputs(inputs)}
        return detections, methods, norms

    def _norm_at(self, block: Block, norms: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(norms[:, self._blocks.index(block)]).to(self._device)


class _Collected:
    """The scores of a folder, batch after batch."""

    def __init__(self) -> None:
        self._detections: list[Detections] = []
        self._methods: dict[str, list[Scores]] = {}
        self._norms: list[NDArray[np.float32]] = []

    def add(
        self,
        detections: Detections,
        methods: Mapping[str, Scores],
        norms: NDArray[np.float32],
    ) -> None:
        self._detections.append(detections)
        self._norms.append(norms)
        for name, scores in methods.items():
            self._methods.setdefault(name, []).append(scores)

    def joined(self, files: Sequence[Path], unreadable: tuple[str, ...] = ()) -> Scored:
        if not self._norms:
            raise CalibrationError("no image could be read")
        names = vars(self._detections[0])
        return Scored(
            files=files,
            detections=Detections(
                **{
                    name: np.concatenate([getattr(part, name) for part in self._detections])
                    for name in names
                }
            ),
            methods={name: np.concatenate(parts) for name, parts in self._methods.items()},
            block_norms=np.concatenate(self._norms),
            unreadable=unreadable,
        )


class _Comparison:
    """The metrics of one evaluation, all on the same resamples."""

    def __init__(
        self, scored: ScoredImages, *, groups: Mapping[str, Group], resamples: int, seed: int
    ) -> None:
        self._scored = scored
        self._members = {"all": list(scored.outside)}
        for group in ("near", "far"):
            members = [name for name in scored.outside if groups.get(name) == group]
            if members:
                self._members[group] = members
        self._inside = draw_counts(len(scored.inside.files), resamples=resamples, seed=[seed, 0])
        self._outside = {
            name: draw_counts(len(outside.files), resamples=resamples, seed=[seed, index])
            for index, (name, outside) in enumerate(scored.outside.items(), start=1)
        }

    def of_methods(
        self,
    ) -> tuple[dict[str, dict[str, DataSetResult]], dict[str, dict[str, DataSetResult]]]:
        """Results by method and data set, and by method and group."""
        results, averages = {}, {}
        for method in self._scored.inside.methods:
            results[method], averages[method] = self._measured(_method_scores(method))
        return results, averages

    def of_blocks(self) -> dict[str, dict[str, DataSetResult]]:
        """FeatureNorm at every block, by data set and over all."""
        blocks = {}
        for column, row in enumerate(self._scored.loaded.bundle.norm_ratios.blocks):
            single, grouped = self._measured(_norms_at(column))
            blocks[row.block] = single | {"all": grouped["all"]}
        return blocks

    def false_alarm_interval(self) -> Interval:
        return _rate_interval(self._scored.inside.detections.is_ood, self._inside)

    def detection_intervals(self) -> dict[str, Interval]:
        return {
            name: _rate_interval(outside.detections.is_ood, self._outside[name])
            for name, outside in self._scored.outside.items()
        }

    def _measured(
        self, scores: Callable[[Scored], Scores]
    ) -> tuple[dict[str, DataSetResult], dict[str, DataSetResult]]:
        inside = scores(self._scored.inside)
        measured = {
            name: measure(
                inside,
                scores(outside),
                resamples=Resamples(self._inside, self._outside[name]),
                nearest_recall=self._scored.is_paper,
            )
            for name, outside in self._scored.outside.items()
        }
        averages = {
            group: {
                metric: np.mean([measured[name][metric] for name in members], axis=0)
                for metric in METRICS
            }
            for group, members in self._members.items()
        }
        return (
            {name: _result(values) for name, values in measured.items()},
            {group: _result(values) for group, values in averages.items()},
        )


def _method_scores(method: str) -> Callable[[Scored], Scores]:
    return lambda folder: folder.methods[method]


def _norms_at(column: int) -> Callable[[Scored], Scores]:
    return lambda folder: folder.block_norms[:, column].astype(np.float64)


def _result(values: Mapping[MetricName, Scores]) -> DataSetResult:
    return DataSetResult(
        **{name: float(values[name][0]) for name in METRICS},
        intervals={name: _interval(values[name][1:]) for name in METRICS},
    )


def _rate_interval(is_ood: NDArray[np.bool_], counts: NDArray[np.uint16]) -> Interval:
    return _interval(counts[1:] @ is_ood.astype(np.float64) / is_ood.size)


def _interval(values: Scores) -> Interval:
    tail = (1 - INTERVAL_LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def as_jpeg(images: Tensor) -> Tensor:
    """Images after a round trip through JPEG of quality 75 with 4:2:0 colour."""
    encoded = (
        simplejpeg.encode_jpeg(
            image.permute(1, 2, 0).contiguous().numpy(),
            quality=_JPEG_QUALITY,
            colorsubsampling="420",
        )
        for image in images
    )
    decoded = [torch.from_numpy(simplejpeg.decode_jpeg(data)) for data in encoded]
    return torch.stack(decoded).permute(0, 3, 1, 2).contiguous()


def _truth(files: Sequence[Path], labels: Sequence[str]) -> NDArray[np.int64] | None:
    """Class indices, where every file lies in a folder named after a label."""
    classes = {label: index for index, label in enumerate(labels)}
    if not all(file.parent.name in classes for file in files):
        return None
    return np.array([classes[file.parent.name] for file in files])


def _accuracy(inside: Scored, labels: Sequence[str]) -> float | None:
    truth = _truth(inside.files, labels)
    if truth is None:
        return None
    return float(np.mean(inside.detections.logits.argmax(axis=1) == truth))
