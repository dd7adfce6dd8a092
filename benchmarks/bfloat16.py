"""How far a FeatureNorm in bfloat16 depends on the machine: ``python -m benchmarks.bfloat16``.

The same network with the same images in other batches, with the channels last, and with the sums of
every layer in float32 before they are rounded, as hardware for bfloat16 has them. The tolerances of
the dtype rest on this.
"""

import argparse
import copy
import sys
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from app.core.blocks import Block, BlockNorms, find_blocks
from app.core.images import Preprocessing, load
from app.core.networks import Architecture, build, default_preprocessing
from app.core.precision import compute_in
from app.store import Store
from benchmarks.datasets import ROOT, cifar10_split, unpack

_BATCH_SIZE: Final = 64
_OTHER_SIZES: Final = (1, 7, 32)
_BUNDLED: Final = "cifar10-resnet18"


def main() -> int:
    """Print the largest differences for one network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", help="with random weights; default: the bundled network")
    parser.add_argument("--images", type=int, default=200, metavar="N")
    arguments = parser.parse_args()
    if arguments.architecture is None:
        loaded = Store(ROOT / "model_store").load(_BUNDLED)
        network = loaded.detector().network
        preprocessing: Preprocessing = loaded.bundle.preprocessing
        block = loaded.bundle.norm_ratios.selected
        files = cifar10_split()[2].rglob("*.jpg")
    else:
        architecture = Architecture(id=arguments.architecture)
        network, preprocessing, block = _untrained(architecture)
        is_small = architecture.family == "cifar"
        files = (cifar10_split()[2] if is_small else unpack("photos")).rglob("*.jpg")
    every = sorted(files)
    chosen = every[:: max(1, len(every) // arguments.images)][: arguments.images]
    images = torch.stack([load(file.read_bytes(), preprocessing) for file in chosen])
    found = differences(network, block, preprocessing.normalise(images))
    print(f"{block.name}, {len(images)} images: largest difference of a FeatureNorm in bfloat16")
    for name, difference in found.items():
        print(f"{name:>24}: {difference:.2%}")
    return 0


@torch.inference_mode()
def differences(network: nn.Module, block: Block, inputs: Tensor) -> Mapping[str, float]:
    """The largest relative difference of a FeatureNorm in bfloat16 from itself, run otherwise.

    Args:
        network: in evaluation mode, in float32; left as it is.
        block: whose norms are compared.
        inputs: normalised images ``[N, 3, H, W]``.
    """
    half = compute_in(copy.deepcopy(network), "bfloat16")
    truth = _norms(half, block, inputs)
    channels_last: Any = copy.deepcopy(half)
    runs = {f"batches of {size}": _norms(half, block, inputs, size=size) for size in _OTHER_SIZES}
    runs["channels last"] = _norms(
        channels_last.to(memory_format=torch.channels_last), block, inputs
    )
    runs["sums in float32"] = _norms(_summing_in_float32(half), block, inputs)
    runs["float32"] = _norms(network, block, inputs)
    return {name: float((found / truth - 1).abs().max()) for name, found in runs.items()}


def _untrained(architecture: Architecture) -> tuple[nn.Module, Preprocessing, Block]:
    torch.manual_seed(0)
    network, preprocessing = build(architecture), default_preprocessing(architecture)
    probe = torch.zeros(1, 3, preprocessing.crop, preprocessing.crop)
    return network, preprocessing, find_blocks(network, probe)[-2]


def _norms(network: nn.Module, block: Block, inputs: Tensor, *, size: int = _BATCH_SIZE) -> Tensor:
    norms = BlockNorms(network, [block])
    return torch.cat([norms.run_to_last_block(batch)[block.name] for batch in inputs.split(size)])


def _summing_in_float32(half: nn.Module) -> nn.Module:
    """A copy whose layers take and give bfloat16, and are float32 in between."""
    network = copy.deepcopy(half)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.float()
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].float(),))
            layer.register_forward_hook(lambda layer, inputs, output: output.bfloat16())
    return network


if __name__ == "__main__":
    sys.exit(main())
