"""Forward passes recorded as CUDA graphs."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from app.core.cores import MOST_PASSES
from app.core.cuda import streams_of
from app.core.recorded_engine import Pass, Recording

_WARM_UPS: Final = 3
"""Passes before one is recorded: libraries set themselves up in the first."""
_RECORDING: Final = threading.Lock()
"""torch records one CUDA graph at a time in a process."""


class CudaRecorder:
    """Records forward passes as CUDA graphs; see :class:`app.core.recorded_engine.Recorder`.

    All of a device compute on one stream, one after the other. Batches come on another, each by
    way of page-locked memory of its own, and results go to page-locked memory.

    Args:
        device: a GPU.
        size: images of the largest batch.
        side: of an image, in pixels.
    """

    passes = MOST_PASSES

    def __init__(self, device: torch.device, *, size: int, side: int) -> None:
        streams = streams_of(device)
        self._stream, self._turns = streams.computing, streams.turns
        # The graphs take turns, so what one needs on its way the others may use too.
        self._memory = torch.cuda.graph_pool_handle()
        self.inputs = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=device)
        self._free: queue.SimpleQueue[CudaTransfer] = queue.SimpleQueue()
        for _ in range(self.passes):
            transfer = CudaTransfer(
                self.inputs, copying=streams.copying, computing=streams.computing
            )
            self._free.put(transfer)
        with self._turns.turn():
            for stream in (streams.computing, streams.copying):
                stream.wait_stream(torch.cuda.current_stream(device))

    def record(self, run: Pass, size: int) -> Recording:
        """The pass over the first ``size`` of ``inputs``, as a graph."""
        images, graph = self.inputs[:size], torch.cuda.CUDAGraph()
        # Around the recording's own use of the stream, which an error there would leave set.
        with _RECORDING, self.running():
            for _ in range(_WARM_UPS):
                run(images)
            with torch.cuda.graph(
                graph,
                pool=self._memory,
                stream=self._stream,
                # Other threads go on sending to this device, which by default would be an error.
                capture_error_mode="thread_local",
            ):
                outputs = run(images)
        return Recording(graph.replay, outputs)

    @contextmanager
    def sending(self, images: Tensor) -> Iterator["CudaTransfer"]:
        """A batch that is copied beside what the device computes."""
        transfer = self._free.get()
        try:
            transfer.send(images)
            yield transfer
        finally:
            self._free.put(transfer)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything in it goes to the computing stream, and so to the device."""
        with self._turns.turn(), torch.cuda.stream(self._stream):
            yield


class CudaTransfer:
    """Carries one batch after the other; see :class:`app.core.recorded_engine.Transfer`.

    Args:
        inputs: of the recorder, the size of the largest batch.
        copying: stream that images come on.
        computing: stream that reads them, and that results go on.
    """

    def __init__(
        self, inputs: Tensor, *, copying: torch.cuda.Stream, computing: torch.cuda.Stream
    ) -> None:
        self._copying, self._computing = copying, computing
        self._pinned = torch.empty(inputs.shape, dtype=torch.uint8).pin_memory()
        # Not straight to the inputs, which the batch before may still be computed from.
        self._arrived = torch.empty_like(inputs)
        self._copied = torch.cuda.Event()
        # Waiting for it takes no core from the decoders.
        self._finished = torch.cuda.Event(blocking=True)
        self._results: tuple[Tensor, ...] = ()

    def send(self, images: Tensor) -> None:
        """Begin to copy images to the device."""
        # After a batch that failed on its way the page-locked memory may still be read. So may what
        # had arrived, but nobody waits for what becomes of that.
        self._copied.synchronize()
        count = len(images)
        self._pinned[:count].copy_(images)
        with torch.cuda.stream(self._copying):
            self._arrived[:count].copy_(self._pinned[:count], non_blocking=True)
            self._copied.record(self._copying)

    def put(self, inputs: Tensor) -> None:
        """Copy the images on the device, once they are there."""
        self._computing.wait_event(self._copied)
        inputs.copy_(self._arrived[: len(inputs)])

    def take(self, outputs: tuple[Tensor, ...]) -> None:
        """Begin to bring the results."""
        # Not blocking, torch copies to page-locked memory, which is the caller's from then on.
        self._results = tuple(output.to("cpu", non_blocking=True) for output in outputs)
        self._finished.record(self._computing)

    def results(self) -> tuple[Tensor, ...]:
        """The results, once they are there."""
        self._finished.synchronize()
        results, self._results = self._results, ()
        return results
