"""The CIFAR networks: their blocks compute what torchvision's do."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet, vgg

from app.core.cifar import VGG11, BasicBlock


@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (16, 2)])
@torch.inference_mode()
def test_basic_block(channels: int, stride: int) -> None:
    """The block takes torchvision's weights as they are, and gives its maps to the bit."""
    downsample = None
    if stride != 1:
        convolution = nn.Conv2d(8, channels, 1, stride, bias=False)
        downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))
    published = resnet.BasicBlock(8, channels, stride, downsample).eval()
    block = BasicBlock(8, channels, stride=stride).eval()

    block.load_state_dict(published.state_dict())

    maps = torch.randn(2, 8, 16, 16)
    assert torch.equal(block(maps), published(maps.clone()))


@torch.inference_mode()
def test_vgg11() -> None:
    """The layers are torchvision's configuration A with batch normalisation."""
    features = VGG11(width=64).eval().features
    published = vgg.make_layers(vgg.cfgs["A"], batch_norm=True).eval()

    published.load_state_dict(features.state_dict())

    assert list(map(str, features)) == list(map(str, published))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(features(images), published(images))
