"""Jigsaw puzzles: tiles move as told, nothing is lost, nobody keeps the identity."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.jigsaw import Edge, draw_permutations, jigsaw


def test_tiles_move_as_the_permutation_says() -> None:
    """Place j gets tile permutation[j], tiles counted row by row."""
    # Each 2 x 2 tile of a 6 x 6 image is filled with its own number.
    image = torch.arange(9.0).view(3, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    permutation = np.array([[8, 0, 1, 2, 3, 4, 5, 7, 6]], dtype=np.int8)

    puzzle = jigsaw(image[None, None], permutation)

    assert puzzle[0, 0, ::2, ::2].flatten().tolist() == [8, 0, 1, 2, 3, 4, 5, 7, 6]
    assert puzzle[0, 0, 1::2, 1::2].flatten().tolist() == [8, 0, 1, 2, 3, 4, 5, 7, 6]


@pytest.mark.parametrize(("edge", "expected"), [("keep", 1.0), ("zero", 0.0)])
def test_pixels_that_no_tile_covers(edge: Edge, expected: float) -> None:
    """A 32-pixel image has 10-pixel tiles; the last two rows and columns are kept or zero."""
    images = torch.ones(2, 3, 32, 32)

    puzzles = jigsaw(images, draw_permutations(2, seed=0), edge=edge)

    assert (puzzles[:, :, 30:] == expected).all()
    assert (puzzles[:, :, :, 30:] == expected).all()
    assert (puzzles[:, :, :30, :30] == 1).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 20), st.integers(3, 20), st.integers(0, 2**31))
def test_pixels_are_kept(height: int, width: int, seed: int) -> None:
    """With ``keep`` a puzzle has the pixels of its image, each exactly once; the image is left."""
    images = torch.arange(2.0 * 3 * height * width).view(2, 3, height, width)
    before = images.clone()

    puzzles = jigsaw(images, draw_permutations(2, seed=seed))

    assert torch.equal(puzzles.flatten(2).sort(2).values, images.flatten(2))
    assert torch.equal(images, before)


def test_permutations() -> None:
    """Every row is a permutation and none the identity, over many draws."""
    permutations = draw_permutations(100_000, seed=1)

    assert (np.sort(permutations, axis=1) == np.arange(9)).all()
    assert not (permutations == np.arange(9)).all(axis=1).any()
    # Each place sees each tile in a ninth of the draws; 5 standard deviations is 0.005.
    for place in range(9):
        shares = np.bincount(permutations[:, place], minlength=9) / len(permutations)
        assert shares == pytest.approx(np.full(9, 1 / 9), abs=0.005)


def test_all_permutations_but_the_identity() -> None:
    """With 2 x 2 tiles all 23 other permutations are drawn, equally often."""
    drawn = draw_permutations(23_000, seed=0, tiles=2)

    rows, counts = np.unique(drawn, axis=0, return_counts=True)

    assert len(rows) == 23
    assert counts.min() > 800
    assert counts.max() < 1200


def test_permutations_depend_on_seed_and_position_alone() -> None:
    """The first images of a longer list have the same puzzles; another seed has others."""
    assert (draw_permutations(1000, seed=7)[:100] == draw_permutations(100, seed=7)).all()
    assert (draw_permutations(100, seed=7) != draw_permutations(100, seed=8)).any()


@pytest.mark.parametrize("shape", [(1, 3, 2, 9), (2, 3, 9, 9)])
def test_refusals(shape: tuple[int, ...]) -> None:
    """An image without room for the tiles, or a permutation too few, is refused."""
    with pytest.raises(ValueError, match=r"tiles|permutations"):
        jigsaw(torch.zeros(shape), draw_permutations(1, seed=0))
