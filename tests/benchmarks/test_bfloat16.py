"""How far scores in bfloat16 depend on the order of sums."""

import torch

from app.core.blocks import find_blocks
from app.core.detector import BATCH_TOLERANCE
from app.core.networks import CIFAR_PREPROCESSING, Architecture, build
from app.core.precision import dtype_of
from benchmarks.bfloat16 import differences
from tests.core.test_detector import pictures


def test_differences() -> None:
    """Other orders of the sums stay within the tolerance of batches; the network stays float32."""
    torch.manual_seed(0)
    network = build(Architecture(id="cifar/resnet18", arguments={"width": 4}))
    inputs = CIFAR_PREPROCESSING.normalise(pictures(8))
    block = find_blocks(network, inputs[:1])[-2]

    found = differences(network, block, inputs)

    assert list(found)[:3] == ["batches of 1", "batches of 7", "batches of 32"]
    assert 0 < found["float32"] < 0.02
    assert all(found[name] < BATCH_TOLERANCE["bfloat16"] for name in found if name != "float32")
    assert dtype_of(network.state_dict()) == "float32"
