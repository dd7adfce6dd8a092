"""The network as ONNX graphs without weights: one whole, one that ends at the selected block.

The graphs are structure alone, tens of kilobytes. Whoever runs them puts in the weights, from
the bundle's own verified file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.core.blocks import Block, BlockNorms
from app.core.images import Preprocessing
from app.errors import EngineError, NoEngineError

INPUT: Final = "images"
FEATURE_NORMS: Final = "feature_norms"
LOGITS: Final = "logits"
FEATURES: Final = "features"
WEIGHT_PREFIX: Final = "network."
"""Before the key of a weight: its name in the graphs."""
WEIGHTS_LOCATION: Final = "put in by NormGate"
_OPSET: Final = 20
_EXAMPLES: Final = 2
"""Images to trace with; one would be taken for a constant."""


@dataclass(frozen=True)
class Graph:
    """A serialised ONNX model, and the keys of the weights that are still to be put in.

    It takes ``images`` ``[B, 3, crop, crop]`` uint8 and gives ``feature_norms`` ``[B]``.
    """

    content: bytes
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Graphs:
    """The whole network, which gives ``logits`` and perhaps ``features`` too, and its gate."""

    network: Graph
    gate: Graph


def export_graphs(
    network: nn.Module, *, block: Block, preprocessing: Preprocessing, head: str | None
) -> Graphs:
    """The graphs of a network, its preprocessing and the FeatureNorm of one block.

    Raises:
        EngineError: the exporter is not installed, or cannot export this network.
    """
    whole = _export(_Whole(network, block, preprocessing, head), has_features=head is not None)
    gate = _up_to(whole, FEATURE_NORMS)
    weights = network.state_dict()
    return Graphs(*(_without_weights(model, weights) for model in (whole, gate)))


class _Whole(nn.Module):
    """From uint8 images to all that a score needs."""

    # Names that no operator of a network has: the exporter calls its values by them.
    pixel_mean: Tensor
    pixel_variance: Tensor

    def __init__(
        self, network: nn.Module, block: Block, preprocessing: Preprocessing, head: str | None
    ) -> None:
        super().__init__()
        self.network = network
        self._norms = BlockNorms(network, [block])
        self._block = block
        self._head = head
        self._side = preprocessing.crop
        device = next(network.parameters()).device
        mean, variance = preprocessing.moments()
        self.register_buffer("pixel_mean", mean.to(device))
        self.register_buffer("pixel_variance", variance.to(device))
        self.eval()

    def example(self) -> Tensor:
        """Images to trace with."""
        size = (_EXAMPLES, 3, self._side, self._side)
        return torch.zeros(size, dtype=torch.uint8, device=self.pixel_mean.device)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """FeatureNorms, logits, and the head's input where it is wanted."""
        # The normalisation in one operator.
        inputs = functional.batch_norm(
            images.float(), self.pixel_mean, self.pixel_variance, eps=0.0
        )
        if self._head is None:
            logits, norms = self._norms.run(inputs)
            return norms[self._block.name], logits
        logits, norms, features = self._norms.run_with_features(inputs, head=self._head)
        return norms[self._block.name], logits, features


def _export(module: _Whole, *, has_features: bool) -> Any:
    """The ``onnx.ModelProto``, with its weights."""
    try:
        # Not at the top: the exporter is an extra, and its import costs more than torch's.
        from onnxscript import optimizer
        from onnxscript.rewriter import pattern
    except ModuleNotFoundError as error:
        raise NoEngineError(
            f"{error.name} is not installed: pip install 'normgate[export]'"
        ) from error
    try:
        program = torch.onnx.export(
            module,
            (module.example(),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=[FEATURE_NORMS, LOGITS, *([FEATURES] if has_features else [])],
            opset_version=_OPSET,
            # Folding would put changed copies of the weights into the graph.
            optimize=False,
            verbose=False,
        )
        assert program is not None
        # Only what hangs on no large weight. The exporter's own optimiser would fold batch norms
        # into changed copies of the weights; ONNX Runtime does that when it loads them.
        optimizer.fold_constants(program.model, should_fold=_may_fold)
        pattern.RewriteRule(_length, _length_from_squares).apply_to_model(program.model)
        optimizer.remove_unused_nodes(program.model)
        return program.model_proto
    except Exception as error:  # the exporter's errors have no common class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EngineError(
            f"{type(module.network).__name__} cannot be exported to ONNX: {reason}"
        ) from error


def _may_fold(node: Any) -> bool | None:
    # By default a linear layer's whole weight would be turned over and kept as a copy.
    return False if node.op_type == "Transpose" else None


def _length(op: Any, values: Any, axes: Any) -> Any:
    return op.ReduceL2(values, axes, keepdims=0)


def _length_from_squares(op: Any, values: Any, axes: Any) -> Any:
    """The same by operators that ONNX Runtime has vectorised: a third of the time."""
    return op.Sqrt(op.ReduceSum(op.Mul(values, values), axes, keepdims=0))


def _up_to(model: Any, output: str) -> Any:
    """The part of a model that one of its outputs depends on."""
    from onnx.utils import Extractor

    return Extractor(model).extract_model([INPUT], [output])


def _without_weights(model: Any, weights: Mapping[str, Tensor]) -> Graph:
    from onnx import TensorProto

    removed = []
    for tensor in model.graph.initializer:
        if _is_weight(tensor, weights):
            removed.append(tensor.name.removeprefix(WEIGHT_PREFIX))
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=WEIGHTS_LOCATION)
    # Where each node comes from: several times the size of the structure.
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        part.ClearField("metadata_props")
    return Graph(model.SerializeToString(deterministic=True), tuple(removed))


def _is_weight(tensor: Any, weights: Mapping[str, Tensor]) -> bool:
    if not tensor.name.startswith(WEIGHT_PREFIX):
        return False
    weight = weights.get(tensor.name.removeprefix(WEIGHT_PREFIX))
    if weight is None or tuple(tensor.dims) != tuple(weight.shape):
        return False
    return bool(tensor.raw_data == weight.cpu().contiguous().numpy().tobytes())
