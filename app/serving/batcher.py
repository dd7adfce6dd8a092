"""Dynamic batching between an event loop that submits and threads that take batches.

Work-conserving: a thread that is free takes whatever waits, at once; while all are busy, what
arrives gathers into the next batch. Nothing polls: threads sleep on a condition, requests on a
future. An item whose request is gone or late leaves the queue before it reaches a thread.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, TypeVar

from app.errors import DeadlineExceededError, NotReadyError, QueueFullError

Item = TypeVar("Item")
Result = TypeVar("Result")
DropReason = Literal["expired", "abandoned"]

_LATEST_WEIGHT: Final = 0.1
"""Of the latest batch in the moving average of the service time."""


class _Request(Generic[Result]):
    """The items of one request, answered together."""

    def __init__(self, future: asyncio.Future[list[Result]], *, size: int, deadline: float) -> None:
        self.future = future
        self.deadline = deadline
        self._results: dict[int, Result] = {}
        self._size = size

    def settle(self, position: int, result: Result) -> None:
        self._results[position] = result
        if len(self._results) == self._size and not self.future.done():
            self.future.set_result([self._results[place] for place in range(self._size)])

    def is_answered(self) -> bool:
        return self.future.done() and not self.future.cancelled()

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True)
class _Pending(Generic[Item, Result]):
    """One item on its way."""

    item: Item
    request: _Request[Result]
    position: int
    arrived: float


@dataclass(frozen=True)
class Batch(Generic[Item, Result]):
    """Items of one key, taken by a worker, which must end it with ``complete`` or ``fail``."""

    key: Hashable
    items: Sequence[Item]
    waits_s: Sequence[float]
    """How long each item waited in the queue."""
    _requests: Sequence[tuple[_Request[Result], int]]
    _loop: asyncio.AbstractEventLoop
    _measure: Callable[[float], None]
    _taken: float = field(default_factory=time.monotonic)

    def complete(self, results: Sequence[Result]) -> None:
        """Answer the items, in order; for the worker's thread to call."""
        self._measure((time.monotonic() - self._taken) / len(self.items))
        self._loop.call_soon_threadsafe(self._settle, results)

    def fail(self, error: Exception) -> None:
        """Fail the requests in this batch, and no others; for the worker's thread to call."""
        self._loop.call_soon_threadsafe(self._fail, error)

    def _settle(self, results: Sequence[Result]) -> None:
        for (request, position), result in zip(self._requests, results, strict=True):
            request.settle(position, result)

    def _fail(self, error: Exception) -> None:
        for request, _ in self._requests:
            request.fail(error)


