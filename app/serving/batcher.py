"""Dynamic batching between an event loop that submits and threads that take batches.

Work-conserving: a thread that is free takes whatever waits, at once; while all are busy, what
arrives gathers into the next batch. A device that computes one batch after the other is busy with
the first; its other threads send full ones ahead. Nothing polls: threads sleep on a condition,
requests on a future. An item whose request is gone or late leaves the queue before it reaches a
thread.

A lone item of the event loop's own may come back to it, to be run at once: see
:meth:`Submission.put_or_take`.

An item holds a place from the moment its request is let in, before it is decoded, until a thread
takes it. A request is refused when there are too few places, or when what is ahead of it would
take longer than it can wait: it learns so at once, and nothing is computed in vain.
"""

import asyncio
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

from app.errors import DeadlineExceededError, NotReadyError, QueueFullError
from app.serving.deadlines import Deadlines
from app.serving.sharing import Sharing
from app.serving.stages import Interval, intervals

Item = TypeVar("Item")
Result = TypeVar("Result")
DropReason = Literal["expired", "abandoned"]

_ITEM_WEIGHT: Final = 0.05
"""Of one item in the moving average of the seconds an item takes."""
_FASTER_WEIGHT: Final = 0.5
"""Of a batch that was faster than the average."""
_MOST_SLOWER: Final = 4
"""Times than the average that a batch counts as, however long it took."""
_WAITING_SHARE: Final = 0.5
"""Of the time to a deadline that waiting may take: the estimate errs, and a late answer is lost."""
_BACKGROUND_BATCHES: Final = 4
"""Batches of background items that may wait."""
_SOLITUDE_S: Final = 0.1
"""After the last time that a request found another one under way."""
_WORTH_A_PART: Final = 12
"""Items that wait beside a batch under way, of which a spare thread may take a part."""


class _Request(Generic[Result]):
    """The items of one request, answered together."""

    def __init__(
        self,
        future: asyncio.Future[list[Result]],
        *,
        size: int,
        deadline: float,
        kept: list[Interval] | None,
    ) -> None:
        self.size = size
        self.deadline = deadline
        self.kept = kept
        self._future: asyncio.Future[list[Result]] | None = future
        self._results: dict[int, Result] = {}
        self._is_expired = False

    @property
    def is_over(self) -> bool:
        future = self._future
        return future is None or future.done()

    @property
    def is_answered(self) -> bool:
        assert self._future is not None, "only before it is let go"
        return self.is_over and not (self._future.cancelled() or self._is_expired)

    async def answer(self) -> list[Result]:
        assert self._future is not None, "it is waited for once"
        results = await self._future
        if self._is_expired:
            raise DeadlineExceededError("the deadline passed before the answer")
        return results

    def settle(self, position: int, result: Result) -> None:
        self._results[position] = result
        if len(self._results) == self.size and self._future is not None and not self.is_over:
            self._future.set_result([self._results[place] for place in range(self.size)])

    def fail(self, error: Exception) -> None:
        if self._future is not None and not self.is_over:
            self._future.set_exception(error)

    def expire(self) -> None:
        if self._future is not None and not self.is_over:
            self._is_expired = True
            self._future.set_result([])

    def let_go(self) -> None:
        # An error in the future leads by the frames it went through back to this request, and to
        # the upload: they would stay until the collector of garbage comes by.
        self._future = None


class _Lane(NamedTuple):
    """Items that may share a batch; those in the background wait for all others."""

    is_background: bool
    key: Hashable


class _Pending(NamedTuple, Generic[Item, Result]):
    """One item on its way."""

    item: Item
    request: _Request[Result]
    position: int
    arrived: float


class Places:
    """Places in the queue held for items that are still being prepared."""

    def __init__(self, count: int) -> None:
        self.count = count


