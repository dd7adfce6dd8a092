"""Blocks, truncation, half precision and memory format on many families, with random weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from app.core.blocks import Block, BlockNorms, find_blocks
from app.core.detector import BATCH_TOLERANCE
from app.core.feature_norm import feature_norm
from app.core.networks import Architecture, build
from app.errors import NetworkError

pytestmark = pytest.mark.slow

HALF_TOLERANCE = 0.02
"""Largest relative difference between the FeatureNorm of a bf16 run and of an fp32 one."""

# Architecture, number of blocks, the last one.
NETWORKS = [
    ("torchvision/alexnet", 5, "features.11"),
    ("torchvision/squeezenet1_1", 8, "features.12"),
    ("torchvision/shufflenet_v2_x0_5", 18, "conv5"),
    ("torchvision/mobilenet_v2", 19, "features.18"),
    ("torchvision/mobilenet_v3_small", 13, "features.12"),
    ("torchvision/mnasnet0_5", 16, "layers.13.0"),
    ("torchvision/regnet_y_400mf", 17, "trunk_output.block4.block4-5"),
    ("torchvision/efficientnet_b0", 18, "features.8"),
    ("torchvision/googlenet", 12, "inception5b"),
    ("torchvision/densenet121", 7, "features.denseblock4"),
    ("torchvision/resnet18", 8, "layer4.1"),
    ("torchvision/convnext_tiny", 22, "features.7.2"),
    ("torchvision/swin_t", 16, "features.7.1"),
    ("torchvision/swin_v2_t", 16, "features.7.1"),
    ("torchvision/vit_b_32", 12, "encoder.layers.encoder_layer_11"),
    ("timm/vit_tiny_patch16_224", 13, "blocks.11"),
    ("timm/deit_tiny_distilled_patch16_224", 13, "blocks.11"),
    ("timm/mixer_s32_224", 9, "blocks.7"),
    ("timm/convnextv2_atto", 16, "stages.3.blocks.1"),
    ("timm/resnet10t", 7, "layer4.0"),
    ("timm/repvgg_a0", 22, "stages.3.0"),
    ("timm/ghostnet_050", 17, "blocks.9.0"),
    ("timm/mobilevit_xxs", 12, "final_conv"),
    ("timm/mobilenetv3_small_050", 12, "blocks.5.0"),
    ("timm/mobilenetv4_conv_small_035", 17, "blocks.4.0"),
    ("timm/efficientnet_lite0", 16, "blocks.6.0"),
    ("timm/edgenext_xx_small", 16, "stages.3.blocks.1"),
    ("timm/pvt_v2_b0", 12, "stages.3.blocks.1"),
    ("timm/coat_lite_tiny", 12, "serial_blocks4.1"),
    ("timm/levit_128s", 15, "stages.2.blocks.3"),
    ("timm/xcit_nano_12_p16_224", 18, "cls_attn_blocks.1"),
    ("timm/fastvit_t8", 20, "final_conv"),
    ("timm/efficientvit_b0", 17, "head.in_conv"),
    ("timm/hgnetv2_b0", 11, "stages.3.blocks.0"),
    ("timm/dla46_c", 8, "level5"),
]


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda row: row[0])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, int, str]:
    """A network with random weights, one image, and what is expected of its blocks."""
    architecture, count, last = request.param
    torch.manual_seed(0)
    return build(Architecture(id=architecture)), torch.randn(1, 3, 224, 224), count, last


@pytest.fixture(scope="module")
def blocks(case: tuple[nn.Module, Tensor, int, str]) -> tuple[Block, ...]:
    """The blocks found."""
    return find_blocks(case[0], case[1])


def test_blocks(case: tuple[nn.Module, Tensor, int, str], blocks: tuple[Block, ...]) -> None:
    """As many as a person would count, the last one a person would name."""
    assert (len(blocks), blocks[-1].name) == case[2:]


@torch.inference_mode()
def test_truncation_is_exact(
    case: tuple[nn.Module, Tensor, int, str], blocks: tuple[Block, ...]
) -> None:
    """Stopping at a block gives the full run's norm to the bit, and runs no later block."""
    network, images = case[:2]
    _, norms = BlockNorms(network, blocks).run(images)
    ran: list[str] = []
    handles = [
        network.get_submodule(block.name).register_forward_hook(
            lambda *_, name=block.name: ran.append(name)
        )
        for block in blocks
    ]

    try:
        for block in {blocks[0], blocks[len(blocks) // 2], blocks[-2], blocks[-1]}:
            ran.clear()
            early = BlockNorms(network, [block]).run_to_last_block(images)
            assert torch.equal(early[block.name], norms[block.name])
            assert norms[block.name] > 0
            # The last one's own hook comes after the one that stops the run.
            position = blocks.index(block)
            assert set(ran) <= {other.name for other in blocks[: position + 1]}
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def test_channels_last(case: tuple[nn.Module, Tensor, int, str], blocks: tuple[Block, ...]) -> None:
    """The memory format changes the order of sums alone."""
    network, images = case[:2]
    expected = BlockNorms(network, blocks).run(images)[1]
    network.to(memory_format=torch.channels_last)
    try:
        found = BlockNorms(network, blocks).run(
            images.contiguous(memory_format=torch.channels_last)
        )[1]
    finally:
        network.to(memory_format=torch.contiguous_format)

    for name, norm in expected.items():
        torch.testing.assert_close(found[name], norm, rtol=10 * BATCH_TOLERANCE["float32"], atol=0)


@torch.inference_mode()
def test_half_precision(
    case: tuple[nn.Module, Tensor, int, str], blocks: tuple[Block, ...]
) -> None:
    """In bf16 the norm at every block stays within the tolerance, and is float32."""
    network, images = case[:2]
    expected = BlockNorms(network, blocks).run(images)[1]
    half = copy.deepcopy(network).bfloat16()
    found = BlockNorms(half, blocks).run_to_last_block(images.bfloat16())

    for name, norm in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], norm, rtol=HALF_TOLERANCE, atol=0)


def test_families() -> None:
    """At least 25 networks of 15 families."""
    families = {name.partition("/")[2].partition("_")[0] for name, *_ in NETWORKS}

    assert len(NETWORKS) >= 25
    assert len(families) >= 15


@pytest.mark.parametrize(
    "architecture",
    [
        # Two branches of tokens from the image to the logits: no module sees all.
        "timm/crossvit_tiny_240",
    ],
)
def test_no_common_block(architecture: str) -> None:
    """A network whose branches meet only behind the maps is refused with the reason."""
    network = build(Architecture(id=architecture))

    with pytest.raises(NetworkError, match=r"no block .* that every path from the image"):
        find_blocks(network, torch.randn(1, 3, 240, 240))


def test_a_perceptron_is_refused() -> None:
    """A network with no spatial maps has nothing to read; FeatureNorm needs positions."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))

    with pytest.raises(NetworkError, match="no block with spatial maps or tokens"):
        find_blocks(network.eval(), torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"activation must be \[B, C, H, W\]"):
        feature_norm(torch.ones(2, 16))
