"""Resizing and cropping: torchvision's, to the bit."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from app.core.resizing import Interpolation, crop_centre, resize

ROOT: Final = Path(__file__).resolve().parents[2]
SIZES: Final = ((32, 32), (31, 33), (100, 64), (64, 101), (3, 200), (333, 250), (1, 1))
SIDES: Final = (2, 8, 32, 33, 64)
LAYOUTS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "decoded": lambda pixels: pixels.permute(2, 0, 1),
    "rotated": lambda pixels: pixels.permute(2, 1, 0),
    "part": lambda pixels: pixels[: -(len(pixels) // 3) or None, :, :].permute(2, 0, 1),
    "planes": lambda pixels: pixels.permute(2, 0, 1).contiguous(),
}


def picture(height: int, width: int) -> Tensor:
    """``[H, W, 3]`` uint8 noise."""
    generator = np.random.default_rng(height * 1000 + width)
    return torch.from_numpy(generator.integers(256, size=(height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("antialias", [True, False])
def test_resize(layout: str, interpolation: Interpolation, antialias: bool) -> None:
    """Larger or smaller, however the pixels lie: the same bytes in the same layout."""
    for (height, width), side in itertools.product(SIZES, SIDES):
        image = LAYOUTS[layout](picture(height, width))

        pixels = image.permute(1, 2, 0).numpy()
        found = resize(pixels, side, interpolation=interpolation, antialias=antialias)

        expected = transforms.resize(
            image, [side], interpolation=InterpolationMode(interpolation), antialias=antialias
        )
        assert found.dtype == np.uint8
        assert layout != "decoded" or found.transpose(1, 2, 0).flags.c_contiguous
        np.testing.assert_array_equal(found, expected, f"{height}x{width} to {side}")


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_resize_on_other_processors(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    """Where torch has no vectors for bytes, they are rounded from numbers, as torchvision does."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    image = picture(100, 64)

    found = resize(image.numpy(), 32, interpolation="bilinear", antialias=True)

    np.testing.assert_array_equal(found, transforms.resize(image.permute(2, 0, 1), [32]))


def test_crop_centre() -> None:
    """Odd or even, the middle is torchvision's."""
    for height, width, side in itertools.product(range(5, 9), range(5, 9), range(1, 6)):
        image = picture(height, width).permute(2, 0, 1)

        found = crop_centre(image.numpy(), side)
        np.testing.assert_array_equal(found, transforms.center_crop(image, [side, side]))


def test_the_bundled_model_needs_no_torchvision() -> None:
    """A server of it starts without the import, which takes as long as torch's."""
    code = (
        "import sys, app.server; from pathlib import Path; from app.store import Store; "
        "Store(Path('model_store')).load('cifar10-resnet18').detector(); "
        "print({'torchvision', 'torch._dynamo'} & sys.modules.keys())"
    )

    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert said.stdout == "set()\n"