@dataclass(frozen=True)
class Batch(Generic[Item, Result]):
    """Items of one key; who took them must end it with ``complete`` or ``fail``, and take more."""

    key: Hashable
    items: Sequence[Item]
    waits_s: Sequence[float]
    """How long each item waited in the queue."""
    is_alone: bool
    """Whether no other item was on its way, to whatever device, when these were taken."""
    _requests: Sequence[tuple[_Request[Result], int]]
    _loop: asyncio.AbstractEventLoop
    _on_end: Callable[[int], None]
    _is_in_loop: bool

    def complete(self, results: Sequence[Result]) -> None:
        """Answer the items, in order; for the thread that took them to call."""
        self._on_end(len(self.items))
        self._tell(self._settle, results)

    def fail(self, error: Exception) -> None:
        """Fail the requests in this batch, and no others; for the thread that took them to call."""
        self._on_end(len(self.items))
        self._tell(self._fail, error)

    def _tell(self, call: Callable[[Any], None], found: Any) -> None:
        if self._is_in_loop:
            call(found)
        else:
            self._loop.call_soon_threadsafe(call, found)

    def trace(self, *, forward_started: float, forward_s: float) -> None:
        """Tell the traced requests in this batch of its wait and its forward pass."""
        waits_s = {
            request: wait_s
            for (request, _), wait_s in zip(self._requests, self.waits_s, strict=True)
            if request.kept is not None
        }
        for request, wait_s in waits_s.items():
            assert request.kept is not None
            request.kept += [
                Interval("queue", forward_started - wait_s, forward_started),
                Interval("forward", forward_started, forward_started + forward_s),
            ]

    def _settle(self, results: Sequence[Result]) -> None:
        for (request, position), result in zip(self._requests, results, strict=True):
            request.settle(position, result)

    def _fail(self, error: Exception) -> None:
        for request, _ in self._requests:
            request.fail(error)


@dataclass(frozen=True)
class _Mark:
    """A moment when a thread was free, and how many items had ended by then."""

    time: float
    ended: int


class _Pace:
    """Seconds that an item takes, all threads together, measured while there is work.

    The first batches after a rest, one a thread, are not a measure: their time is that of decoding
    what came with them.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds_per_item = 0.0
        self.items = 0
        """Let in, and not answered or dropped yet."""
        self._ended = 0
        self._last_end: float | None = None

    def begin(self, count: int) -> None:
        self.items += count

    def drop(self, count: int) -> None:
        self.items -= count
        self._rest_if_idle()

    def take(self) -> _Mark | None:
        """What is to be told at the end of a batch that is taken now."""
        return None if self._last_end is None else _Mark(self._last_end, self._ended)

    def end(self, count: int, mark: _Mark | None) -> None:
        """A batch has ended, and others beside it since it was taken: the time was for all."""
        now = self._clock()
        self._ended += count
        if mark is not None:
            self._take_in((now - mark.time) / (self._ended - mark.ended), count)
        self._last_end = now
        self.items -= count
        self._rest_if_idle()

    def _take_in(self, sample: float, count: int) -> None:
        weight = 1.0
        if self.seconds_per_item:
            weight = 1 - (1 - _ITEM_WEIGHT) ** count
            # A process that was suspended has not become slow.
            sample = min(sample, _MOST_SLOWER * self.seconds_per_item)
        if sample < self.seconds_per_item:
            # Who is refused for a pace that was slow once never shows it faster.
            weight = max(weight, _FASTER_WEIGHT)
        self.seconds_per_item += weight * (sample - self.seconds_per_item)

    def _rest_if_idle(self) -> None:
        if self.items == 0:
            self._last_end = None


class Submission(Generic[Item, Result]):
    """A request for one item that is still being prepared."""

    def __init__(
        self,
        batcher: "Batcher[Item, Result]",
        lane: _Lane,
        request: _Request[Result],
        places: Places,
    ) -> None:
        self._batcher = batcher
        self._lane = lane
        self._request = request
        self._places = places

    def put(self, item: Item) -> None:
        """The item is ready; for any thread to call."""
        self._batcher._enqueue(self._lane, [item], self._request, self._places)

    def put_or_take(self, item: Item, device: str) -> Batch[Item, Result] | None:
        """The item is ready; for the event loop alone to call.

        A lone item comes back as a batch, which the caller must end at once: two threads would only
        hand it to each other. One is lone when nothing else is on its way, or has lately been.
        """
        return self._batcher._enqueue_or_take(
            self._lane, item, self._request, self._places, device=device
        )

    def fail(self, error: Exception) -> None:
        """There will be no item; for any thread to call."""
        self._batcher._call_soon(self._request.fail, error)

    async def result(self) -> Result:
        """The item's result; as :meth:`Batcher.submit`, or what :meth:`fail` was told."""
        [result] = await self._batcher._answer(self._lane, self._request)
        return result


