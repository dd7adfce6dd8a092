"""Batches that arrive on a GPU early."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final

import torch
from torch import Tensor

_SLOTS: Final = 2


class Turns:
    """Turns of threads: who has just had one gets no other before somebody who waits.

    A lock does not promise that, and versions are loaded while others serve.
    """

    def __init__(self) -> None:
        self._next, self._current = threading.Lock(), threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Its context is the calling thread's turn."""
        with self._next:
            self._current.acquire()
        try:
            yield
        finally:
            self._current.release()


class Streams:
    """What all detectors of one GPU share; of :func:`streams_of`.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.copying = torch.cuda.Stream(device)
        """For batches, which come beside what is computed."""
        self.computing = torch.cuda.Stream(device)
        """For graphs: what is recorded and replayed there shares the memory of libraries."""
        self.turns = Turns()
        """Of who puts something on the computing stream."""


@cache
def streams_of(device: torch.device) -> Streams:
    """The streams of a GPU, always the same.

    torch gives out 32 in turn: made anew for every detector, one that a graph is recorded on would
    some day be another's, in use.
    """
    return Streams(device)


class PinnedCopies:
    """Carries uint8 batches to a GPU through page-locked buffers, on the stream for copies.

    The copy of a batch runs beside what the device still computes; the caller's stream waits for
    the copy alone. For one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = streams_of(device).copying
        self._buffers = [torch.empty(0, dtype=torch.uint8).pin_memory() for _ in range(_SLOTS)]
        self._copied = [torch.cuda.Event() for _ in range(_SLOTS)]
        self._slot = 0

    def to_device(self, images: Tensor) -> Tensor:
        """The images on the device, ready for the current stream."""
        self._slot = slot = (self._slot + 1) % _SLOTS
        # The buffer may still be read by the copy before the last.
        self._copied[slot].synchronize()
        if self._buffers[slot].numel() < images.numel():
            self._buffers[slot] = torch.empty(images.numel(), dtype=torch.uint8).pin_memory()
        pinned = self._buffers[slot][: images.numel()].view(images.shape).copy_(images)
        with torch.cuda.stream(self._stream):
            arrived = pinned.to(self._device, non_blocking=True)
            self._copied[slot].record(self._stream)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(self._copied[slot])
        # Its memory belongs to the copying stream: without this it could be given out again there.
        arrived.record_stream(computing)
        return arrived
