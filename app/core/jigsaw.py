"""Jigsaw puzzles of training images: the pseudo-OOD images that block selection looks at."""

import math
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Edge = Literal["keep", "zero"]
"""What becomes of the pixels that no tile covers: their own value, or zero."""

TILES: Final = 3
"""Tiles along each side: 3 x 3 puzzles."""


def draw_permutations(count: int, *, seed: int, tiles: int = TILES) -> NDArray[np.int8]:
    """One permutation for each image, uniform over all but the identity.

    A permutation depends on the seed and the image's position alone, never on the batches the
    images travel in.

    Args:
        count: number of images, ``N``.
        seed: any non-negative integer.
        tiles: tiles along each side, at least 2.

    Returns:
        ``[N, tiles * tiles]``; entry ``j`` names the tile that moves to place ``j``, row-major.
    """
    pieces = tiles * tiles
    # Rank 0 is the identity, so drawing from 1 leaves it out without a second draw.
    ranks = np.random.default_rng(seed).integers(1, math.factorial(pieces), size=count)
    return _unrank(ranks, pieces)


def jigsaw(
    images: Tensor, permutations: NDArray[np.int8], *, tiles: int = TILES, edge: Edge = "keep"
) -> Tensor:
    """Images whose tiles have changed places, each after its own permutation.

    Tiles are ``floor(H / tiles) x floor(W / tiles)`` pixels, counted from the top left corner.

    Args:
        images: preprocessed images ``[B, C, H, W]``.
        permutations: ``[B, tiles * tiles]`` from :func:`draw_permutations`.
        tiles: tiles along each side.
        edge: rows and columns left over at the bottom and the right keep their pixels, or become
            zero as in the code of the paper's authors.

    Returns:
        A new tensor like ``images``.

    Raises:
        ValueError: the image is smaller than one pixel a tile, or the shapes do not fit.
    """
    batch, channels, height, width = images.shape
    if permutations.shape != (batch, tiles * tiles):
        raise ValueError(f"permutations must be {(batch, tiles * tiles)}, got {permutations.shape}")
    tile_height, tile_width = height // tiles, width // tiles
    if min(tile_height, tile_width) == 0:
        raise ValueError(f"image of {height}x{width} pixels has no {tiles} x {tiles} tiles")
    covered = images[:, :, : tiles * tile_height, : tiles * tile_width]
    grid = covered.reshape(batch, channels, tiles, tile_height, tiles, tile_width)
    pieces = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, tiles * tiles, channels, -1)
    order = torch.from_numpy(permutations).to(images.device, torch.int64)
    shuffled = pieces.gather(1, order[:, :, None, None].expand_as(pieces))
    grid = shuffled.view(batch, tiles, tiles, channels, tile_height, tile_width)
    puzzle = images.clone() if edge == "keep" else torch.zeros_like(images)
    puzzle[:, :, : tiles * tile_height, : tiles * tile_width] = grid.permute(
        0, 3, 1, 4, 2, 5
    ).reshape(covered.shape)
    return puzzle


def _unrank(ranks: NDArray[np.int64], size: int) -> NDArray[np.int8]:
    """Permutations ``[N, size]`` of lexicographic rank ``ranks``, by their Lehmer codes."""
    permutations = np.zeros((len(ranks), size), dtype=np.int8)
    for place in reversed(range(size)):
        ranks, permutations[:, place] = np.divmod(ranks, size - place)
    for place in reversed(range(size - 1)):
        later = permutations[:, place + 1 :]
        later += later >= permutations[:, place : place + 1]
    return permutations
