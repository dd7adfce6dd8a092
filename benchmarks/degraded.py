"""False alarms on ID images that something has happened to: noise, blur, darkness, compression.

Such images are not exchangeable with the threshold images, and nothing is promised about them::

    python -m benchmarks.degraded --bundle cifar10-resnet18
"""

import argparse
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from app.core.images import Preprocessing, decode
from app.offline.tables import markdown_table
from app.store import Store
from benchmarks.datasets import cifar10_split

Picture = Image.Image


def noisy(deviation: float) -> Callable[[Picture], Picture]:
    """Gaussian noise of this standard deviation, in steps of 8-bit colour."""
    generator = np.random.default_rng(0)

    def change(picture: Picture) -> Picture:
        pixels = np.asarray(picture) + generator.normal(0, deviation, (*picture.size[::-1], 3))
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

    return change


def compressed(quality: int) -> Callable[[Picture], Picture]:
    """Encoded as JPEG once more."""

    def change(picture: Picture) -> Picture:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return change


CHANGES: Final[Mapping[str, Callable[[Picture], Picture]]] = {
    "as it is": lambda picture: picture,
    "noise, deviation 5": noisy(5),
    "noise, deviation 20": noisy(20),
    "Gaussian blur, radius 0.7": lambda picture: picture.filter(ImageFilter.GaussianBlur(0.7)),
    "Gaussian blur, radius 1.5": lambda picture: picture.filter(ImageFilter.GaussianBlur(1.5)),
    "half as bright": lambda picture: ImageEnhance.Brightness(picture).enhance(0.5),
    "half the contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(0.5),
    "JPEG quality 30": compressed(30),
    "JPEG quality 10": compressed(10),
}


def main() -> None:
    """Print the false alarms and the accuracy under every change."""
    options = _parse_arguments()
    loaded = Store(options.model_store).load(options.bundle)
    detector, labels = loaded.detector(), loaded.bundle.labels
    files = sorted(cifar10_split()[2].rglob("*.jpg"))
    files = files[:: max(1, len(files) // options.images)]
    truth = np.array([labels.index(file.parent.name) for file in files])
    pictures = [Image.fromarray(decode(file.read_bytes())) for file in files]
    rows = []
    for name, change in CHANGES.items():
        images = _prepared(map(change, pictures), loaded.bundle.preprocessing)
        parts = [detector.detect(batch) for batch in images.split(64)]
        is_ood = np.concatenate([part.is_ood for part in parts])
        predicted = np.concatenate([part.logits.argmax(axis=1) for part in parts])
        rows.append([name, f"{is_ood.mean():.1%}", f"{(predicted == truth).mean():.1%}"])
    print(f"{len(files)} test images\n")
    print("\n".join(markdown_table(["the images", "false alarms", "accuracy"], rows)))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", default="cifar10-resnet18")
    parser.add_argument("--model-store", type=Path, default=Path("model_store"))
    parser.add_argument("--images", type=int, default=2_000)
    return parser.parse_args()


def _prepared(pictures: "map[Picture]", preprocessing: Preprocessing) -> Tensor:
    return torch.stack(
        [preprocessing.resize_and_crop(np.array(picture.convert("RGB"))) for picture in pictures]
    )


if __name__ == "__main__":
    main()
