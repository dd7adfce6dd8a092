"""The linear layer that ends most classifiers: its input is the last feature vector."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from app.errors import NetworkError


@torch.inference_mode()
def find_head(network: nn.Module, images: Tensor) -> str:
    """The name of the linear layer whose output is the logits.

    Args:
        network: in evaluation mode; it is run once.
        images: one normalised image ``[1, 3, H, W]``.

    Raises:
        NetworkError: the logits do not come out of one ``nn.Linear``.
    """
    outputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_hook(_recorder(outputs, name)).remove)
        logits: Tensor = network(images)
    for name, output in reversed(outputs.items()):
        # The network may give in float32 what it computed in another dtype.
        if output.shape == logits.shape and torch.equal(output.float(), logits.float()):
            return name
    raise NetworkError(
        f"{type(network).__name__} does not end in one linear layer: there is no last feature "
        "vector whose length could be replaced by the selected block's norm"
    )


@dataclass
class Features:
    """The head's input ``[B, D]`` of the last forward pass."""

    value: Tensor = field(default_factory=lambda: torch.empty(0, 0))


@contextmanager
def reading_features(network: nn.Module, head: str) -> Iterator[Features]:
    """While the context is open, every forward pass leaves the head's input in ``value``."""
    features = Features()

    def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features.value = inputs[0]

    handle = network.get_submodule(head).register_forward_pre_hook(read)
    try:
        yield features
    finally:
        handle.remove()


def _recorder(outputs: dict[str, Tensor], name: str) -> Any:
    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs[name] = output

    return record
