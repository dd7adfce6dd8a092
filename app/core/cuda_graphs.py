"""Forward passes recorded as CUDA graphs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from app.core.cuda import PinnedCopies
from app.core.recorded_engine import Pass, Recording

_WARM_UPS: Final = 3
"""Passes before one is recorded: libraries set themselves up in the first."""
_RECORDING: Final = threading.Lock()
"""torch records one CUDA graph at a time in a process."""


class CudaRecorder:
    """Records forward passes as CUDA graphs; see :class:`app.core.recorded_engine.Recorder`.

    They compute on one stream, batches come on another, and results go to page-locked memory.

    Args:
        device: a GPU.
        size: images of the largest batch.
        side: of an image, in pixels.
    """

    def __init__(self, device: torch.device, *, size: int, side: int) -> None:
        self._stream = torch.cuda.Stream(device)
        self._copies = PinnedCopies(device)
        # The graphs take turns, so what one needs on its way the others may use too.
        self._memory = torch.cuda.graph_pool_handle()
        # Waiting for it takes no core from the decoders.
        self._finished = torch.cuda.Event(blocking=True)
        self.inputs = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything in it goes to the computing stream, and so to the device."""
        with torch.cuda.stream(self._stream):
            yield

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
                # Other threads go on serving on this device, which by default would be an error.
                capture_error_mode="thread_local",
            ):
                outputs = run(images)
        return Recording(graph.replay, outputs)

    def put(self, images: Tensor) -> None:
        """Copy images to the first of ``inputs``, whose last replay was waited for."""
        self._copies.fill(self.inputs[: len(images)], images)

    def take(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results, once they are there."""
        # Not blocking, torch copies to page-locked memory, which is the caller's from then on.
        arrived = tuple(output.to("cpu", non_blocking=True) for output in outputs)
        self._finished.record(self._stream)
        self._finished.synchronize()
        return arrived
