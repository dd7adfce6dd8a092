"""The last linear layer: found where there is one, refused with the reason elsewhere."""

import pytest
import torch
from torch import Tensor, nn

from app.core import cifar
from app.core.head import find_head, reading_features
from app.core.networks import Architecture, build
from app.errors import NetworkError


class TwoHeads(nn.Module):
    """The mean of two linear layers, as in distilled transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        features = images.mean(dim=(2, 3))
        logits: Tensor = (self.first(features) + self.second(features)) / 2
        return logits


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("cifar/resnet18", "fc"),
        ("cifar/vgg11", "classifier"),
        ("torchvision/vgg11", "classifier.6"),
        ("torchvision/mobilenet_v3_small", "classifier.3"),
        ("torchvision/swin_t", "head"),
        ("torchvision/vit_b_32", "heads.head"),
    ],
)
def test_head(architecture: str, head: str) -> None:
    """The layer that a person would name."""
    network = build(Architecture(id=architecture))
    side = 32 if architecture.startswith("cifar") else 224

    assert find_head(network, torch.randn(1, 3, side, side)) == head


@pytest.mark.parametrize(
    "network",
    [TwoHeads(), nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())],
)
def test_no_head(network: nn.Module) -> None:
    """Logits that are a mean of layers, or a pooled convolution, have no feature vector."""
    with pytest.raises(NetworkError, match="does not end in one linear layer"):
        find_head(network.eval(), torch.randn(1, 3, 4, 4))


def test_features_are_the_head_s_input() -> None:
    """The logits are the linear layer of them; no hook stays behind."""
    network = cifar.ResNet18(width=4).eval()
    images = torch.randn(5, 3, 32, 32)

    with torch.no_grad(), reading_features(network, "fc") as features:
        logits = network(images)
        assert torch.equal(network.fc(features.value), logits)

    assert features.value.shape == (5, 32)
    assert not any(module._forward_pre_hooks for module in network.modules())
