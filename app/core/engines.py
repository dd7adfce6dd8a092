"""What runs the network for a detector: torch, or another engine that gives the same scores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from app.core.blocks import Block, BlockNorms
from app.core.cuda import PinnedCopies
from app.core.images import Preprocessing

EngineName = Literal["torch", "onnxruntime", "cuda_graphs"]


@dataclass(frozen=True)
class Outputs:
    """What one forward pass of ``B`` images gives.

    Args:
        feature_norms: of the selected block, ``[B]`` float32.
        logits: ``[B, classes]`` float32.
        features: the input ``[B, D]`` of the head, where the score needs it.
    """

    feature_norms: Tensor
    logits: Tensor
    features: Tensor | None = None


class Engine(Protocol):
    """Runs one network on uint8 images ``[B, 3, crop, crop]`` of any ``B``; for one thread."""

    @property
    def name(self) -> EngineName:
        """Which engine it is."""

    def run(self, images: Tensor) -> Outputs:
        """The whole network."""

    def run_to_block(self, images: Tensor) -> Tensor:
        """The FeatureNorms ``[B]`` of :meth:`run`, from the network up to the selected block."""


class TorchEngine:
    """The network as torch runs it; the thresholds are set with this engine.

    Args:
        network: in evaluation mode, on its device.
        block: the selected block.
        preprocessing: turns uint8 images into the network's input.
        head: name of the linear layer whose input is wanted too.
    """

    name: EngineName = "torch"

    def __init__(
        self,
        network: nn.Module,
        *,
        block: Block,
        preprocessing: Preprocessing,
        head: str | None = None,
    ) -> None:
        self._norms = BlockNorms(network, [block])
        self._block = block
        self._head = head
        device = next(network.parameters()).device
        self._normalise = preprocessing.normaliser(device)
        self._to_device: Callable[[Tensor], Tensor] = lambda images: images.to(device)
        if device.type == "cuda":
            self._to_device = PinnedCopies(device).to_device

    @torch.inference_mode()
    def run(self, images: Tensor) -> Outputs:
        """As :meth:`Engine.run`."""
        return Outputs(*self.forward(self._to_device(images)))

    @torch.inference_mode()
    def run_to_block(self, images: Tensor) -> Tensor:
        """As :meth:`Engine.run_to_block`, the same to the bit."""
        [norms] = self.forward_to_block(self._to_device(images))
        return norms

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """What :class:`Outputs` is made of, from images on the device; waits for no result."""
        inputs = self._normalise(images)
        if self._head is None:
            logits, norms = self._norms.run(inputs)
            return norms[self._block.name], logits
        logits, norms, features = self._norms.run_with_features(inputs, head=self._head)
        return norms[self._block.name], logits, features

    def forward_to_block(self, images: Tensor) -> tuple[Tensor, ...]:
        """The FeatureNorms alone, likewise."""
        return (self._norms.run_to_last_block(self._normalise(images))[self._block.name],)
