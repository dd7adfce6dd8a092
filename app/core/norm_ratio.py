"""NormRatio and the choice of the block: which one tells training images from their puzzles.

Yu et al., CVPR 2023 (arXiv:2212.02295), section 4.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from app.core.blocks import Block
from app.core.feature_norm import Layout
from app.errors import CalibrationError

RESAMPLES: Final = 1000
CONFIDENCE_LEVEL: Final = 0.95


class NormRatio(BaseModel):
    """NormRatio of one block with its bootstrap interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block: str
    layout: Layout
    ratio: float
    low: float
    high: float


class BlockSelection(BaseModel):
    """The NormRatio of every block, in execution order; the largest selects the block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: tuple[NormRatio, ...]
    margin: float | None = Field(description="Over the runner-up; None when there is one block.")
    confidence_level: float
    resamples: int
    images: int
    warnings: tuple[str, ...]

    @property
    def selected(self) -> Block:
        """The block with the largest ratio, the first of equals."""
        best = max(self.blocks, key=lambda block: block.ratio)
        return Block(best.block, best.layout)


def image_norm_ratios(
    norms: NDArray[np.float32], jigsaw_norms: NDArray[np.float32]
) -> NDArray[np.float32]:
    """``f(x; B) / f(jigsaw(x); B)`` for each image and block; NaN where both norms are zero.

    Args:
        norms: FeatureNorms of the images, ``[N, blocks]``.
        jigsaw_norms: FeatureNorms of their puzzles, ``[N, blocks]``.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: NDArray[np.float32] = norms / jigsaw_norms
    return ratios


def select_block(
    candidates: Sequence[Block],
    ratios: NDArray[np.float32],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> BlockSelection:
    """The block whose mean ratio is largest.

    Args:
        candidates: the blocks in execution order.
        ratios: per-image ratios ``[N, blocks]`` from :func:`image_norm_ratios`.
        seed: of the bootstrap.
        resamples: bootstrap resamples of the images.

    Raises:
        CalibrationError: fewer than two images, or no block with finite ratios.
    """
    if len(ratios) < 2:
        raise CalibrationError(f"{len(ratios)} selection images; at least 2 are needed")
    silent: NDArray[np.bool_] = np.logical_not(np.isfinite(ratios).all(axis=0))
    if silent.all():
        raise CalibrationError("every block has zero or non-finite norms on some image")
    responsive = [
        block for block, is_silent in zip(candidates, silent, strict=True) if not is_silent
    ]
    blocks = _with_intervals(responsive, ratios[:, ~silent], seed=seed, resamples=resamples)
    ranked = sorted(blocks, key=lambda block: block.ratio, reverse=True)
    return BlockSelection(
        blocks=blocks,
        margin=ranked[0].ratio - ranked[1].ratio if len(ranked) > 1 else None,
        confidence_level=CONFIDENCE_LEVEL,
        resamples=resamples,
        images=len(ratios),
        warnings=(*_silent_warnings(candidates, ratios), *_selection_warnings(ranked)),
    )


def _with_intervals(
    candidates: Sequence[Block], ratios: NDArray[np.float32], *, seed: int, resamples: int
) -> tuple[NormRatio, ...]:
    wide = ratios.astype(np.float64)
    means = wide.mean(axis=0)
    if np.ptp(wide, axis=0).max() == 0:
        low = high = means
    else:
        # Not at the top: its import takes a quarter of torch's, and a server needs none of it.
        from scipy.stats import bootstrap

        # One resample at a time keeps the memory at a few copies of the ratios.
        interval = bootstrap(
            (wide,),
            np.mean,
            axis=0,
            batch=1,
            n_resamples=resamples,
            confidence_level=CONFIDENCE_LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = interval.low, interval.high
    return tuple(
        NormRatio(
            block=block.name,
            layout=block.layout,
            ratio=float(mean),
            low=float(lowest),
            high=float(highest),
        )
        for block, mean, lowest, highest in zip(candidates, means, low, high, strict=True)
    )


def _silent_warnings(candidates: Sequence[Block], ratios: NDArray[np.float32]) -> list[str]:
    counts = np.count_nonzero(~np.isfinite(ratios), axis=0)
    return [
        f"block {block.name} was left out: its norm is zero or not finite on {count} of "
        f"{len(ratios)} images"
        for block, count in zip(candidates, counts, strict=True)
        if count
    ]


def _selection_warnings(ranked: Sequence[NormRatio]) -> list[str]:
    best, warnings = ranked[0], []
    if best.ratio <= 1:
        warnings.append(
            f"the largest NormRatio is {best.ratio:.4f} (block {best.block}): no block responds "
            "more to the images than to their jigsaw puzzles"
        )
    if len(ranked) > 1 and ranked[1].high >= best.low:
        warnings.append(
            f"the intervals of {best.block} ({best.low:.4f} to {best.high:.4f}) and "
            f"{ranked[1].block} ({ranked[1].low:.4f} to {ranked[1].high:.4f}) overlap: more "
            "selection images may change the choice"
        )
    return warnings
