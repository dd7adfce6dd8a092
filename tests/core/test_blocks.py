"""Candidate blocks: those a person would name, in execution order."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from app.core import cifar
from app.core.blocks import Block, BlockNorms, find_blocks
from app.core.feature_norm import feature_norm
from app.core.networks import Architecture, build
from app.errors import NetworkError


def names(network: nn.Module, *, side: int, pattern: str | None = None) -> list[str]:
    """The names of the blocks found on an image of ``side`` pixels."""
    blocks = find_blocks(network.eval(), torch.randn(1, 3, side, side), pattern=pattern)
    return [block.name for block in blocks]


class FunctionalNetwork(nn.Module):
    """A plain network whose activations are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        maps = functional.relu(self.norm(self.first(images)), inplace=True)
        maps = functional.relu(self.second(maps), inplace=True)
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


class Residual(nn.Module):
    """Adds its input; the rest of the network overwrites its output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps."""
        added: Tensor = maps + self.inner(maps)
        return added


def residual_network() -> nn.Sequential:
    """Two residual blocks with an in-place activation between them."""
    return nn.Sequential(
        Residual(), nn.ReLU(inplace=True), Residual(), nn.Flatten(), nn.Linear(3 * 64, 2)
    )


def stages(*counts: int) -> list[str]:
    """``layer1.0`` and so on, as torchvision's residual networks call them."""
    return [f"layer{i + 1}.{j}" for i, count in enumerate(counts) for j in range(count)]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: cifar.ResNet18(width=4), stages(2, 2, 2, 2)),
        (
            lambda: cifar.WideResNet28x10(widen_factor=1),
            [f"block{i}.{j}" for i in (1, 2, 3) for j in range(4)],
        ),
        (
            lambda: cifar.VGG11(width=8),
            [f"features.{i}" for i in (2, 6, 10, 13, 17, 20, 24, 27)],
        ),
    ],
)
def test_cifar_networks(make: Callable[[], nn.Module], expected: Sequence[str]) -> None:
    """The paper's CIFAR networks: 8 residual blocks, 12 wide ones, 8 convolutions."""
    assert names(make(), side=32) == expected


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("resnet50", stages(3, 4, 6, 3)),
        ("vgg16", [f"features.{i}" for i in (1, 3, 6, 8, 11, 13, 15, 18, 20, 22, 25, 27, 29)]),
        ("mobilenet_v3_large", [f"features.{i}" for i in range(17)]),
        (
            "efficientnet_b0",
            [
                "features.0",
                *(
                    f"features.{i + 1}.{j}"
                    for i, count in enumerate((1, 2, 2, 3, 3, 4, 1))
                    for j in range(count)
                ),
                "features.8",
            ],
        ),
        (
            "densenet121",
            [
                "features.denseblock1",
                "features.transition1",
                "features.denseblock2",
                "features.transition2",
                "features.denseblock3",
                "features.transition3",
                "features.denseblock4",
            ],
        ),
        ("vit_b_16", [f"encoder.layers.encoder_layer_{i}" for i in range(12)]),
    ],
)
def test_torchvision_networks(architecture: str, expected: Sequence[str]) -> None:
    """Residual, plain, inverted-residual, dense and transformer networks of torchvision."""
    network = build(Architecture(id=f"torchvision/{architecture}"))

    assert names(network, side=224) == expected


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("convnext_tiny", "maps"), ("swin_t", "channels_last"), ("vit_b_16", "tokens")],
)
def test_layouts(architecture: str, layout: str) -> None:
    """The layout of every block's output is recognised."""
    network = build(Architecture(id=f"torchvision/{architecture}"))

    blocks = find_blocks(network, torch.randn(1, 3, 224, 224))

    assert {block.layout for block in blocks} == {layout}


def test_functional_network() -> None:
    """Where activations are no modules, a convolution is read after its normalisation."""
    assert names(FunctionalNetwork(), side=8) == ["norm", "second"]


def test_own_residual_network() -> None:
    """A network nobody here wrote: its residual blocks, not their parts."""
    assert names(residual_network(), side=8) == ["0", "2"]


def test_pattern() -> None:
    """A glob replaces the search and may name parts of blocks."""
    network = cifar.ResNet18(width=4)

    assert names(network, side=32, pattern="layer4.*.conv2") == ["layer4.0.conv2", "layer4.1.conv2"]


@pytest.mark.parametrize("pattern", [None, "layer9.*"])
def test_no_block(pattern: str | None) -> None:
    """A network without maps, or a pattern that matches none, is refused."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 2))

    with pytest.raises(NetworkError, match="no block"):
        find_blocks(network, torch.randn(1, 3, 4, 4), pattern=pattern)


def test_not_a_classifier() -> None:
    """A network that returns maps is refused with the shape."""
    with pytest.raises(NetworkError, match=r"logits \[B, classes\], it returned \(1, 4, 4, 4\)"):
        find_blocks(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4))


def test_norms_survive_in_place_operations() -> None:
    """The norm is taken before a later in-place ReLU rewrites the block's output."""
    network = residual_network().eval()
    images = torch.randn(3, 3, 8, 8)
    first = network[0](images)

    logits, norms = BlockNorms(network, [Block("0", "maps"), Block("2", "maps")]).run(images)

    assert torch.allclose(norms["0"], feature_norm(first))
    assert torch.equal(logits, network(images))
    assert [tuple(norm.shape) for norm in norms.values()] == [(3,), (3,)]


def test_hooks_and_gradients_are_left_as_found() -> None:
    """Finding blocks leaves no hook behind and no parameter frozen."""
    network = cifar.ResNet18(width=4).eval()

    find_blocks(network, torch.randn(1, 3, 32, 32))

    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_stopping_at_the_last_block() -> None:
    """Norms of a run that ends early are those of the whole run; the next run is whole again."""
    network = residual_network().eval()
    norms = BlockNorms(network, [Block("0", "maps"), Block("2", "maps")])
    images = torch.randn(3, 3, 8, 8)

    early = norms.run_to_last_block(images)

    logits, whole = norms.run(images)
    assert all(torch.equal(early[name], whole[name]) for name in ("0", "2"))
    assert torch.equal(logits, network(images))
    assert not any(module._forward_hooks for module in network.modules())