class Batcher(Generic[Item, Result]):
    """A bounded queue of items, handed out in batches of one key.

    Args:
        max_batch_size: most items in a batch; a request with more is split.
        queue_size: most items waiting; a request with more is accepted by an empty queue alone.
        max_wait_s: how long a free thread waits for a batch to fill; 0 never delays.
        batch_size_of: of items of that key, where it is smaller.
        batches_of: batches that one device may run at once while one of that key is among them.
        computes_in_turn: whether a device computes one batch after the other. What arrives while it
            does gathers; a full batch may be sent ahead, where no other device is free.
        splits: whether a batch of that key may leave a part to a spare thread of the device.
        on_drop: told of items that left the queue unanswered.
        lag_s: how long an item has waited already when it is heard of.
        deadlines: shared with others; on that clock.
        clock: in seconds, the one deadlines are on.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        queue_size: int,
        max_wait_s: float = 0,
        batch_size_of: Callable[[Hashable], int] | None = None,
        batches_of: Callable[[Hashable, str], int] = lambda key, device: 1,
        computes_in_turn: Callable[[str], bool] = lambda device: False,
        splits: Callable[[Hashable, str], bool] = lambda key, device: False,
        on_drop: Callable[[DropReason, int], None] = lambda reason, count: None,
        lag_s: Callable[[], float] = lambda: 0.0,
        deadlines: Deadlines | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._queue_size = queue_size
        self._max_wait_s = max_wait_s
        self._batch_size_of = batch_size_of or (lambda key: max_batch_size)
        self._batches_of = batches_of
        self._computes_in_turn = computes_in_turn
        self._splits = splits
        self._running: defaultdict[str, list[_Lane]] = defaultdict(list)
        """Of the batches under way on a device, parts of them aside."""
        self._running_parts: Counter[str] = Counter()
        self._idle: Counter[str] = Counter()
        self._gathering = 0
        self._on_drop = on_drop
        self._lag_s = lag_s
        self._deadlines = deadlines or Deadlines(clock=clock)
        self._clock = clock
        self._spare_devices: set[str] = set()
        """Of spare threads that wait."""
        self._left: dict[str, tuple[_Lane, int]] = {}
        """To spare threads that have not woken yet, by device: how many items of which lane."""
        self._sharing: defaultdict[str, Sharing] = defaultdict(Sharing)
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._is_left = threading.Condition(lock)
        self._queues: dict[_Lane, deque[_Pending[Item, Result]]] = {}
        self._depths = {False: 0, True: 0}
        self._held = 0
        self._latest_batch_size = max_batch_size
        self._pace = _Pace(clock)
        self._company_until = -math.inf
        self._was_lone = False
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def depth(self) -> int:
        """Items that wait for a thread or are being prepared for it; without the background."""
        return self._depths[False] + self._held

    def retry_after_s(self) -> int:
        """Whole seconds until the queue of now is worked off at the measured pace; at least 1."""
        return max(1, math.ceil(self._expected_wait_s()))

    def check_room(self, count: int = 1, *, deadline: float = math.inf) -> None:
        """Whether ``count`` more items would be let in.

        Raises:
            QueueFullError: they do not fit, or would be answered too late.
            NotReadyError: the batcher is closed.
        """
        if self._is_closed:
            raise NotReadyError("the service is shutting down")
        if self.depth and self.depth + count > self._queue_size:
            raise QueueFullError(
                f"{self.depth} images wait and {count} more do not fit; "
                f"the limit is {self._queue_size}",
                retry_after_s=self.retry_after_s(),
            )
        wait_s, left_s = self._expected_wait_s(), deadline - self._clock()
        if wait_s > _WAITING_SHARE * left_s and left_s > 0:
            raise QueueFullError(
                f"{self.depth} images wait, about {wait_s:.1f} s; "
                f"the deadline is in {left_s:.1f} s",
                retry_after_s=self.retry_after_s(),
            )

    @contextmanager
    def places(self, count: int, *, deadline: float = math.inf) -> Iterator[Places]:
        """Hold ``count`` places for items that will be submitted, or not, inside the context.

        Raises:
            QueueFullError: they do not fit, or would be answered too late.
            NotReadyError: the batcher is closed.
        """
        with self._changed:
            self.check_room(count, deadline=deadline)
            self._held += count
            self._pace.begin(count)
            # A lone one that this turn of the event loop has run kept others waiting.
            if self._pace.items > 1 or self._was_lone:
                self._company_until = self._clock() + _SOLITUDE_S
        held = Places(count)
        try:
            yield held
        finally:
            with self._changed:
                self._give_up(held)

    async def submit(
        self,
        key: Hashable,
        items: Sequence[Item],
        *,
        deadline: float = math.inf,
        places: Places | None = None,
        is_background: bool = False,
    ) -> list[Result]:
        """The results of ``items``, in order, once the last of them is done.

        Cancelling takes the items that still wait out of the queue.

        Args:
            key: only items of equal keys share a batch.
            items: at least one.
            deadline: on the clock of ``time.monotonic``.
            places: held for these items; without them room is asked for now.
            is_background: wait until nothing else does, in a small queue of their own.

        Raises:
            QueueFullError: the queue has no room.
            NotReadyError: the batcher is closed.
            DeadlineExceededError: the deadline passed first.
            ForwardError: the batch of one of the items failed.
        """
        # What runs in the background outlives the request that caused it, and its trace.
        kept = None if is_background else intervals()
        request = self._request(len(items), deadline=deadline, kept=kept)
        lane = _Lane(is_background, key)
        self._enqueue(lane, items, request, places)
        return await self._answer(lane, request)

    def begin(
        self, key: Hashable, *, places: Places, deadline: float = math.inf
    ) -> Submission[Item, Result]:
        """A request for one item, which may come from any thread.

        Args:
            key: only items of equal keys share a batch.
            places: one, held for the item.
            deadline: on the clock of ``time.monotonic``; also of the item's coming.
        """
        request = self._request(1, deadline=deadline, kept=intervals())
        return Submission(self, _Lane(False, key), request, places)

    def take(self, device: str = "cpu") -> Batch[Item, Result] | None:
        """The next batch, as soon as there is one; None once closed and empty. Blocks.

        Args:
            device: that the calling thread runs batches on.
        """
        with self._changed:
            while True:
                lane = self._wait_for_turn(device)
                if lane is None:
                    return None
                if batch := self._pop_batch(lane, device):
                    return batch
                # It may be all that holds a model which was let go.
                del lane

    def take_part(self, device: str = "cpu") -> Batch[Item, Result] | None:
        """A part of what there is for another batch beside one under way. Blocks.

        None once the batcher is closed and empty.

        Args:
            device: that the calling thread, one for each device at most, runs parts on.
        """
        with self._changed:
            while True:
                self._spare_devices.add(device)
                self._is_left.wait_for(lambda: self._part(device) or self._is_over())
                self._spare_devices.discard(device)
                if (batch := self._pop_part(device)) or self._is_over():
                    return batch

    def close(self) -> None:
        """Refuse new items; what was accepted is still handed out."""
        with self._changed:
            self._is_closed = True
            self._wake()

    def _request(
        self, size: int, *, deadline: float, kept: list[Interval] | None
    ) -> _Request[Result]:
        self._loop = asyncio.get_running_loop()
        return _Request(self._loop.create_future(), size=size, deadline=deadline, kept=kept)

    def _call_soon(self, call: Callable[[Exception], None], error: Exception) -> None:
        assert self._loop is not None, "only what a request was made for can fail"
        self._loop.call_soon_threadsafe(call, error)

    async def _answer(self, lane: _Lane, request: _Request[Result]) -> list[Result]:
        self._deadlines.add(request.deadline, request.expire)
        reason: DropReason = "abandoned"
        try:
            return await request.answer()
        except DeadlineExceededError:
            reason = "expired"
            raise
        finally:
            self._deadlines.remove(request.deadline, request.expire)
            self._withdraw(lane, request, reason)
            request.let_go()

    def _wait_for_turn(self, device: str) -> _Lane | None:
        """The lane that the device is to take a batch of; None once closed and empty."""
        self._idle[device] += 1
        self._changed.wait_for(lambda: self._next_lane(device) or self._is_over())
        self._idle[device] -= 1
        return self._next_lane(device)

    def _next_lane(self, device: str) -> _Lane | None:
        """The lane whose turn it is, if the device may run a batch of it beside those it runs.

        If it may not, nothing goes before it: it would wait for ever where others come and go.
        """
        lane, running = self._first_lane(), self._running[device]
        if lane is None or not running:
            return None if lane and lane.is_background and self._running_parts[device] else lane
        most = min(self._batches_of(other.key, device) for other in [lane, *running])
        if lane.is_background or len(running) >= most:
            return None
        return lane if self._is_worth_a_batch_more(lane, device) else None

    def _is_worth_a_batch_more(self, lane: _Lane, device: str) -> bool:
        """Whether a device that is busy should have another batch now."""
        if not self._computes_in_turn(device):
            return True
        is_full = len(self._queues[lane]) >= self._batch_size(lane)
        is_another_free = any(
            idle and not self._running[other] for other, idle in self._idle.items()
        )
        # What fills a batch that is gathered is that batch's.
        return is_full and not is_another_free and not self._gathering

    def _first_lane(self) -> _Lane | None:
        return min(
            self._queues,
            key=lambda lane: (lane.is_background, self._queues[lane][0].arrived),
            default=None,
        )

    def _wake(self) -> None:
        """Tell the threads that wait for work, where there is some for them."""
        devices = [device for device, idle in self._idle.items() if idle]
        if self._is_closed or any(map(self._part, self._spare_devices)):
            self._is_left.notify_all()
        if self._gathering or self._is_closed:
            self._changed.notify_all()
        elif any(self._next_lane(device) for device in devices):
            # Of one device any thread will do; of several it might be the wrong one.
            self._changed.notify(1 if len(devices) == 1 else self._idle.total())

    def _is_finished(self) -> bool:
        return self._is_closed and not self._held

    def _is_over(self) -> bool:
        return self._is_finished() and not self._queues

    def _expected_wait_s(self) -> float:
        # An item is answered with its batch, which takes as long as all who travel in it. Of what
        # kind it will be is not known yet; the latest that came is the best guess.
        ahead = self.depth + min(self.depth, self._latest_batch_size)
        return ahead * self._pace.seconds_per_item + self._lag_s()

    def _give_up(self, held: Places) -> None:
        self._held -= held.count
        self._pace.drop(held.count)
        held.count = 0
        if self._is_finished():
            self._wake()

    def _enqueue(
        self,
        lane: _Lane,
        items: Sequence[Item],
        request: _Request[Result],
        places: Places | None,
        *,
        wakes: bool = True,
    ) -> None:
        arrived = self._clock()
        with self._changed:
            if request.is_over:
                return  # while its item was prepared: its place has been given back
            if lane.is_background:
                self._check_background(len(items))
            else:
                self._latest_batch_size = self._batch_size(lane)
                if places is None:
                    self.check_room(len(items), deadline=request.deadline)
            self._pace.begin(len(items))
            if places is not None:
                # After the items have begun: handing them over is no rest.
                self._give_up(places)
            self._queues.setdefault(lane, deque()).extend(
                _Pending(item, request, position, arrived) for position, item in enumerate(items)
            )
            self._depths[lane.is_background] += len(items)
            if wakes:
                self._wake()

    def _enqueue_or_take(
        self, lane: _Lane, item: Item, request: _Request[Result], places: Places, *, device: str
    ) -> Batch[Item, Result] | None:
        with self._changed:
            is_lone = (
                self._pace.items == 1
                and self._clock() >= self._company_until
                and not (self._running[device] or self._max_wait_s or self._is_closed)
            )
            self._enqueue(lane, [item], request, places, wakes=not is_lone)
            batch = self._pop_batch(lane, device, is_in_loop=True) if is_lone else None
        if batch is not None:
            assert self._loop is not None, "an item can only come from a request"
            self._was_lone = True
            self._loop.call_soon(self._turn_over)
        return batch

    def _turn_over(self) -> None:
        self._was_lone = False

    def _check_background(self, count: int) -> None:
        room = _BACKGROUND_BATCHES * self._max_batch_size - self._depths[True]
        if self._is_closed or count > room:
            raise QueueFullError(
                f"{count} images do not fit in the background; there is room for {room}",
                retry_after_s=self.retry_after_s(),
            )

    def _withdraw(self, lane: _Lane, request: _Request[Result], reason: DropReason) -> None:
        """Take what still waits of a request that has ended out of the queue."""
        if request.is_answered:
            return
        with self._changed:
            queue = self._queues.get(lane, deque())
            kept = deque(pending for pending in queue if pending.request is not request)
            dropped = len(queue) - len(kept)
            self._drop(lane, dropped)
            self._replace(lane, kept)
            # What it kept from its turn may have it now.
            self._wake()
        if dropped:
            self._on_drop(reason, dropped)

    def _drop(self, lane: _Lane, count: int) -> None:
        self._depths[lane.is_background] -= count
        self._pace.drop(count)

    def _wait_for_company(self, lane: _Lane) -> None:
        if not self._max_wait_s or lane.is_background:
            return
        until = self._queues[lane][0].arrived + self._max_wait_s
        self._gathering += 1
        self._changed.wait_for(
            lambda: self._is_closed or len(self._queues.get(lane, ())) >= self._batch_size(lane),
            timeout=max(0, until - self._clock()),
        )
        self._gathering -= 1

    def _pop(self, lane: _Lane, size: int) -> list[_Pending[Item, Result]]:
        """Up to ``size`` of the items of a lane that somebody still waits for."""
        queue = self._queues.get(lane, deque())
        taken: list[_Pending[Item, Result]] = []
        now, expired, gone = self._clock(), 0, 0
        while queue and len(taken) < size:
            pending = queue.popleft()
            if pending.request.deadline <= now:
                expired += 1
            elif pending.request.is_over:
                gone += 1
            else:
                taken.append(pending)
        self._depths[lane.is_background] -= len(taken)
        self._drop(lane, expired + gone)
        self._replace(lane, queue)
        if expired:
            self._on_drop("expired", expired)
        return taken

    def _pop_batch(
        self, lane: _Lane, device: str, *, is_in_loop: bool = False
    ) -> Batch[Item, Result] | None:
        # Before it gathers: another thread would else take its place.
        self._running[device].append(lane)
        self._wait_for_company(lane)
        if taken := self._pop(lane, self._leave_part(lane, device)):
            self._wake()
            end = partial(self._end, device, lane=lane, mark=self._pace.take())
            return self._batch(lane, taken, end, is_in_loop=is_in_loop)
        self._running[device].remove(lane)
        # What this kept from its turn may have it now.
        self._wake()
        return None

    def _leave_part(self, lane: _Lane, device: str) -> int:
        """Leave a part to a spare thread that waits for one; how many items the batch has then."""
        size = min(self._batch_size(lane), len(self._queues.get(lane, ())))
        left = self._part_of(lane, device, size) if device in self._spare_devices else 0
        self._left.pop(device, None)
        if left:
            self._left[device] = lane, left
        return size - left

    def _pop_part(self, device: str) -> Batch[Item, Result] | None:
        if not (part := self._part(device)):
            return None
        self._left.pop(device, None)
        taken = self._pop(*part)
        # What is first in the queue now may be something that another thread may run.
        self._wake()
        if not taken:
            return None
        self._running_parts[device] += 1
        end = partial(
            self._end_part,
            device,
            mark=self._pace.take(),
            started=self._clock(),
            computed_before_s=time.thread_time(),
        )
        return self._batch(part[0], taken, end)

    def _part(self, device: str) -> tuple[_Lane, int] | None:
        """What a spare thread of the device may take now, and how many items of it.

        Only beside batches that may be split: others have all cores.
        """
        running = self._running[device]
        is_beside = running and all(self._splits(lane.key, device) for lane in running)
        if not is_beside or self._gathering:
            return None
        if part := self._left.get(device):
            return part
        lane = self._first_lane()
        if lane is None or len(self._queues[lane]) < _WORTH_A_PART:
            return None
        size = self._part_of(lane, device, len(self._queues[lane]))
        return (lane, size) if size else None

    def _part_of(self, lane: _Lane, device: str, size: int) -> int:
        if lane.is_background or not self._splits(lane.key, device):
            return 0
        return self._sharing[device].part_of(min(size, self._batch_size(lane)))

    def _batch_size(self, lane: _Lane) -> int:
        return min(self._max_batch_size, self._batch_size_of(lane.key))

    def _replace(self, lane: _Lane, queue: deque[_Pending[Item, Result]]) -> None:
        if queue:
            self._queues[lane] = queue
        else:
            self._queues.pop(lane, None)

    def _batch(
        self,
        lane: _Lane,
        taken: Sequence[_Pending[Item, Result]],
        on_end: Callable[[int], None],
        *,
        is_in_loop: bool = False,
    ) -> Batch[Item, Result]:
        assert self._loop is not None, "an item can only come from a request"
        now = self._clock()
        return Batch(
            key=lane.key,
            items=[pending.item for pending in taken],
            waits_s=[now - pending.arrived for pending in taken],
            is_alone=self._pace.items == len(taken),
            _requests=[(pending.request, pending.position) for pending in taken],
            _loop=self._loop,
            _on_end=on_end,
            _is_in_loop=is_in_loop,
        )

    def _end(self, device: str, count: int, *, lane: _Lane, mark: _Mark | None) -> None:
        with self._changed:
            self._pace.end(count, mark)
            # The thread that ends a batch takes the next one, and then wakes others: to wake one
            # now would only make it wait for the lock.
            self._running[device].remove(lane)
            # Its key may be all that holds a model which was let go.
            self._left.pop(device, None)

    def _end_part(
        self,
        device: str,
        count: int,
        *,
        mark: _Mark | None,
        started: float,
        computed_before_s: float,
    ) -> None:
        computed_s = time.thread_time() - computed_before_s
        with self._changed:
            self._pace.end(count, mark)
            self._sharing[device].observe(self._clock() - started, computed_s=computed_s)
            self._running_parts[device] -= 1
            if self._depths[True]:
                self._wake()  # of which this thread takes nothing
