"""Forward passes recorded for a few batch sizes, and replayed without the interpreter.

What can be recorded is what a GPU does (CUDA graphs): a replay launches hundreds of kernels at
once. A recording is of one batch size, so a batch is padded to the next size there is.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.core.engines import EngineName, Outputs, TorchEngine
from app.errors import UnfitEngineError

_COPY_TO_NEW: Final = torch.ops.aten._to_copy.default
_COPY_INTO: Final = torch.ops.aten.copy_.default

Pass = Callable[[Tensor], tuple[Tensor, ...]]
"""From uint8 images on the device, ``[B, 3, crop, crop]``, to tensors of ``B`` rows there."""


@dataclass(frozen=True)
class Recording:
    """One pass over one number of images.

    Args:
        replay: runs it again, on what the recorder's ``inputs`` then hold.
        outputs: where each replay leaves the results, on the device.
    """

    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]


class Transfer(Protocol):
    """One batch on its way to the device, and its results on theirs back."""

    def put(self, inputs: Tensor) -> None:
        """Copy the images to the recorder's inputs, once they are there; while it is running."""

    def take(self, outputs: tuple[Tensor, ...]) -> None:
        """Begin to bring the results, which the next replay overwrites; while it is running."""

    def results(self) -> tuple[Tensor, ...]:
        """What was taken, on the CPU, once it is there."""


class Recorder(Protocol):
    """Records passes on one device, and replays them for ``passes`` threads."""

    passes: int
    """Batches that may be under way: one is computed while others travel."""
    inputs: Tensor
    """``[N, 3, crop, crop]`` uint8: a recorded pass over ``B`` images reads the first ``B``."""

    def record(self, run: Pass, size: int) -> Recording:
        """The pass over the first ``size`` of ``inputs``."""

    def sending(self, images: Tensor) -> AbstractContextManager[Transfer]:
        """A batch of at most ``N`` images that travels whatever the device computes meanwhile."""

    def running(self) -> AbstractContextManager[None]:
        """Where replays are, and whatever is done to ``inputs``; of one thread at a time."""


class RecordedEngine:
    """Torch's passes, recorded for powers of two up to the largest batch, and for that.

    Its outputs lie on the CPU. A batch larger than the recorder's inputs is run by torch. For as
    many threads as the recorder.

    Args:
        engine: on the recorder's device.
        recorder: its ``inputs`` hold as many images as the largest batch has.

    Raises:
        UnfitEngineError: what the network does depends on the images' values.
    """

    name: EngineName = "cuda_graphs"

    @torch.inference_mode()
    def __init__(self, engine: TorchEngine, recorder: Recorder) -> None:
        self._engine = engine
        self._recorder = recorder
        # The largest first: the smaller ones find room in the memory that it needed.
        sizes = sorted(batch_sizes(len(recorder.inputs)), reverse=True)
        check_recordable(engine.forward, recorder.inputs[:1])
        self._whole = {size: recorder.record(engine.forward, size) for size in sizes}
        self._gate = {size: recorder.record(engine.forward_to_block, size) for size in sizes}

    @torch.inference_mode()
    def run(self, images: Tensor) -> Outputs:
        """As :meth:`app.core.engines.Engine.run`."""
        size = size_for(len(images), self._whole)
        if size is None:
            with self._recorder.running():
                found = self._engine.run(images)
                features = None if found.features is None else found.features.cpu()
                return Outputs(found.feature_norms.cpu(), found.logits.cpu(), features)
        return Outputs(*self._replay(self._whole[size], images, size=size))

    @torch.inference_mode()
    def run_to_block(self, images: Tensor) -> Tensor:
        """As :meth:`app.core.engines.Engine.run_to_block`."""
        size = size_for(len(images), self._gate)
        if size is None:
            with self._recorder.running():
                return self._engine.run_to_block(images).cpu()
        [norms] = self._replay(self._gate[size], images, size=size)
        return norms

    def _replay(self, recording: Recording, images: Tensor, *, size: int) -> tuple[Tensor, ...]:
        count, inputs = len(images), self._recorder.inputs
        with self._recorder.sending(images) as transfer:
            with self._recorder.running():
                transfer.put(inputs[:count])
                # Not what an earlier batch left there: a pass depends on its own images alone.
                inputs[count:size].zero_()
                recording.replay()
                transfer.take(tuple(output[:count] for output in recording.outputs))
            # Not while it is running: the next batch is computed while this thread waits.
            return transfer.results()


def batch_sizes(largest: int) -> list[int]:
    """The powers of two below the largest batch, and the largest, ascending."""
    return [*(2**power for power in range((largest - 1).bit_length())), largest]


def size_for(count: int, sizes: Iterable[int]) -> int | None:
    """The least of the sizes that has room for so many images, if there is one."""
    return min((size for size in sizes if size >= count), default=None)


def check_recordable(run: Pass, images: Tensor) -> None:
    """Return when a pass does the same whatever the images' values are; it is run once.

    A recording that fails on its way leaves torch's allocator as if it still went on, so it is
    not left to fail.

    Raises:
        UnfitEngineError: it waits for a value on its way, as ``if maps.sum() > 0`` does.
    """
    # Not in inference mode, where what an operator is made of would not be seen.
    watch = _Watch()  # type: ignore[no-untyped-call] # torch's own __init__ has no types
    with torch.inference_mode(mode=False), torch.no_grad(), watch:
        run(images.clone())


class _Watch(TorchDispatchMode):
    """Refuses every operator whose result, or its size, the interpreter has to wait for."""

    _TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._TAGS & set(func.tags) and not _picks_by_position(func, args):
            raise UnfitEngineError(f"the network's way depends on its images' values ({func})")
        found = func(*args, **(kwargs or {}))
        copied = {_COPY_TO_NEW: args[:1], _COPY_INTO: args[1:2]}.get(func, ())
        if any(source.device != found.device for source in copied):
            raise UnfitEngineError(f"the network copies between devices on its way ({func})")
        return found


def _picks_by_position(func: Any, args: Any) -> bool:
    """Whether it is an indexing by numbers: only one by a mask gives results of any size."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    masks = (torch.bool, torch.uint8)
    return not any(index is not None and index.dtype in masks for index in args[1])
