"""FeatureNorm against its definition."""

import numpy as np
import pytest
import torch
from torch import Tensor

from app.core.feature_norm import Layout, feature_norm


def test_constant_maps() -> None:
    """A map filled with v has norm v * sqrt(H * W); negative maps count as zero."""
    activation = torch.stack([torch.full((4, 4), 3.0), torch.full((4, 4), -1.0)])[None]

    assert feature_norm(activation).tolist() == [6.0]


def test_definition() -> None:
    """Random maps give the mean over channels of sqrt(sum of squares of the positive part)."""
    maps = np.random.default_rng(0).normal(size=(5, 7, 6, 4)).astype(np.float32)
    expected = np.sqrt((np.maximum(maps, 0) ** 2).sum(axis=(2, 3))).mean(axis=1)

    assert feature_norm(torch.from_numpy(maps)).numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "activation"),
    [
        ("channels_last", torch.randn(2, 4, 5, 3)),
        ("tokens", torch.randn(2, 20, 3)),
    ],
)
def test_layouts(layout: Layout, activation: Tensor) -> None:
    """Channels-last maps and tokens score as the same numbers arranged as maps."""
    maps = activation.reshape(2, -1, 3).transpose(1, 2).reshape(2, 3, 4, 5)

    assert torch.allclose(feature_norm(activation, layout=layout), feature_norm(maps))


def test_half_precision_is_summed_in_single() -> None:
    """The score of bf16 maps is float32, and exact where bf16 sums would not be."""
    activation = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)

    norm = feature_norm(activation)

    assert norm.dtype == torch.float32
    assert norm.tolist() == [64.0]


@pytest.mark.parametrize(("layout", "shape"), [("maps", (2, 3, 4)), ("tokens", (2, 3, 4, 5))])
def test_wrong_shapes(layout: Layout, shape: tuple[int, ...]) -> None:
    """A shape that does not fit the layout is named."""
    with pytest.raises(ValueError, match=r"activation must be \[B"):
        feature_norm(torch.zeros(shape), layout=layout)
