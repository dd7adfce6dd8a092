"""How well a bundle tells ID from OOD images, beside the classic scores of the same network."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.special import logsumexp
from scipy.stats import mannwhitneyu
from torch import Tensor

from app.core.detector import Detections
from app.core.images import DEFAULT_MAX_PIXELS
from app.offline.progress import Progress
from app.offline.reading import ImageFolder, tracked
from app.store import LoadedBundle

Codec = Literal["raw", "jpeg75"]
Scores = NDArray[np.float64]

RECALL: Final = 0.95
_JPEG_QUALITY: Final = 75


class DataSetResult(BaseModel):
    """One score on one OOD data set; ID counts as positive, as in the paper."""

    model_config = ConfigDict(frozen=True)

    auroc: float
    fpr95: float
    """Share of OOD images accepted when 95 % of the ID images are kept."""


class Evaluation(BaseModel):
    """What :func:`evaluate` measured."""

    model_config = ConfigDict(frozen=True)

    bundle: str
    codec: Codec
    id_images: int
    ood_images: dict[str, int]
    false_alarm_rate: float
    """Share of the ID images below the bundle's threshold."""
    false_alarms_promised: tuple[float, float]
    """The interval the bundle gives for the false-alarm rate."""
    detection_rate: dict[str, float]
    """Share of each OOD data set below the bundle's threshold."""
    accuracy: float | None
    """Of the classifier on the ID images, where they lie in folders named after its labels."""
    results: dict[str, dict[str, DataSetResult]]
    """By score, then by data set."""


def auroc(id_scores: Scores, ood_scores: Scores) -> float:
    """The chance that an ID image scores above an OOD image, ties counting half."""
    u = mannwhitneyu(id_scores, ood_scores, method="asymptotic").statistic
    return float(u) / (len(id_scores) * len(ood_scores))


def fpr95(id_scores: Scores, ood_scores: Scores) -> float:
    """Share of OOD images accepted at the highest threshold that keeps 95 % of ID images."""
    kept = int(np.ceil(RECALL * len(id_scores)))
    threshold = np.sort(id_scores)[len(id_scores) - kept]
    return float(np.mean(ood_scores >= threshold))


SCORES: Final[Mapping[str, Callable[[Detections], Scores]]] = {
    "feature_norm": lambda detections: detections.feature_norms.astype(np.float64),
    "msp": lambda detections: _log_msp(detections.logits.astype(np.float64)),
    "energy": lambda detections: np.asarray(
        logsumexp(detections.logits.astype(np.float64), axis=1)
    ),
}
"""Higher means more in-distribution. MSP is kept as a logarithm: the order is the same, and
probabilities that all round to 1 stay apart."""


def evaluate(
    loaded: LoadedBundle,
    *,
    id_images: Path,
    ood_images: Mapping[str, Path],
    progress: Progress,
    codec: Codec = "raw",
    batch_size: int = 64,
    device: str = "cpu",
) -> Evaluation:
    """Score every image once and compare ID with each OOD data set.

    Args:
        loaded: the bundle.
        id_images: ID images used neither for training nor for calibration.
        ood_images: a folder for each OOD data set.
        progress: told how far it is.
        codec: ``jpeg75`` re-encodes the resized OOD images as the ID images were.
        batch_size: images in one forward pass.
        device: where the network runs.

    Raises:
        CalibrationError: a folder holds no readable images.
        BundleError: the network cannot be built.
    """
    run = _Run(loaded, batch_size=batch_size, device=device, progress=progress)
    inside, files = run.detect("ID", id_images, codec="raw")
    outside = {
        name: run.detect(name, folder, codec=codec)[0] for name, folder in ood_images.items()
    }
    interval = loaded.bundle.threshold.false_alarm_rate
    return Evaluation(
        bundle=f"{loaded.bundle.name}/{loaded.bundle.version}",
        codec=codec,
        id_images=len(inside.scores),
        ood_images={name: len(detections.scores) for name, detections in outside.items()},
        false_alarm_rate=float(inside.is_ood.mean()),
        false_alarms_promised=(interval.low, interval.high),
        detection_rate={name: float(found.is_ood.mean()) for name, found in outside.items()},
        accuracy=_accuracy(inside, files, loaded.bundle.labels),
        results={
            name: {
                data_set: DataSetResult(
                    auroc=auroc(score(inside), score(found)),
                    fpr95=fpr95(score(inside), score(found)),
                )
                for data_set, found in outside.items()
            }
            for name, score in SCORES.items()
        },
    )


class _Run:
    """One detector, run over several folders."""

    def __init__(
        self, loaded: LoadedBundle, *, batch_size: int, device: str, progress: Progress
    ) -> None:
        self._detector = loaded.detector(device=device)
        self._preprocessing = loaded.bundle.preprocessing
        self._batch_size = batch_size
        self._progress = progress

    def detect(self, title: str, folder: Path, *, codec: Codec) -> tuple[Detections, list[Path]]:
        """The detections of all readable images of a folder, and the images' files."""
        images = ImageFolder.find(folder)
        parts: list[Detections] = []
        files: list[Path] = []
        batches = images.batches(
            self._preprocessing, batch_size=self._batch_size, max_pixels=DEFAULT_MAX_PIXELS
        )
        for batch in tracked(
            batches, title=title, total=len(images.files), progress=self._progress
        ):
            prepared = batch.images if codec == "raw" else _as_jpeg(batch.images)
            parts.append(self._detector.detect(prepared))
            files.extend(images.files[i] for i in batch.indices)
        return _joined(parts), files


def _as_jpeg(images: Tensor) -> Tensor:
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


def _joined(parts: list[Detections]) -> Detections:
    return Detections(
        logits=np.concatenate([part.logits for part in parts]),
        feature_norms=np.concatenate([part.feature_norms for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        p_values=np.concatenate([part.p_values for part in parts]),
        is_ood=np.concatenate([part.is_ood for part in parts]),
    )


def _log_msp(logits: Scores) -> Scores:
    return np.asarray(logits.max(axis=1) - logsumexp(logits, axis=1))


def _accuracy(inside: Detections, files: list[Path], labels: tuple[str, ...]) -> float | None:
    classes = {label: index for index, label in enumerate(labels)}
    if not all(file.parent.name in classes for file in files):
        return None
    truth = np.array([classes[file.parent.name] for file in files])
    return float(np.mean(inside.logits.argmax(axis=1) == truth))
