"""FeatureNorm: how strongly one block of a network responds to an image."""

from typing import Final, Literal

import torch
from torch import Tensor

Layout = Literal["maps", "channels_last", "tokens"]
"""Where an activation keeps its channels: ``[B, C, H, W]``, ``[B, H, W, C]`` or ``[B, N, C]``."""

_SPATIAL_DIMENSIONS: Final[dict[Layout, tuple[int, ...]]] = {
    "maps": (2, 3),
    "channels_last": (1, 2),
    "tokens": (1,),
}
_SHAPES: Final[dict[Layout, str]] = {
    "maps": "[B, C, H, W]",
    "channels_last": "[B, H, W, C]",
    "tokens": "[B, N, C]",
}


def feature_norm(activation: Tensor, *, layout: Layout = "maps") -> Tensor:
    """Mean over channels of the L2 norm of each rectified feature map.

    Yu et al., CVPR 2023 (arXiv:2212.02295), section 3. Higher means more in-distribution.

    Args:
        activation: output of one block, of any float dtype.
        layout: ``"maps"`` is ``[B, C, H, W]``, ``"channels_last"`` (Swin) is ``[B, H, W, C]``,
            ``"tokens"`` (ViT) is ``[B, N, C]``; a class token counts like any other.

    Returns:
        ``[B]`` float32 scores, >= 0, on the activation's device.

    Raises:
        ValueError: ``activation`` has not the layout's number of dimensions.
    """
    spatial = _SPATIAL_DIMENSIONS[layout]
    if activation.ndim != len(spatial) + 2:
        raise ValueError(
            f"activation must be {_SHAPES[layout]} for layout {layout!r}, "
            f"got {tuple(activation.shape)}"
        )
    # fp32 whatever dtype ran the block: the threshold was set on fp32 scores.
    rectified = activation.float().relu()
    norms: Tensor = torch.linalg.vector_norm(rectified, dim=spatial)
    return norms.mean(dim=1)
