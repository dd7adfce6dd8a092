"""The candidate blocks of a network, found by following the data through it.

A block is a module through whose output every path from the image to the logits passes. Of
nested modules with that property the residual (or otherwise branching) one is the block, not
its parts and not the stage around it; where nothing branches (VGG) every convolution counts,
read after its normalisation and activation.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from app.core.feature_norm import Layout, feature_norm
from app.core.head import reading_features
from app.errors import NetworkError

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_CONTAINERS: frozenset[type[nn.Module]] = frozenset({nn.Sequential, nn.ModuleList})


@dataclass(frozen=True)
class Block:
    """A named module and the layout of its output."""

    name: str
    layout: Layout


class BlockNorms:
    """Runs a network and reads the FeatureNorm of some of its blocks on the way.

    The norms are reduced to ``[B]`` inside the hooks: later in-place operations may rewrite an
    activation, and keeping it would cost memory. One instance serves one thread at a time.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[Block]) -> None:
        self._network = network
        self._blocks = blocks
        self._norms: dict[str, Tensor] = {}
        self._stops_at_last_block = False

    def run(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and the FeatureNorms at every block, from one forward pass.

        Args:
            inputs: normalised images ``[B, 3, H, W]`` on the network's device.

        Returns:
            Logits ``[B, classes]`` float32, and ``[B]`` float32 for each block's name.
        """
        with self._hooked():
            logits: Tensor = self._network(inputs)
        return logits.float(), self._collected()

    def run_with_features(
        self, inputs: Tensor, *, head: str
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """As :meth:`run`, with the input ``[B, D]`` of the linear layer called ``head`` too."""
        with reading_features(self._network, head) as features:
            logits, norms = self.run(inputs)
        return logits, norms, features.value

    def run_to_last_block(self, inputs: Tensor) -> dict[str, Tensor]:
        """The FeatureNorms alone; what the network computes after the last block is left out.

        The modules up to there run as in :meth:`run`, so the norms are the same to the bit.

        Args:
            inputs: as for :meth:`run`.

        Returns:
            ``[B]`` float32 for each block's name.
        """
        with self._hooked(), suppress(_LastBlockRead):
            self._stops_at_last_block = True
            self._network(inputs)
        return self._collected()

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        self._norms = {}
        self._stops_at_last_block = False
        with ExitStack() as hooks:
            for block in self._blocks:
                module = self._network.get_submodule(block.name)
                hooks.callback(module.register_forward_hook(self._reader(block)).remove)
            yield

    def _collected(self) -> dict[str, Tensor]:
        return {block.name: self._norms[block.name] for block in self._blocks}

    def _reader(self, block: Block) -> Callable[[nn.Module, Any, Tensor], None]:
        def read(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._norms[block.name] = feature_norm(output, layout=block.layout)
            if self._stops_at_last_block and len(self._norms) == len(self._blocks):
                raise _LastBlockRead

        return read


class _LastBlockRead(Exception):
    """Every block has been read."""


@dataclass
class _Trace:
    """What one forward pass showed of each module that ran."""

    order: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    necks: frozenset[Node] = frozenset()

    def is_neck(self, name: str) -> bool:
        """Whether every path from image to logits passes through this module's output."""
        return self.nodes.get(name) in self.necks

    def is_spatial(self, name: str) -> bool:
        """Whether the module gives maps or tokens with more than one position."""
        shape = self.shapes.get(name, ())
        if len(shape) == 4:
            return shape[2] * shape[3] > 1 and shape[1] * shape[2] > 1
        return len(shape) == 3 and shape[1] > 1


def find_blocks(
    network: nn.Module, images: Tensor, *, pattern: str | None = None
) -> tuple[Block, ...]:
    """The candidate blocks in execution order.

    Args:
        network: in evaluation mode; it is run once.
        images: one normalised image ``[1, 3, H, W]`` of the size that will be scored.
        pattern: a glob on module names (``"layer4.*"``) that replaces the search; it may name
            any module with maps or tokens that runs exactly once.

    Raises:
        NetworkError: nothing qualifies, or the network does not map images to logits.
    """
    trace = _run(network, images)
    if pattern is not None:
        names = [name for name in trace.order if fnmatchcase(name, pattern)]
        names = [name for name in names if trace.is_spatial(name)]
    else:
        names = _Search(network, trace).names()
    if not names:
        wanted = "" if pattern is None else f" whose name matches {pattern!r}"
        raise NetworkError(
            f"{type(network).__name__} has no block{wanted} with spatial maps or tokens"
            + ("" if pattern else " that every path from the image to the logits passes through")
        )
    names.sort(key=trace.order.index)
    return tuple(_with_layouts(names, trace.shapes))


def _run(network: nn.Module, images: Tensor) -> _Trace:
    trace = _Trace()
    calls: dict[str, int] = defaultdict(int)

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] += 1
            if isinstance(output, Tensor) and output.grad_fn is not None:
                trace.order.append(name)
                trace.shapes[name] = tuple(output.shape)
                trace.nodes[name] = output.grad_fn

        return record

    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with ExitStack() as cleanup, torch.enable_grad():
        for name, module in network.named_modules():
            if name:
                cleanup.callback(module.register_forward_hook(recorder(name)).remove)
        # With the weights frozen the autograd graph holds the image's paths and nothing else.
        for parameter in learned:
            parameter.requires_grad_(False)
            cleanup.callback(parameter.requires_grad_, True)
        source = images.detach().clone().requires_grad_()
        # Times one: a network may write to its input in place, which a leaf forbids.
        logits = network(source * 1)
        _check_logits(network, logits)
        trace.necks = _necks(logits.grad_fn)
    for name, count in calls.items():
        if count > 1:
            trace.order = [other for other in trace.order if other != name]
            trace.shapes.pop(name, None)
            trace.nodes.pop(name, None)
    return trace


