"""The dtype of a network: float32 outside, the bundle's inside."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.core.blocks import BlockNorms, find_blocks
from app.core.head import find_head
from app.core.networks import CIFAR_PREPROCESSING, Architecture, build
from app.core.precision import compute_in, dtype_of, on_device
from app.errors import NetworkError
from tests.core.test_detector import detector_of, pictures


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small residual network with random weights, in float32."""
    torch.manual_seed(0)
    return build(Architecture(id="cifar/resnet18", arguments={"width": 4}))


@pytest.fixture(scope="module")
def half(network: nn.Module) -> nn.Module:
    """The same in bfloat16."""
    return compute_in(copy.deepcopy(network), "bfloat16")


def test_float32_is_left_as_it_is(network: nn.Module) -> None:
    """Nothing is hooked or converted."""
    same = compute_in(network, "float32")

    assert same is network
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
    assert dtype_of(network.state_dict()) == "float32"


def test_bfloat16_inside_float32_outside(half: nn.Module) -> None:
    """Every layer computes in bfloat16; images, norms and logits are float32."""
    seen: set[torch.dtype] = set()
    handles = [
        module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        for module in half.modules()
        if not any(True for _ in module.children())
    ]
    images = CIFAR_PREPROCESSING.normalise(pictures(2))
    blocks = find_blocks(half, images[:1])
    logits, norms = BlockNorms(half, blocks).run(images)
    for handle in handles:
        handle.remove()

    assert seen == {torch.bfloat16}
    assert half(images).dtype == logits.dtype == torch.float32
    assert {norm.dtype for norm in norms.values()} == {torch.float32}
    assert dtype_of(half.state_dict()) == "bfloat16"


def test_the_norm_is_summed_in_float32(half: nn.Module) -> None:
    """A FeatureNorm is the definition's, in doubles, of the block's bfloat16 maps."""
    images = CIFAR_PREPROCESSING.normalise(pictures(2))
    block = find_blocks(half, images[:1])[-2]
    maps: list[Tensor] = []
    module = half.get_submodule(block.name)
    handle = module.register_forward_hook(
        lambda module, inputs, output: maps.append(output.detach().double())
    )
    found = BlockNorms(half, [block]).run(images)[1][block.name]
    handle.remove()

    expected = maps[0].clamp_min(0).square().sum(dim=(2, 3)).sqrt().mean(dim=1)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-6)


def test_blocks_and_head_are_those_of_float32(network: nn.Module, half: nn.Module) -> None:
    """What is found by following the data does not depend on the dtype."""
    image = torch.zeros(1, 3, 32, 32)

    assert find_blocks(half, image) == find_blocks(network, image)
    assert find_head(half, image) == find_head(network, image) == "fc"


def test_gate_and_full_answer(half: nn.Module) -> None:
    """Stopped at the block, the norm is the full run's to the last bit."""
    block = find_blocks(half, torch.zeros(1, 3, 32, 32))[-3]
    detector = detector_of(half, block, CIFAR_PREPROCESSING)
    images = pictures(3)

    np.testing.assert_array_equal(detector.judge(images).scores, detector.detect(images).scores)


def test_it_travels(half: nn.Module) -> None:
    """Pickled for another process, it still takes float32 and gives the same logits."""
    images = CIFAR_PREPROCESSING.normalise(pictures(2))

    assert torch.equal(pickle.loads(pickle.dumps(half))(images), half(images))


@pytest.mark.parametrize(
    ("network", "dtype"), [(nn.Conv2d(3, 4, 3).bfloat16(), "float32"), (nn.ReLU(), "bfloat16")]
)
def test_a_network_of_another_dtype(network: nn.Module, dtype: str) -> None:
    """Weights that are not the dtype's are refused."""
    with pytest.raises(NetworkError, match=rf"cannot compute in {dtype}"):
        compute_in(network, dtype)  # type: ignore[arg-type]


def test_layouts(network: nn.Module, half: nn.Module) -> None:
    """What multiplies bfloat16 takes the channels last; float32 stays as it is."""
    for whose, layout in ((network, torch.contiguous_format), (half, torch.channels_last)):
        weight = on_device(copy.deepcopy(whose), "cpu").get_parameter("layer1.0.conv1.weight")

        layouts = (torch.contiguous_format, torch.channels_last)
        assert [one for one in layouts if weight.is_contiguous(memory_format=one)] == [layout]
