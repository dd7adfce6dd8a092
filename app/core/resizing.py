"""Resizing and cropping as torchvision does them, to the bit, and without torchvision.

Its import takes as long as torch's, for a compiler that nothing here uses; a server or a command
that has no network of its need not wait for it.
"""

import platform
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Interpolation = Literal["bilinear", "bicubic", "nearest"]

_VECTORS: Final = ("AVX2", "AVX512")
_ARM: Final = ("aarch64", "arm64")


def resize(
    image: Tensor,
    side: int,
    *,
    interpolation: Interpolation,
    antialias: bool,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """The image with its shorter side ``side`` pixels long, ``[3, H, W]`` uint8.

    Args:
        image: ``[3, H, W]`` uint8 on the CPU, neither side empty.
        side: in pixels.
        interpolation: how pixels between pixels are made.
        antialias: whether smaller images are of means; the nearest pixel never is one.
        shape: whose proportions are kept; the image's own by default.
    """
    height, width = image.shape[1:]
    shorter, longer = sorted(shape or (height, width))
    long_side = int(side * longer / shorter)
    size = (side, long_side) if height <= width else (long_side, side)
    if size == (height, width):
        return image
    is_nearest = interpolation == "nearest"
    batch = image.reshape(1, *image.shape)
    if batch.is_contiguous(memory_format=torch.channels_last):
        # A stride as in a batch of several: torch then keeps the layout, and is faster.
        batch = batch.as_strided(batch.shape, (batch.numel(), *batch.stride()[1:]))
    is_native = is_nearest or interpolation == "bicubic" or _has_vectors()
    resized: Tensor = interpolate(
        batch if is_native else batch.float(),
        size=size,
        mode=interpolation,
        align_corners=None if is_nearest else False,
        antialias=antialias and not is_nearest,
    )[0]
    return resized if is_native else resized.round_().to(torch.uint8)


def crop_centre(image: Tensor, side: int) -> Tensor:
    """The square in the middle, ``[3, side, side]``; half a pixel too many is left at an even one.

    Args:
        image: ``[3, H, W]``, both sides at least ``side``.
        side: in pixels.
    """
    top, left = (round((length - side) / 2) for length in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def _has_vectors() -> bool:
    """Whether torch resizes bytes bilinearly as bytes; elsewhere they are rounded afterwards."""
    return torch.backends.cpu.get_cpu_capability() in _VECTORS or platform.machine() in _ARM