def _check_logits(network: nn.Module, logits: Any) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise NetworkError(
            f"{type(network).__name__} must return logits [B, classes], it returned {shape}"
        )
    if logits.grad_fn is None:
        raise NetworkError(f"the logits of {type(network).__name__} do not depend on the image")


def _necks(output: Node) -> frozenset[Node]:
    """The nodes that every path from ``output`` back to the image passes through.

    They are those whose paths up, times paths down, number as many as all paths.
    """
    order = _topological(output)
    down: dict[Node, int] = defaultdict(int)
    down[output] = 1
    for node in order:
        for parent, _ in node.next_functions:
            if parent is not None:
                down[parent] += down[node]
    up: dict[Node, int] = {}
    for node in reversed(order):
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        up[node] = sum(up[parent] for parent in parents) if parents else 1
    return frozenset(node for node in order if up[node] * down[node] == up[output])


def _topological(output: Node) -> list[Node]:
    """All nodes that ``output`` depends on, each before those it depends on."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(output, False)]
    while stack:
        node, is_finished = stack.pop()
        if is_finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in node.next_functions if parent)
    return order[::-1]


class _Search:
    """Walks the module tree down to the blocks."""

    def __init__(self, network: nn.Module, trace: _Trace) -> None:
        self._network = network
        # A module may be shared, and then has several names; the trace knows the first.
        self._modules = dict(network.named_modules(remove_duplicate=False))
        self._trace = trace
        # A class is whole when one of its instances has nothing to read inside: the others,
        # which happen not to branch, are not taken apart either (MBConv with stride 2).
        self._whole = {
            type(module)
            for name, module in self._modules.items()
            if name and self._qualifies(name) and not self._inside(name)
        } - _CONTAINERS

    def names(self) -> list[str]:
        """Blocks of a branching network, else the convolutions of a plain one."""
        found = self._descend("")
        if len(found) < 2:
            return self._convolutions("") or found
        return [part for name in found for part in self._taken_apart(name)]

    def _descend(self, name: str) -> list[str]:
        found = [
            below for child in self._composite_children(name) for below in self._descend(child)
        ]
        if name and self._qualifies(name) and (not found or self._is_whole(name, found)):
            return [name]
        return found

    def _is_whole(self, name: str, found: Sequence[str]) -> bool:
        kind = type(self._modules[name])
        # One part that could be read is a part (squeeze-and-excitation), unless all that holds
        # it is a sequence: that is a stage of one block.
        return kind in self._whole or (len(found) == 1 and kind not in _CONTAINERS)

    def _inside(self, name: str) -> list[str]:
        prefix = f"{name}."
        return [
            other for other in self._modules if other.startswith(prefix) and self._qualifies(other)
        ]

    def _qualifies(self, name: str) -> bool:
        """Composite, learned, spatial, and on every path."""
        module = self._modules[name]
        return (
            any(True for _ in module.children())
            and any(parameter.ndim > 1 for parameter in module.parameters())
            and self._trace.is_spatial(name)
            and self._trace.is_neck(name)
        )

    def _composite_children(self, name: str) -> list[str]:
        prefix = f"{name}." if name else ""
        return [
            prefix + child
            for child, module in self._modules[name].named_children()
            if any(True for _ in module.children())
        ]

    def _taken_apart(self, name: str) -> list[str]:
        """A stage that is a plain sequence of several convolutions, as those convolutions."""
        if type(self._modules[name]) is not nn.Sequential:
            return [name]
        convolutions = self._convolutions(f"{name}.")
        return convolutions if len(convolutions) > 1 else [name]

    def _convolutions(self, prefix: str) -> list[str]:
        """For each convolution on every path, the last layer before the next: its activation."""
        found: list[str] = []
        channels = 0
        for name in self._trace.order:
            module = self._modules[name]
            is_leaf = not any(True for _ in module.children())
            if not (name.startswith(prefix) and is_leaf and self._trace.is_neck(name)):
                continue
            if not self._trace.is_spatial(name):
                continue
            if isinstance(module, _CONVOLUTIONS):
                found.append(name)
                channels = module.out_channels
            elif found and _follows(module) and self._trace.shapes[name][1] == channels:
                found[-1] = name
        return found


def _follows(module: nn.Module) -> bool:
    """Whether a leaf normalises or activates, keeping the size of the maps."""
    kind = type(module).__name__.lower()
    return "norm" in kind or type(module).__module__ == nn.ReLU.__module__


def _with_layouts(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Block]:
    layout: Layout = "maps"
    for name in names:
        shape = shapes[name]
        if len(shape) == 3:
            yield Block(name, "tokens")
            continue
        # A cube (C == H == W) tells nothing: it keeps the layout of the block before it.
        if len(set(shape[1:])) > 1:
            layout = "channels_last" if shape[1] == shape[2] else "maps"
        yield Block(name, layout)
