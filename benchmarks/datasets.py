"""The research images the benchmarks read: zip archives, unpacked once into ``build/data``.

``NORMGATE_DATA`` names the folder that holds ``cifar10.zip`` and the others; by default
``../shared/data`` beside the project. The images are for research and are never committed.
"""

import os
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
UNPACKED: Final = ROOT / "build" / "data"
HELD_OUT_PER_CLASS: Final = 500
SPLIT_SEED: Final = 20221205


def archive_folder() -> Path:
    """Where the zip archives lie."""
    return Path(os.environ.get("NORMGATE_DATA", ROOT.parent / "shared" / "data"))


def unpack(name: str, *, under: Path = UNPACKED) -> Path:
    """The folder of data set ``name``, unpacked from ``<name>.zip`` when it is not there yet.

    CIFAR-10's training images are split on the way, see :func:`cifar10_split`.

    Raises:
        FileNotFoundError: the archive is missing; the message names it.
    """
    folder = under / name
    if folder.exists():
        return folder
    archive = archive_folder() / f"{name}.zip"
    if not archive.exists():
        raise FileNotFoundError(f"{archive} does not exist; set NORMGATE_DATA to its folder")
    under.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=under) as partial:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(partial)
        if name == "cifar10":
            _hold_out(Path(partial, name, "train"), Path(partial, name, "held_out"))
        Path(partial, name).rename(folder)
    return folder


def cifar10_split(*, under: Path = UNPACKED) -> tuple[Path, Path, Path]:
    """CIFAR-10 as three folders: ``train`` (45,000), ``held_out`` (5,000) and ``test`` (10,000).

    The held-out images are drawn from the training images, 500 a class, with a fixed seed: the
    classifier never sees them, so that they can set its threshold.
    """
    folder = unpack("cifar10", under=under)
    return folder / "train", folder / "held_out", folder / "test"


def _hold_out(train: Path, held_out: Path) -> None:
    chooser = random.Random(SPLIT_SEED)
    for class_folder in sorted(train.iterdir()):
        (held_out / class_folder.name).mkdir(parents=True)
        for file in chooser.sample(sorted(class_folder.iterdir()), HELD_OUT_PER_CLASS):
            file.rename(held_out / class_folder.name / file.name)


if __name__ == "__main__":
    for data_set in ("cifar10", "svhn", "textures", "mnist", "tiny_imagenet32", "photos"):
        print(unpack(data_set))
