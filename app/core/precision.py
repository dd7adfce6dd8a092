"""The dtype that a network computes in; a threshold belongs to one."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from app.errors import NetworkError

Dtype = Literal["float32", "bfloat16"]


def compute_in(network: nn.Module, dtype: Dtype) -> nn.Module:
    """The network, which computes in that dtype from now on; changed in place.

    It still takes float32 images and gives float32 logits. FeatureNorms are summed in float32
    whatever the network computes in. A network for float32 is left as it is.

    Raises:
        NetworkError: it was built for another dtype, or has no weights to convert.
    """
    if dtype == "bfloat16":
        network.to(torch.bfloat16)
        network.register_forward_pre_hook(_take_float32)
        network.register_forward_hook(_give_float32)
    if dtype_of(network.state_dict()) != dtype:
        raise NetworkError(f"{type(network).__name__} cannot compute in {dtype}: see its weights")
    return network


def dtype_of(tensors: Mapping[str, Tensor]) -> Dtype:
    """The dtype that a network with these weights was made to compute in."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return "bfloat16" if dtypes == {torch.bfloat16} else "float32"


def on_device(network: nn.Module, device: str) -> nn.Module:
    """The network on a device, laid out as suits it there; changed in place.

    On a GPU no product is rounded further than the network's dtype says, in this process.

    Raises:
        RuntimeError: there is no such device; or an AssertionError.
    """
    network.to(device)
    if torch.device(device).type == "cuda":
        _sum_in_float32()
    if dtype_of(network.state_dict()) == "bfloat16":
        # What multiplies bfloat16, on GPUs and in recent CPUs, takes the channels last; otherwise
        # each layer turns its maps twice.
        _channels_last(network)
    return network


def _channels_last(network: nn.Module) -> None:
    # Its overload for the memory format alone is unknown to the type checker.
    move: Any = network.to
    move(memory_format=torch.channels_last)


def _sum_in_float32() -> None:
    # By default recent GPUs run convolutions in TF32, with 10 bits of the mantissa instead of 23:
    # another dtype than the one on the CPU.
    torch.backends.cudnn.allow_tf32 = False
    # And may add up parts of a long product in bfloat16, depending on the size of the batch.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _take_float32(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].bfloat16(), *inputs[1:])


def _give_float32(network: nn.Module, inputs: Any, logits: Any) -> Any:
    # What is no tensor is refused where logits are read.
    return logits.float() if isinstance(logits, Tensor) else logits
