"""A recorder for the CPU: what it replays is computed anew, into the same memory."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from app.core.recorded_engine import Pass, Recording


class EagerRecorder:
    """Keeps to the rules of a GPU's recordings and remembers what was recorded and replayed."""

    passes = 2

    def __init__(self, size: int, side: int) -> None:
        self.inputs = torch.full((size, 3, side, side), 255, dtype=torch.uint8)
        self.recorded: list[int] = []
        self.replayed: list[int] = []
        self.sent: queue.SimpleQueue[int] = queue.SimpleQueue()
        """How many images of each batch, when it is sent."""
        self._under_way = threading.Semaphore(self.passes)
        self._turn = threading.Lock()
        self._runs_in: int | None = None

    def record(self, run: Pass, size: int) -> Recording:
        """The pass, whose results are overwritten by each replay."""
        self.recorded.append(size)
        outputs = tuple(output.clone() for output in run(self.inputs[:size]))

        def replay() -> None:
            assert self.is_running
            self.replayed.append(size)
            for output, found in zip(outputs, run(self.inputs[:size]), strict=True):
                output.copy_(found)

        return Recording(replay, outputs)

    @contextmanager
    def sending(self, images: Tensor) -> Iterator["EagerTransfer"]:
        """The images, as they are now."""
        with self._under_way:
            self.sent.put(len(images))
            yield EagerTransfer(self, images.clone())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Where replays are, and what is put and taken; of one thread at a time."""
        with self._turn:
            self._runs_in = threading.get_ident()
            try:
                yield
            finally:
                self._runs_in = None

    @property
    def is_running(self) -> bool:
        """Whether the calling thread is in :meth:`running`."""
        return self._runs_in == threading.get_ident()


class EagerTransfer:
    """A batch that is there at once, like its results."""

    def __init__(self, recorder: EagerRecorder, images: Tensor) -> None:
        self._recorder, self._images = recorder, images
        self._results: tuple[Tensor, ...] = ()

    def put(self, inputs: Tensor) -> None:
        """Copy the images to the recorder's inputs."""
        assert self._recorder.is_running
        inputs.copy_(self._images)

    def take(self, outputs: tuple[Tensor, ...]) -> None:
        """Copy the results."""
        assert self._recorder.is_running
        self._results = tuple(output.clone() for output in outputs)

    def results(self) -> tuple[Tensor, ...]:
        """The copies; not while another batch could be computed."""
        assert not self._recorder.is_running
        return self._results
