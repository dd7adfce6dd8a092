"""Resizing and cropping as torchvision does them, to the bit, and without torchvision.

Its import takes as long as torch's, for a compiler that nothing here uses; a server or a command
that has no network of its need not wait for it.
"""

import platform
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

Pixels = NDArray[np.uint8]
"""A decoded image: ``[H, W, 3]`` uint8 RGB."""
Planes = NDArray[np.uint8]
"""The same as ``[3, H, W]``."""
Interpolation = Literal["bilinear", "bicubic", "nearest"]

_VECTORS: Final = ("AVX2", "AVX512")
_ARM: Final = ("aarch64", "arm64")


def resize(
    pixels: Pixels,
    side: int,
    *,
    interpolation: Interpolation,
    antialias: bool,
    shape: tuple[int, int] | None = None,
) -> Planes:
    """The image with its shorter side ``side`` pixels long; a view of it where it is already.

    Args:
        pixels: ``[H, W, 3]`` uint8, neither side empty.
        side: in pixels.
        interpolation: how pixels between pixels are made.
        antialias: whether smaller images are of means; the nearest pixel never is one.
        shape: whose proportions are kept; the image's own by default.
    """
    height, width, channels = pixels.shape
    shorter, longer = sorted(shape or (height, width))
    long_side = int(side * longer / shorter)
    size = (side, long_side) if height <= width else (long_side, side)
    if size == (height, width):
        return pixels.transpose(2, 0, 1)
    is_nearest = interpolation == "nearest"
    # By numpy: each of torch's views lets the interpreter's lock go. The stride is that of a batch
    # of several: torch then keeps the layout, and is faster.
    batch = torch.from_numpy(pixels.reshape(1, height, width, channels).transpose(0, 3, 1, 2))
    is_native = is_nearest or interpolation == "bicubic" or _has_vectors()
    resized: Tensor = interpolate(
        batch if is_native else batch.float(),
        size=size,
        mode=interpolation,
        align_corners=None if is_nearest else False,
        antialias=antialias and not is_nearest,
    )
    found: Planes = (resized if is_native else resized.round_().to(torch.uint8)).numpy()[0]
    return found


def crop_centre(image: Planes, side: int) -> Planes:
    """The square in the middle, ``[3, side, side]``; half a pixel too many is left at an even one.

    Args:
        image: both sides at least ``side``.
        side: in pixels.
    """
    top, left = (round((length - side) / 2) for length in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def _has_vectors() -> bool:
    """Whether torch resizes bytes bilinearly as bytes; elsewhere they are rounded afterwards."""
    return torch.backends.cpu.get_cpu_capability() in _VECTORS or platform.machine() in _ARM
