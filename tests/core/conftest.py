"""One small network for the tests of what runs networks."""

import pytest
import torch
from torch import nn

from app.core.blocks import Block, find_blocks
from app.core.networks import Architecture, build


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small residual network with random weights."""
    torch.manual_seed(0)
    return build(Architecture(id="cifar/resnet18", arguments={"width": 4}))


@pytest.fixture(scope="module")
def block(network: nn.Module) -> Block:
    """A block in the middle."""
    return find_blocks(network, torch.zeros(1, 3, 32, 32))[-3]