class Batcher(Generic[Item, Result]):
    """A bounded queue of items, handed out in batches of one key.

    Args:
        max_batch_size: most items in a batch; a request with more is split.
        queue_size: most items waiting; a request with more is accepted by an empty queue alone.
        max_wait_s: how long a free thread waits for a batch to fill; 0 never delays.
        workers: threads that take batches, for the estimate of the waiting time.
        on_drop: told of items that left the queue unanswered.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        queue_size: int,
        max_wait_s: float = 0,
        workers: int = 1,
        on_drop: Callable[[DropReason, int], None] = lambda reason, count: None,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._queue_size = queue_size
        self._max_wait_s = max_wait_s
        self._workers = workers
        self._on_drop = on_drop
        self._changed = threading.Condition()
        self._queues: dict[Hashable, deque[_Pending[Item, Result]]] = {}
        self._depth = 0
        self._is_closed = False
        self._seconds_per_item = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def depth(self) -> int:
        """Items waiting."""
        return self._depth

    def retry_after_s(self) -> int:
        """Whole seconds until the queue of now is worked off at the measured rate; at least 1."""
        return max(1, math.ceil(self._depth * self._seconds_per_item / self._workers))

    async def submit(
        self, key: Hashable, items: Sequence[Item], *, deadline: float = math.inf
    ) -> list[Result]:
        """The results of ``items``, in order, once the last of them is done.

        Cancelling takes the items that still wait out of the queue.

        Args:
            key: only items of equal keys share a batch.
            items: at least one.
            deadline: on the clock of ``time.monotonic``.

        Raises:
            QueueFullError: the queue has no room.
            NotReadyError: the batcher is closed.
            DeadlineExceededError: the deadline passed first.
            ForwardError: the batch of one of the items failed.
        """
        self._loop = asyncio.get_running_loop()
        request: _Request[Result] = _Request(
            self._loop.create_future(), size=len(items), deadline=deadline
        )
        self._enqueue(key, items, request)
        reason: DropReason = "abandoned"
        try:
            left_s = None if deadline == math.inf else deadline - time.monotonic()
            async with asyncio.timeout(left_s):
                return await request.future
        except TimeoutError:
            reason = "expired"
            raise DeadlineExceededError("the deadline passed before the answer") from None
        finally:
            self._withdraw(key, request, reason)

    def take(self) -> Batch[Item, Result] | None:
        """The next batch, as soon as there is one; None once closed and empty. Blocks."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._depth or self._is_closed)
                if not self._depth:
                    return None
                key = min(self._queues, key=lambda key: self._queues[key][0].arrived)
                self._wait_for_company(key)
                if taken := self._pop(key):
                    return self._batch(key, taken)

    def close(self) -> None:
        """Refuse new items; what was accepted is still handed out."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _enqueue(self, key: Hashable, items: Sequence[Item], request: _Request[Result]) -> None:
        arrived = time.monotonic()
        with self._changed:
            if self._is_closed:
                raise NotReadyError("the service is shutting down")
            if self._depth and self._depth + len(items) > self._queue_size:
                raise QueueFullError(
                    f"{self._depth} images wait and {len(items)} more do not fit; "
                    f"the limit is {self._queue_size}",
                    retry_after_s=self.retry_after_s(),
                )
            self._queues.setdefault(key, deque()).extend(
                _Pending(item, request, position, arrived) for position, item in enumerate(items)
            )
            self._depth += len(items)
            self._changed.notify()

    def _withdraw(self, key: Hashable, request: _Request[Result], reason: DropReason) -> None:
        """Take what still waits of a request that has ended out of the queue."""
        if request.is_answered():
            return
        with self._changed:
            queue = self._queues.get(key, deque())
            kept = deque(pending for pending in queue if pending.request is not request)
            dropped = len(queue) - len(kept)
            self._depth -= dropped
            self._replace(key, kept)
        if dropped:
            self._on_drop(reason, dropped)

    def _wait_for_company(self, key: Hashable) -> None:
        if not self._max_wait_s:
            return
        until = self._queues[key][0].arrived + self._max_wait_s
        self._changed.wait_for(
            lambda: self._is_closed or len(self._queues.get(key, ())) >= self._max_batch_size,
            timeout=max(0, until - time.monotonic()),
        )

    def _pop(self, key: Hashable) -> list[_Pending[Item, Result]]:
        """Up to a batch of the items of ``key`` that somebody still waits for."""
        queue = self._queues.get(key, deque())
        taken: list[_Pending[Item, Result]] = []
        now, expired = time.monotonic(), 0
        while queue and len(taken) < self._max_batch_size:
            pending = queue.popleft()
            self._depth -= 1
            if pending.request.deadline <= now:
                expired += 1
            elif not pending.request.future.done():
                taken.append(pending)
        self._replace(key, queue)
        if self._depth:
            self._changed.notify()
        if expired:
            self._on_drop("expired", expired)
        return taken

    def _replace(self, key: Hashable, queue: deque[_Pending[Item, Result]]) -> None:
        if queue:
            self._queues[key] = queue
        else:
            self._queues.pop(key, None)

    def _batch(self, key: Hashable, taken: Sequence[_Pending[Item, Result]]) -> Batch[Item, Result]:
        assert self._loop is not None, "an item can only come from submit"
        now = time.monotonic()
        return Batch(
            key=key,
            items=[pending.item for pending in taken],
            waits_s=[now - pending.arrived for pending in taken],
            _requests=[(pending.request, pending.position) for pending in taken],
            _loop=self._loop,
            _measure=self._measure,
        )

    def _measure(self, seconds_per_item: float) -> None:
        with self._changed:
            if self._seconds_per_item == 0:
                self._seconds_per_item = seconds_per_item
            self._seconds_per_item += _LATEST_WEIGHT * (seconds_per_item - self._seconds_per_item)
