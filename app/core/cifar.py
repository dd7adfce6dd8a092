"""The CIFAR networks of the paper, for 32 x 32 images.

Architectures after He et al. (2016), Zagoruyko and Komodakis (2016) and Simonyan and
Zisserman (2015) in their usual CIFAR form: a 3 x 3 stem without max pooling, one linear layer.
"""

from collections.abc import Iterator
from typing import Final, cast

import torch
from torch import Tensor, nn

_VGG11: Final = (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None)
"""Channels of the convolutions, and where a pooling follows."""


class ResNet18(nn.Module):
    """ResNet18 with a 3 x 3 stem: logits ``[B, num_classes]`` from images ``[B, 3, 32, 32]``.

    Args:
        num_classes: number of labels.
        width: channels of the first stage; the paper's network has 64.
    """

    def __init__(self, *, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _resnet_stage(width, width, stride=1)
        self.layer2 = _resnet_stage(width, 2 * width, stride=2)
        self.layer3 = _resnet_stage(2 * width, 4 * width, stride=2)
        self.layer4 = _resnet_stage(4 * width, 8 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images."""
        maps = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return cast(Tensor, self.fc(self.avgpool(maps).flatten(1)))


class BasicBlock(nn.Module):
    """Residual block of two convolutions, with the names and the order of torchvision's."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``[B, channels_out, H / stride, W / stride]``."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(maps)))))
        residual += shortcut
        return cast(Tensor, self.relu(residual))


class WideResNet28x10(nn.Module):
    """WRN28-10: three stages of four pre-activation blocks, ten times as wide as ResNet-28.

    Args:
        num_classes: number of labels.
        widen_factor: 10 in the paper.
    """

    def __init__(self, *, num_classes: int = 10, widen_factor: int = 10) -> None:
        super().__init__()
        w1, w2, w3 = 16 * widen_factor, 32 * widen_factor, 64 * widen_factor
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _wide_stage(16, w1, stride=1)
        self.block2 = _wide_stage(w1, w2, stride=2)
        self.block3 = _wide_stage(w2, w3, stride=2)
        self.bn1 = nn.BatchNorm2d(w3)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(w3, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images."""
        maps = self.block3(self.block2(self.block1(self.conv1(images))))
        maps = self.relu(self.bn1(maps))
        return cast(Tensor, self.fc(self.avgpool(maps).flatten(1)))


class WideBasicBlock(nn.Module):
    """Pre-activation residual block of a wide residual network; its output may be negative."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if channels_in != channels_out or stride != 1:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``[B, channels_out, H / stride, W / stride]``."""
        activated = self.relu1(self.bn1(maps))
        shortcut = maps if self.shortcut is None else self.shortcut(activated)
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return cast(Tensor, shortcut + residual)


class VGG11(nn.Module):
    """VGG11 with batch normalisation and one linear layer, for 32 x 32 images.

    Args:
        num_classes: number of labels.
        width: channels of the first convolution; the paper's network has 64.
    """

    def __init__(self, *, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential(*_vgg11_layers(width))
        self.classifier = nn.Linear(8 * width, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images."""
        return cast(Tensor, self.classifier(torch.flatten(self.features(images), 1)))


def _resnet_stage(channels_in: int, channels_out: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(channels_in, channels_out, stride=stride),
        BasicBlock(channels_out, channels_out, stride=1),
    )


def _vgg11_layers(width: int) -> Iterator[nn.Module]:
    channels_in = 3
    for channels in _VGG11:
        if channels is None:
            yield nn.MaxPool2d(2, stride=2)
            continue
        scaled = channels * width // 64
        yield nn.Conv2d(channels_in, scaled, 3, padding=1)
        yield nn.BatchNorm2d(scaled)
        yield nn.ReLU(inplace=True)
        channels_in = scaled


def _wide_stage(channels_in: int, channels_out: int, *, stride: int) -> nn.Sequential:
    first = WideBasicBlock(channels_in, channels_out, stride=stride)
    rest = (WideBasicBlock(channels_out, channels_out, stride=1) for _ in range(3))
    return nn.Sequential(first, *rest)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
