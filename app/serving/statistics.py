"""What a model version has done since it was loaded: counts and time, as Triton reports them."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

Step = Literal["success", "fail", "queue", "compute_input", "compute_infer", "compute_output"]
STEPS: Final[Sequence[Step]] = get_args(Step)


@dataclass(frozen=True)
class Duration:
    """How often something was done, and how long it took altogether."""

    count: int = 0
    seconds: float = 0


class _Sum:
    """A :class:`Duration` that grows: a new one for every request would cost more than the rest."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0

    def add(self, count: int, seconds: float) -> None:
        self.count += count
        self.seconds += seconds

    def now(self) -> Duration:
        return Duration(self.count, self.seconds)


@dataclass(frozen=True)
class Totals:
    """The statistics at one moment."""

    images: int
    batches: int
    last_s: float
    """When the last batch ended, in seconds since the epoch; 0 before the first."""
    steps: Mapping[Step, Duration]
    forward_by_batch_size: Mapping[int, Duration] = field(default_factory=dict)


class ModelStatistics:
    """The running totals of one model version. Safe in any thread.

    A request is a ``success`` when all its images were scored. ``queue``, the wait for a device,
    and ``compute_infer``, the forward pass of an image's batch, are counted for each image;
    ``compute_input``, the decoding, and ``compute_output``, the writing of tensors under ``/v2``,
    for each request.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps = {step: _Sum() for step in STEPS}
        self._batches: defaultdict[int, _Sum] = defaultdict(_Sum)
        self._last_s = 0.0

    def observe(self, step: Step, seconds: float, *, count: int = 1) -> None:
        """Take in that a step was taken ``count`` times, in ``seconds`` together."""
        with self._lock:
            self._steps[step].add(count, seconds)

    @contextmanager
    def timing(self, step: Step) -> Iterator[None]:
        """Take in the time that the context takes."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.observe(step, time.monotonic() - started)

    def observe_batch(self, *, waits_s: Sequence[float], forward_s: float) -> None:
        """Take in a batch that was answered: the wait of each image, and the forward pass."""
        size = len(waits_s)
        self.observe("queue", sum(waits_s), count=size)
        self.observe("compute_infer", forward_s * size, count=size)
        with self._lock:
            self._batches[size].add(1, forward_s)
            self._last_s = time.time()

    def totals(self) -> Totals:
        """The totals of now."""
        with self._lock:
            batches = {size: total.now() for size, total in sorted(self._batches.items())}
            return Totals(
                images=sum(size * forward.count for size, forward in batches.items()),
                batches=sum(forward.count for forward in batches.values()),
                last_s=self._last_s,
                steps={step: total.now() for step, total in self._steps.items()},
                forward_by_batch_size=batches,
            )
