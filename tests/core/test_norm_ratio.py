"""NormRatio and block selection against values worked out by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray

from app.core.blocks import Block
from app.core.norm_ratio import BlockSelection, image_norm_ratios, select_block
from app.errors import CalibrationError

A, B, C = (Block(name, "maps") for name in "abc")


def select(ratios: list[list[float]], *blocks: Block, seed: int = 0) -> BlockSelection:
    """The selection from per-image rows of ratios."""
    return select_block(blocks, np.array(ratios, dtype=np.float32), seed=seed)


def test_mean_of_ratios() -> None:
    """NormRatio averages the ratios of the images; it is not the ratio of the averages."""
    norms = np.array([[1.0], [9.0]], dtype=np.float32)
    jigsaw_norms = np.array([[2.0], [3.0]], dtype=np.float32)

    ratios = image_norm_ratios(norms, jigsaw_norms)

    assert ratios.tolist() == [[0.5], [3.0]]
    assert select_block([A], ratios, seed=0).blocks[0].ratio == pytest.approx(1.75)


def test_largest_ratio_wins() -> None:
    """The block of the largest mean is selected, with its margin over the next."""
    selection = select([[1.0, 1.5, 1.1], [1.0, 1.7, 1.3]], A, B, C)

    assert selection.selected == B
    assert selection.margin == pytest.approx(1.6 - 1.2)
    assert [block.block for block in selection.blocks] == ["a", "b", "c"]
    assert selection.images == 2


def test_bootstrap_interval() -> None:
    """The interval is that of the mean: about 1.96 standard errors to each side, and seeded."""
    rows = np.random.default_rng(0).normal(1.5, 0.2, (4000, 2)).astype(np.float32)

    first, again = (select_block([A, B], rows, seed=3) for _ in range(2))
    other = select_block([A, B], rows, seed=4)

    block, column = first.blocks[0], rows[:, 0].astype(np.float64)
    error = 1.96 * column.std() / np.sqrt(len(column))
    assert block.low == pytest.approx(column.mean() - error, abs=0.1 * error)
    assert block.high == pytest.approx(column.mean() + error, abs=0.1 * error)
    assert first == again
    assert first.blocks != other.blocks


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([[0.9, 0.5], [0.9, 0.5]], "no block responds more"),
        ([[1.1, 1.9], [1.9, 1.0]], "overlap"),
        ([[1.5, np.nan], [1.5, 1.0]], "block b was left out"),
        ([[1.5, np.inf], [1.5, 1.0]], "on 1 of 2 images"),
    ],
)
def test_warnings(ratios: list[list[float]], words: str) -> None:
    """A doubtful choice is made, and the doubt is said."""
    selection = select(ratios, A, B)

    assert any(words in warning for warning in selection.warnings)


def test_clear_choice_has_no_warning() -> None:
    """A ratio above 1, apart from the next, needs no warning."""
    assert select([[1.5, 1.1], [1.5, 1.1]], A, B).warnings == ()


def test_silent_block() -> None:
    """A block with a zero norm somewhere is never selected; where all are, nothing is."""
    zero: NDArray[np.float32] = np.zeros((2, 2), dtype=np.float32)
    with pytest.raises(CalibrationError, match="every block"):
        select_block([A, B], image_norm_ratios(zero, zero), seed=0)


def test_too_few_images() -> None:
    """One image has no interval."""
    with pytest.raises(CalibrationError, match="1 selection images; at least 2"):
        select([[1.0]], A)
