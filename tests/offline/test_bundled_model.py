"""The bundled model keeps its promise on images that neither made it nor set its threshold."""

import math
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from app.core.images import load
from app.offline.evaluate import as_jpeg
from app.store import LoadedBundle, Store
from benchmarks.datasets import archive_folder
from tests.test_server import STORE

BATCH_SIZE: Final = 64


@pytest.fixture(scope="module")
def loaded() -> LoadedBundle:
    """The bundle as it ships."""
    return Store(STORE).load("cifar10-resnet18")


def images_in(
    loaded: LoadedBundle, name: str, *, below: str = ""
) -> Iterator[tuple[list[str], Tensor]]:
    """A data set's images below a folder of it, in batches, with the folders that they lie in."""
    path = archive_folder() / f"{name}.zip"
    if not path.exists():
        pytest.skip(f"{path} does not exist; set NORMGATE_DATA to its folder")
    with zipfile.ZipFile(path) as archive:
        files = [file for file in archive.namelist() if file.startswith(f"{name}/{below}")]
        for start in range(0, len(files), BATCH_SIZE):
            some = files[start : start + BATCH_SIZE]
            images = [load(archive.read(file), loaded.bundle.preprocessing) for file in some]
            yield [PurePosixPath(file).parent.name for file in some], torch.stack(images)


@pytest.mark.slow
def test_the_bundled_model_keeps_its_promise(loaded: LoadedBundle) -> None:
    """On CIFAR-10's test images the false alarms are as promised, and SVHN is told apart.

    The bundle's interval is for the rate itself; 10,000 images measure it with a binomial error.
    SVHN's images are coded as the others, so that nothing else tells them apart.
    """
    detector, labels = loaded.detector(), loaded.bundle.labels
    scores, is_alarm, is_right = [], [], []
    for classes, images in images_in(loaded, "cifar10", below="test/"):
        found = detector.detect(images)
        scores += found.scores.tolist()
        is_alarm += found.is_ood.tolist()
        is_right += [
            labels[i] == name for i, name in zip(found.logits.argmax(1), classes, strict=True)
        ]
    outside = [
        score
        for _, images in images_in(loaded, "svhn")
        for score in detector.detect(as_jpeg(images)).scores.tolist()
    ]

    n, promised = len(scores), loaded.bundle.threshold.false_alarm_rate
    assert n == 10_000
    assert (
        promised.low - 1.96 * math.sqrt(promised.low * (1 - promised.low) / n)
        <= np.mean(is_alarm)
        <= promised.high + 1.96 * math.sqrt(promised.high * (1 - promised.high) / n)
    )
    assert np.mean(is_right) > 0.85
    is_inside = [True] * n + [False] * len(outside)
    assert roc_auc_score(is_inside, [*scores, *outside]) > 0.9
