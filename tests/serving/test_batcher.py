"""The batcher: nothing waits without need, nothing is lost, nobody hurts a neighbour."""

import asyncio
import gc
import queue
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from app.errors import DeadlineExceededError, ForwardError, NotReadyError, QueueFullError
from app.serving.batcher import Batch, Batcher

Numbers = Batcher[int, int]
DEADLINE_S = 10


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario to its end, or fail."""
    asyncio.run(asyncio.wait_for(scenario, DEADLINE_S))


class Doubler:
    """A worker thread that doubles numbers, once it is let go."""

    def __init__(self, batcher: Numbers, *, held: bool = False, poison: int | None = None) -> None:
        self.batches: list[list[int]] = []
        self.keys: list[object] = []
        self._batcher, self._poison = batcher, poison
        self._may_run = threading.Event()
        if not held:
            self._may_run.set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def release(self) -> None:
        """Let a held worker go."""
        self._may_run.set()

    @contextmanager
    def working(self) -> Iterator["Doubler"]:
        """The thread runs inside the context and has ended after it."""
        self._thread.start()
        try:
            yield self
        finally:
            self._batcher.close()
            self._may_run.set()
            self._thread.join(DEADLINE_S)
            assert not self._thread.is_alive()

    def _run(self) -> None:
        self._may_run.wait(DEADLINE_S)
        while (batch := self._take()) is not None:
            self._answer(batch)

    def _take(self) -> Batch[int, int] | None:
        return self._batcher.take()

    def _answer(self, batch: Batch[int, int]) -> None:
        self.batches.append(list(batch.items))
        self.keys.append(batch.key)
        if self._poison in batch.items:
            batch.fail(ForwardError("poisoned"))
        else:
            batch.complete([2 * item for item in batch.items])


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        """The time it shows."""
        return self.now


def numbers(*, max_batch_size: int = 4, queue_size: int = 100, **options: Any) -> Numbers:
    """A small batcher."""
    return Batcher(max_batch_size=max_batch_size, queue_size=queue_size, **options)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until the condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is the batcher's state
            await asyncio.sleep(0)


async def requests(batcher: Numbers, count: int) -> list[asyncio.Future[list[int]]]:
    """That many, of one number each, once all of them wait."""
    asked = [asyncio.ensure_future(batcher.submit("key", [i])) for i in range(count)]
    await until(lambda: batcher.depth == count)
    return list(asked)


def test_answers_come_back_in_order() -> None:
    """A request gets the results of its own items, in order, whatever the batches were."""

    async def scenario() -> None:
        batcher = numbers(queue_size=1000)
        with Doubler(batcher).working():
            answers = await asyncio.gather(
                *(batcher.submit("key", list(range(i, i + 7))) for i in range(20))
            )
        assert answers == [[2 * item for item in range(i, i + 7)] for i in range(20)]

    run(scenario())


def test_batches_gather_while_the_worker_is_busy() -> None:
    """What waits is taken together, up to the limit in items; a large request is split."""

    async def scenario() -> None:
        batcher = numbers(max_batch_size=4)
        doubler = Doubler(batcher, held=True)
        with doubler.working():
            waiting = [asyncio.ensure_future(batcher.submit("key", [i])) for i in range(3)]
            waiting.append(asyncio.ensure_future(batcher.submit("key", [3, 4, 5])))
            await until(lambda: batcher.depth == 6)
            doubler.release()
            await asyncio.gather(*waiting)
        assert doubler.batches == [[0, 1, 2, 3], [4, 5]]

    run(scenario())


def test_keys_never_mix() -> None:
    """Items of different keys travel in different batches, the longest waiting first."""

    async def scenario() -> None:
        batcher = numbers()
        doubler = Doubler(batcher, held=True)
        with doubler.working():
            waiting = [
                asyncio.ensure_future(batcher.submit("odd" if i % 2 else "even", [i]))
                for i in range(4)
            ]
            await until(lambda: batcher.depth == 4)
            doubler.release()
            await asyncio.gather(*waiting)
        assert list(zip(doubler.keys, doubler.batches, strict=True)) == [
            ("even", [0, 2]),
            ("odd", [1, 3]),
        ]

    run(scenario())


def test_a_failed_batch_fails_its_own_requests() -> None:
    """The error reaches the requests of that batch; the worker goes on with the next."""

    async def scenario() -> None:
        batcher = numbers(max_batch_size=1)
        with Doubler(batcher, poison=1).working():
            answers = await asyncio.gather(
                *(batcher.submit("key", [i]) for i in range(3)), return_exceptions=True
            )
        assert answers[0] == [0]
        assert isinstance(answers[1], ForwardError)
        assert answers[2] == [4]

    run(scenario())


def test_cancelled_requests_leave_the_queue() -> None:
    """A request that is cancelled takes its waiting items along, and they are counted."""
    drops: list[tuple[str, int]] = []

    async def scenario() -> None:
        batcher = numbers(on_drop=lambda reason, count: drops.append((reason, count)))
        doubler = Doubler(batcher, held=True)
        with doubler.working():
            gone = asyncio.ensure_future(batcher.submit("key", [1, 2]))
            stays = asyncio.ensure_future(batcher.submit("key", [3]))
            await until(lambda: batcher.depth == 3)
            gone.cancel()
            await until(lambda: batcher.depth == 1)
            doubler.release()
            assert await stays == [6]
        assert doubler.batches == [[3]]

    run(scenario())
    assert drops == [("abandoned", 2)]


def test_cancelled_while_in_a_batch() -> None:
    """A request cancelled after its batch was taken does not disturb the batch."""

    async def scenario() -> None:
        batcher = numbers()
        gone = asyncio.ensure_future(batcher.submit("key", [1]))
        stays = asyncio.ensure_future(batcher.submit("key", [2]))
        await until(lambda: batcher.depth == 2)
        batch = await asyncio.to_thread(batcher.take)
        assert batch is not None
        gone.cancel()
        batch.complete([2, 4])
        assert await stays == [4]

    run(scenario())


def test_a_late_request_is_told_so() -> None:
    """Past its deadline a request fails and its items never reach the worker."""
    drops: list[tuple[str, int]] = []

    async def scenario() -> None:
        batcher = numbers(on_drop=lambda reason, count: drops.append((reason, count)))
        doubler = Doubler(batcher, held=True)
        with doubler.working():
            with pytest.raises(DeadlineExceededError):
                await batcher.submit("key", [1], deadline=0)
            doubler.release()
            assert await batcher.submit("key", [2]) == [4]
        assert doubler.batches == [[2]]

    run(scenario())
    assert drops == [("expired", 1)]


def test_a_full_queue_refuses() -> None:
    """Beyond ``queue_size`` items a request is refused, with the time to come back."""

    async def scenario() -> None:
        batcher = numbers(queue_size=2)
        with Doubler(batcher, held=True).working() as doubler:
            waiting = asyncio.ensure_future(batcher.submit("key", [1, 2]))
            await until(lambda: batcher.depth == 2)
            with pytest.raises(QueueFullError, match="the limit is 2") as refusal:
                await batcher.submit("key", [3])
            assert refusal.value.retry_after_s >= 1
            doubler.release()
            assert await waiting == [2, 4]

    run(scenario())


def test_a_request_larger_than_the_queue() -> None:
    """A request with more items than the queue holds is accepted while nothing waits."""

    async def scenario() -> None:
        batcher = numbers(queue_size=2)
        with Doubler(batcher).working():
            assert await batcher.submit("key", [1, 2, 3]) == [2, 4, 6]

    run(scenario())


def test_closing_answers_what_was_accepted() -> None:
    """A closed batcher refuses new items, hands out the accepted ones, then ends its workers."""

    async def scenario() -> None:
        batcher = numbers()
        with Doubler(batcher, held=True).working() as doubler:
            accepted = asyncio.ensure_future(batcher.submit("key", [1]))
            await until(lambda: batcher.depth == 1)
            batcher.close()
            with pytest.raises(NotReadyError):
                await batcher.submit("key", [2])
            doubler.release()
            assert await accepted == [2]

    run(scenario())


def test_waiting_for_company() -> None:
    """With ``max_wait_s`` a free worker waits for a full batch, and no longer than for that."""

    async def scenario() -> None:
        batcher = numbers(max_batch_size=2, max_wait_s=DEADLINE_S)
        with Doubler(batcher).working() as doubler:
            first = asyncio.ensure_future(batcher.submit("key", [1]))
            await until(lambda: batcher.depth == 1)
            assert await batcher.submit("key", [2]) == [4]
            assert await first == [2]
        assert doubler.batches == [[1, 2]]

    run(scenario())


def test_held_places_count_against_the_queue() -> None:
    """Items that are still being prepared hold their places, until they wait or are given up."""

    async def scenario() -> None:
        batcher = numbers(queue_size=2)
        with Doubler(batcher, held=True).working() as doubler:
            with batcher.places(2) as places:
                assert batcher.depth == 2
                with pytest.raises(QueueFullError), batcher.places(1):
                    pass
                # One of the two turned out not to be an item.
                waiting = asyncio.ensure_future(batcher.submit("key", [1], places=places))
                await until(lambda: batcher.depth == 1)
            assert batcher.depth == 1
            with batcher.places(1):
                assert batcher.depth == 2
            doubler.release()
            assert await waiting == [2]

    run(scenario())


def test_closing_waits_for_held_places() -> None:
    """What was let in before the end is answered although it came out of preparation after it."""

    async def scenario() -> None:
        batcher = numbers()
        with Doubler(batcher).working(), batcher.places(1) as places:
            batcher.close()
            assert await batcher.submit("key", [1], places=places) == [2]

    run(scenario())


def test_an_item_may_come_from_any_thread() -> None:
    """Its request holds a place until it is there, and is answered as any other."""

    async def scenario() -> None:
        batcher = numbers(queue_size=1)
        with Doubler(batcher).working(), batcher.places(1) as places:
            submission = batcher.begin("key", places=places)
            threading.Timer(0.05, submission.put, [4]).start()
            with pytest.raises(QueueFullError):
                batcher.check_room()
            assert await submission.result() == 8
            batcher.check_room()

    run(scenario())


def test_an_item_that_cannot_be_made() -> None:
    """Its request fails with the reason, and leaves nothing in the queue."""

    async def scenario() -> None:
        batcher = numbers(queue_size=1)
        with batcher.places(1) as places:
            submission = batcher.begin("key", places=places)
            threading.Timer(0.05, submission.fail, [ValueError("no image")]).start()
            with pytest.raises(ValueError, match="no image"):
                await submission.result()
        assert batcher.depth == 0

    run(scenario())


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_an_item_that_comes_when_nobody_waits_any_more(is_cancelled: bool) -> None:
    """The deadline passed, or the client went away, while it was made: it is not queued."""

    async def scenario() -> None:
        batcher = numbers(queue_size=1)
        deadline = time.monotonic() + (DEADLINE_S if is_cancelled else 0.05)
        with batcher.places(1) as places:
            submission = batcher.begin("key", places=places, deadline=deadline)
            waiting = asyncio.ensure_future(submission.result())
            await asyncio.sleep(0)
            if is_cancelled:
                waiting.cancel()
            with pytest.raises(asyncio.CancelledError if is_cancelled else DeadlineExceededError):
                await waiting
        submission.put(4)
        submission.fail(ValueError("no image"))
        await asyncio.sleep(0)
        assert batcher.depth == 0

    run(scenario())


def test_an_item_that_is_late_leaves_the_queue() -> None:
    """It was there in time, and no worker took it."""
    dropped: list[tuple[str, int]] = []

    async def scenario() -> None:
        batcher = numbers(on_drop=lambda reason, count: dropped.append((reason, count)))
        with batcher.places(1) as places:
            submission = batcher.begin("key", places=places, deadline=time.monotonic() + 0.05)
            submission.put(4)
            with pytest.raises(DeadlineExceededError):
                await submission.result()
        assert batcher.depth == 0

    run(scenario())
    assert dropped == [("expired", 1)]


def test_too_late_is_refused_at_once() -> None:
    """When what is ahead takes longer than a request can wait, it is refused, not kept waiting."""

    async def scenario() -> None:
        clock = Clock()
        batcher = numbers(max_batch_size=1, clock=clock)
        waiting = await requests(batcher, 4)
        for result in (0, 2):
            batch = batcher.take()
            assert batch is not None
            clock.now += 0.1  # the pace: an item takes a tenth of a second
            batch.complete([result])
        assert batcher.depth == 2
        with pytest.raises(QueueFullError, match=r"2 images wait, about 0\.3 s"):
            await batcher.submit("key", [4], deadline=clock.now + 0.2)
        waiting.append(asyncio.ensure_future(batcher.submit("key", [5], deadline=clock.now + 60)))
        await until(lambda: batcher.depth == 3)
        with Doubler(batcher).working():
            assert await asyncio.gather(*waiting) == [[0], [2], [4], [6], [10]]

    run(scenario())


def test_a_suspended_process_is_not_slow() -> None:
    """A batch that took minutes, among quick ones, makes nobody refused for long."""

    async def scenario() -> None:
        clock = Clock()
        batcher = numbers(max_batch_size=1, clock=clock)
        waiting = await requests(batcher, 5)
        for result, seconds in enumerate((0.1, 0.1, 600)):
            batch = batcher.take()
            assert batch is not None
            clock.now += seconds
            batch.complete([2 * result])
        waiting.append(asyncio.ensure_future(batcher.submit("key", [5], deadline=clock.now + 2)))
        await until(lambda: batcher.depth == 3)
        with Doubler(batcher).working():
            assert await asyncio.gather(*waiting) == [[0], [2], [4], [6], [8], [10]]

    run(scenario())


@pytest.mark.parametrize(("key", "largest"), [("large", 2), ("small", 4)])
def test_a_key_may_have_smaller_batches(key: str, largest: int) -> None:
    """Items whose key has a smaller batch size travel in batches of it, the others as before."""

    async def scenario() -> None:
        batcher = numbers(max_batch_size=4, batch_size_of=lambda key: 2 if key == "large" else 9)
        waiting = asyncio.ensure_future(batcher.submit(key, list(range(6))))
        await until(lambda: batcher.depth == 6)
        with Doubler(batcher).working() as doubler:
            assert await waiting == [0, 2, 4, 6, 8, 10]
        assert max(map(len, doubler.batches)) == largest

    run(scenario())


@pytest.mark.parametrize(("key", "wait_s"), [("large", 6), ("small", 8)])
def test_company_is_as_large_as_the_batches_of_the_key(key: str, wait_s: int) -> None:
    """Four wait, a second each: the next one travels with two more, or with four."""

    async def scenario() -> None:
        clock = Clock()
        batcher = numbers(batch_size_of=lambda key: 2 if key == "large" else 9, clock=clock)
        waiting = [asyncio.ensure_future(batcher.submit(key, [i])) for i in range(12)]
        await until(lambda: batcher.depth == 12)
        # The first batch shows no pace, those after it one item a second.
        taken = 0
        while taken < 8:
            batch = batcher.take()
            assert batch is not None
            taken += len(batch.items)
            clock.now += len(batch.items)
            batch.complete([2 * item for item in batch.items])
        assert batcher.retry_after_s() == wait_s
        with Doubler(batcher).working():
            assert await asyncio.gather(*waiting) == [[2 * i] for i in range(12)]

    run(scenario())


def test_the_first_batch_after_a_rest_is_no_pace() -> None:
    """A form whose images were long in decoding, on an idle service, makes nobody refused."""

    async def scenario() -> None:
        clock = Clock()
        batcher = numbers(max_batch_size=1, clock=clock)
        with batcher.places(1) as places:
            clock.now += 100  # decoding
            waiting = [
                asyncio.ensure_future(batcher.submit("key", [1], places=places)),
                asyncio.ensure_future(batcher.submit("key", [2])),
            ]
            await until(lambda: batcher.depth == 2)
            first = batcher.take()
            assert first is not None
            first.complete([2])
            batcher.check_room(1, deadline=clock.now + 0.01)
            with Doubler(batcher).working():
                assert await asyncio.gather(*waiting) == [[2], [4]]

    run(scenario())


def test_an_idle_batcher_lets_anything_try() -> None:
    """With nothing ahead a short deadline is no reason to refuse, however slow it was before."""

    async def scenario() -> None:
        clock = Clock()
        batcher = numbers(clock=clock)
        slow = asyncio.ensure_future(batcher.submit("key", [1]))
        await until(lambda: batcher.depth == 1)
        batch = batcher.take()
        assert batch is not None
        clock.now += 100
        batch.complete([2])
        assert await slow == [2]
        batcher.check_room(1, deadline=clock.now + 0.01)

    run(scenario())


def test_the_background_waits_for_all_others() -> None:
    """Background items travel when nothing else waits, and take nobody's place in the queue."""

    async def scenario() -> None:
        batcher = numbers(max_batch_size=2, queue_size=2)
        doubler = Doubler(batcher, held=True)
        with doubler.working():
            behind = asyncio.ensure_future(batcher.submit("key", [1, 2], is_background=True))
            await asyncio.sleep(0)
            ahead = asyncio.ensure_future(batcher.submit("key", [3, 4]))
            await until(lambda: batcher.depth == 2)
            with pytest.raises(QueueFullError, match="room for 6"):
                await batcher.submit("key", list(range(7)), is_background=True)
            doubler.release()
            assert await ahead == [6, 8]
            assert await behind == [2, 4]
        assert doubler.batches == [[3, 4], [1, 2]]

    run(scenario())


def test_two_batches_at_once_where_the_key_allows_it() -> None:
    """A second thread of the device gets a batch of a key that another already runs."""

    async def scenario() -> None:
        batcher = numbers(max_batch_size=1, batches_of=lambda key, device: 2)
        waiting = await requests(batcher, 3)
        first = batcher.take()
        assert first is not None
        with Doubler(batcher).working():
            assert await asyncio.gather(*waiting[1:]) == [[2], [4]]
            first.complete([0])
            assert await waiting[0] == [0]

    run(scenario())


Taken = queue.SimpleQueue[tuple[str, Batch[int, int] | None]]


def in_turn(**options: Any) -> Numbers:
    """A batcher for devices that compute one batch after the other, and may be sent a second."""
    return numbers(
        batches_of=lambda key, device: 2, computes_in_turn=lambda device: True, **options
    )


def take_aside(batcher: Numbers, device: str, taken: Taken) -> None:
    """A batch, taken in a thread of its own, with the device that it was taken for."""

    def take() -> None:
        taken.put((device, batcher.take(device)))

    threading.Thread(target=take, daemon=True).start()


async def next_of(taken: Taken) -> tuple[str, Batch[int, int]]:
    """The next batch that was taken, and for which device."""
    device, batch = await asyncio.to_thread(taken.get, timeout=DEADLINE_S)
    assert batch is not None
    return device, batch


def ask(batcher: Numbers, item: int) -> asyncio.Future[list[int]]:
    """A request for one number."""
    return asyncio.ensure_future(batcher.submit("key", [item]))


def test_a_busy_device_gathers_where_it_computes_in_turn() -> None:
    """What arrives waits for a full batch, which is sent ahead, or for a time without any."""

    async def scenario() -> None:
        batcher, taken = in_turn(max_batch_size=2), Taken()
        waiting = await requests(batcher, 1)
        first = batcher.take("cuda:0")
        assert first is not None
        take_aside(batcher, "cuda:0", taken)
        waiting += await requests(batcher, 1)
        await asyncio.sleep(0.05)
        assert taken.empty()
        waiting += [ask(batcher, item) for item in range(2)]
        _, second = await next_of(taken)
        for batch in (first, second):
            batch.complete(batch.items)
        take_aside(batcher, "cuda:0", taken)
        _, third = await next_of(taken)
        assert (len(second.items), len(third.items)) == (2, 1)
        third.complete(third.items)
        await asyncio.gather(*waiting)

    run(scenario())


def test_what_fills_a_gathering_batch_is_not_sent_elsewhere() -> None:
    """A device that waits for company has it, though a thread of a busy one is idle."""

    async def scenario() -> None:
        batcher, taken = in_turn(max_batch_size=2, max_wait_s=DEADLINE_S), Taken()
        waiting = await requests(batcher, 2)
        first = batcher.take("cuda:0")
        assert first is not None
        for device in ("cuda:1", "cuda:0"):
            take_aside(batcher, device, taken)
        await until(lambda: batcher._idle.total() == 2)
        waiting.append(ask(batcher, 2))
        await until(lambda: batcher._gathering == 1)
        waiting.append(ask(batcher, 3))
        device, second = await next_of(taken)
        assert (device, len(second.items)) == ("cuda:1", 2)
        for batch in (first, second):
            batch.complete(batch.items)
        await asyncio.gather(*waiting)
        batcher.close()

    for _ in range(20):  # which thread wakes first is chance
        run(scenario())


def test_a_free_device_goes_before_a_busy_one() -> None:
    """A full batch is not sent ahead to a device while another has nothing to compute."""

    async def scenario() -> None:
        batcher, taken = in_turn(max_batch_size=1), Taken()
        waiting = await requests(batcher, 1)
        first = batcher.take("cuda:0")
        assert first is not None
        for device in ("cuda:0", "cuda:1"):
            take_aside(batcher, device, taken)
        await until(lambda: batcher._idle.total() == 2)
        for device in ("cuda:1", "cuda:0"):
            waiting.append(ask(batcher, 1))
            taken_for, batch = await next_of(taken)
            assert taken_for == device
            batch.complete([2 * item for item in batch.items])
        first.complete([0])
        await asyncio.gather(*waiting)

    run(scenario())


class Spare(Doubler):
    """A spare thread that doubles numbers, as often as it is told to."""

    def __init__(self, batcher: Numbers, *, times: int = 1000) -> None:
        super().__init__(batcher)
        self._times = times

    def _take(self) -> Batch[int, int] | None:
        self._times -= 1
        return self._batcher.take_part() if self._times >= 0 else None


async def spare_waits(batcher: Numbers) -> None:
    """Return once a spare thread waits."""
    await until(lambda: batcher._spare_devices == {"cpu"})


def splitting(**options: Any) -> Numbers:
    """A batcher of batches of 32 whose parts may be left to a spare thread."""
    return numbers(max_batch_size=32, splits=lambda key, device: key != "whole", **options)


def test_a_part_of_a_batch_is_left_to_a_spare_thread() -> None:
    """It takes the last of the items, and all are answered."""

    async def scenario() -> None:
        batcher = splitting()
        with Spare(batcher).working() as spare:
            await spare_waits(batcher)
            many = asyncio.ensure_future(batcher.submit("key", list(range(10))))
            await until(lambda: batcher.depth == 10)
            batch = batcher.take()
            assert batch is not None
            assert list(batch.items) == list(range(6))
            assert not batch.is_alone
            await until(lambda: spare.batches == [[6, 7, 8, 9]])
            batch.complete([2 * item for item in batch.items])
            assert await many == [2 * item for item in range(10)]

    run(scenario())


def test_a_spare_thread_takes_nothing_where_nothing_else_runs() -> None:
    """A batch is begun by another thread, however many items wait."""

    async def scenario() -> None:
        batcher = splitting()
        with Spare(batcher).working() as spare:
            waiting = await requests(batcher, 20)
            await asyncio.sleep(0.05)
            assert spare.batches == []
            with Doubler(batcher).working():
                assert await asyncio.gather(*waiting) == [[2 * i] for i in range(20)]

    run(scenario())


@pytest.mark.parametrize(("more", "part"), [(11, 0), (12, 5), (100, 13)])
@pytest.mark.parametrize("running", ["key", "whole"])
def test_a_spare_thread_takes_a_part_of_what_comes_while_a_batch_runs(
    running: str, more: int, part: int
) -> None:
    """Where so much waits that it is worth it, and beside what leaves it a core."""

    async def scenario() -> None:
        batcher = splitting()
        first = asyncio.ensure_future(batcher.submit(running, list(range(20))))
        await until(lambda: batcher.depth == 20)
        batch = batcher.take()
        assert batch is not None
        assert len(batch.items) == 20, "no spare thread waits yet"
        expected = [list(range(20, 20 + part))] if part and running == "key" else []
        with Spare(batcher, times=1).working() as spare:
            later = asyncio.ensure_future(batcher.submit("key", list(range(20, 20 + more))))
            await until(lambda: batcher.depth == more - sum(map(len, expected)))
            await asyncio.sleep(0.05)
            assert spare.batches == expected
            batch.complete([2 * item for item in batch.items])
            with Doubler(batcher).working():
                assert await first == [2 * item for item in range(20)]
                assert await later == [2 * item for item in range(20, 20 + more)]

    run(scenario())


def test_nothing_is_taken_from_a_batch_that_gathers() -> None:
    """It is to fill first."""

    async def scenario() -> None:
        batcher = splitting(max_wait_s=DEADLINE_S)
        with Spare(batcher).working() as spare, Doubler(batcher).working() as worker:
            await spare_waits(batcher)
            first = asyncio.ensure_future(batcher.submit("key", list(range(16))))
            await asyncio.sleep(0.05)
            assert worker.batches == spare.batches == []
            second = asyncio.ensure_future(batcher.submit("key", list(range(16, 32))))
            await until(lambda: bool(worker.batches))
            batcher.close()  # what is left need not wait for more
            assert await first + await second == [2 * item for item in range(32)]
        assert worker.batches[0] == list(range(19))

    run(scenario())


def test_what_may_not_be_split_is_left_to_nobody() -> None:
    """Neither by its key, nor what is for the background; nor by what came after it."""

    async def scenario() -> None:
        batcher = splitting()
        with Spare(batcher).working() as spare:
            await spare_waits(batcher)
            whole = asyncio.ensure_future(batcher.submit("whole", list(range(20))))
            await until(lambda: batcher.depth == 20)
            hidden = asyncio.ensure_future(
                batcher.submit("key", list(range(20)), is_background=True)
            )
            split = asyncio.ensure_future(batcher.submit("key", list(range(20, 40))))
            await until(lambda: batcher.depth == 40)
            with Doubler(batcher).working() as worker:
                assert await whole == await hidden == [2 * item for item in range(20)]
                assert await split == [2 * item for item in range(20, 40)]
            assert worker.batches[0] == list(range(20))
            assert worker.batches[-1] == list(range(20))
            assert all(item >= 20 for batch in spare.batches for item in batch)

    run(scenario())


def test_the_background_waits_for_a_part() -> None:
    """It is not begun beside one, though the batch that the part was of has ended."""

    async def scenario() -> None:
        batcher = splitting()
        parts: list[Batch[int, int] | None] = []
        taking = threading.Thread(target=lambda: parts.append(batcher.take_part()))
        taking.start()
        await spare_waits(batcher)
        live = asyncio.ensure_future(batcher.submit("key", list(range(10))))
        await until(lambda: batcher.depth == 10)
        batch = batcher.take()
        assert batch is not None
        await until(lambda: bool(parts))
        hidden = asyncio.ensure_future(batcher.submit("key", [1], is_background=True))
        batch.complete([2 * item for item in batch.items])
        with Doubler(batcher).working() as worker:
            await asyncio.sleep(0.05)
            assert worker.batches == []
            assert parts[0] is not None
            await asyncio.to_thread(parts[0].complete, [2 * item for item in parts[0].items])
            assert await hidden == [2]
            assert await live == [2 * item for item in range(10)]
        taking.join(DEADLINE_S)

    run(scenario())


def test_what_was_left_holds_no_key() -> None:
    """It may be a model's: a part that nobody came for keeps none in memory."""

    class Key:
        """A model stands for it."""

    async def scenario() -> None:
        batcher = splitting()
        batcher._spare_devices.add("cpu")  # one waits, and does not wake
        key = Key()
        gone = weakref.ref(key)
        many = asyncio.ensure_future(batcher.submit(key, list(range(10))))
        await until(lambda: batcher.depth == 10)
        batch = batcher.take()
        assert batch is not None
        many.cancel()
        await asyncio.wait([many])
        batch.complete([2 * item for item in batch.items])
        await asyncio.sleep(0)
        del batch, many, key
        await until(lambda: not gc.collect() and gone() is None)

    run(scenario())


def test_the_last_part_ends_the_threads_that_wait() -> None:
    """A closed batcher is empty once it is taken, and they are told."""

    async def scenario() -> None:
        batcher = splitting()
        batcher._spare_devices.add("cpu")  # one waits, and has not woken yet
        many = asyncio.ensure_future(batcher.submit("key", list(range(10))))
        await until(lambda: batcher.depth == 10)
        batch = batcher.take()
        assert batch is not None
        with Doubler(batcher).working() as worker:
            batcher.close()
            await asyncio.sleep(0.05)
            part = batcher.take_part()
            assert part is not None
            await until(lambda: not worker._thread.is_alive())
            for one in (batch, part):
                one.complete([2 * item for item in one.items])
            assert await many == [2 * item for item in range(10)]

    run(scenario())


def test_what_a_spare_thread_does_not_come_for_is_taken_by_the_others() -> None:
    """It may get no core for long: what it has not taken is not bound to it."""

    async def scenario() -> None:
        batcher = splitting(queue_size=1000)
        with Spare(batcher).working(), Doubler(batcher).working():
            for _ in range(20):
                many = [batcher.submit("key", list(range(10 + n))) for n in range(10)]
                answers = await asyncio.gather(*many)
                assert answers == [[2 * i for i in range(10 + n)] for n in range(10)]
            assert batcher.depth == 0

    run(scenario())


@pytest.mark.parametrize("key", ["key", "whole"])
def test_a_spare_thread_ends_with_the_batcher(key: str) -> None:
    """What was accepted before is answered first, and every thread ends."""

    async def scenario() -> None:
        for _ in range(20):
            batcher = splitting()
            workers = [Doubler(batcher), Doubler(batcher), Spare(batcher)]
            with ExitStack() as stack:
                for worker in workers:
                    stack.enter_context(worker.working())
                many = asyncio.ensure_future(batcher.submit(key, list(range(40))))
                await asyncio.sleep(0)
                batcher.close()
                assert await many == [2 * item for item in range(40)]

    run(scenario())


@pytest.mark.parametrize(("first", "second"), [("one", "two"), ("two", "one"), ("one", "one")])
@pytest.mark.parametrize("max_wait_s", [0, 0.01])
def test_a_key_that_wants_the_device_for_itself_has_it(
    first: str, second: str, max_wait_s: float
) -> None:
    """Nothing runs beside a batch of it on its device, of whatever key."""

    async def scenario() -> None:
        batcher = numbers(
            batches_of=lambda key, device: 1 if key == "one" else 2, max_wait_s=max_wait_s
        )
        running: list[object] = []
        seen: list[list[object]] = []

        def work() -> None:
            while (batch := batcher.take()) is not None:
                running.append(batch.key)
                seen.append(list(running))
                time.sleep(0.001)  # a pass
                running.remove(batch.key)
                batch.complete(batch.items)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        keys = [first, second] * 20
        answers = await asyncio.gather(*(batcher.submit(key, [i]) for i, key in enumerate(keys)))
        batcher.close()
        for thread in threads:
            await asyncio.to_thread(thread.join, DEADLINE_S)
        assert answers == [[i] for i in range(40)]
        assert all(len(keys) == 1 for keys in seen if "one" in keys)

    run(scenario())


def test_the_background_waits_for_what_runs() -> None:
    """A background item is taken once nothing runs, though a thread was free before."""

    async def scenario() -> None:
        batcher = numbers(batches_of=lambda key, device: 2)
        live = asyncio.ensure_future(batcher.submit("key", [1]))
        await until(lambda: batcher.depth == 1)
        first = batcher.take()
        assert first is not None
        with Doubler(batcher).working() as doubler:
            shadow = asyncio.ensure_future(batcher.submit("key", [2], is_background=True))
            assert await batcher.submit("key", [3]) == [6]
            assert doubler.batches == [[3]]
            first.complete([2])
            with Doubler(batcher).working():  # who has ended a batch takes the next
                assert [*await asyncio.gather(live, shadow)] == [[2], [4]]

    run(scenario())


@pytest.mark.parametrize("apart_s", [0.5, 0.1, 0.01])
def test_the_pace_of_two_batches_at_once(apart_s: float) -> None:
    """Two at a time, a second each: half a second an item, however close together they end."""

    async def scenario() -> None:
        clock = Clock()
        batcher = numbers(max_batch_size=1, batches_of=lambda key, device: 2, clock=clock)
        waiting = await requests(batcher, 14)
        running = [batcher.take(), batcher.take()]
        for turn in range(10):
            batch = running.pop(0)
            assert batch is not None
            clock.now += apart_s if turn % 2 else 1 - apart_s
            batch.complete([2 * item for item in batch.items])
            running.append(batcher.take())
        # Two ahead and one for company, half a second each.
        assert batcher.depth == 2
        with pytest.raises(QueueFullError, match=r"2 images wait, about 1\.5 s"):
            batcher.check_room(1, deadline=clock.now + 1)
        for batch in running:
            assert batch is not None
            batch.complete([2 * item for item in batch.items])
        with Doubler(batcher).working():
            assert await asyncio.gather(*waiting) == [[2 * i] for i in range(14)]

    run(scenario())


def test_another_device_takes_what_one_may_not() -> None:
    """A key that one device may run no more batch of is taken by the other."""

    async def scenario() -> None:
        batcher = numbers(max_batch_size=1)
        waiting = await requests(batcher, 2)
        first, second = batcher.take("cuda:0"), batcher.take("cuda:1")
        assert first is not None
        assert second is not None
        second.complete([2])
        assert await waiting[1] == [2]
        first.complete([0])
        assert await waiting[0] == [0]

    run(scenario())


def test_a_thread_that_may_take_nothing_ends_with_the_last_batch() -> None:
    """Closed, with a batch under way and its key's turn to come: the idle threads end after it."""

    async def scenario() -> None:
        batcher = numbers(max_batch_size=1)
        waiting = await requests(batcher, 2)
        first = batcher.take()
        assert first is not None
        with Doubler(batcher).working(), Doubler(batcher).working():
            batcher.close()
            first.complete([0])
            assert await asyncio.gather(*waiting) == [[0], [2]]

    run(scenario())


async def lone(batcher: Numbers, item: int) -> tuple[bool, int]:
    """Whether an item came back to be run at once, and its result; a thread's where it did not."""
    with batcher.places(1) as places:
        submission = batcher.begin("key", places=places)
        batch = submission.put_or_take(item, "cpu")
        if batch is not None:
            batch.complete([2 * item for item in batch.items])
        return batch is not None, await submission.result()


def test_a_lone_item_comes_back() -> None:
    """The event loop runs it itself, again and again; no thread hears of it."""

    async def scenario() -> None:
        batcher = numbers()
        with Doubler(batcher).working() as worker:
            for item in range(3):
                assert await lone(batcher, item) == (True, 2 * item)
                await asyncio.sleep(0)
        assert worker.batches == []

    run(scenario())


def test_a_lone_item_whose_batch_fails() -> None:
    """The request fails, and the next one is lone again."""

    async def scenario() -> None:
        batcher = numbers()
        with batcher.places(1) as places:
            submission = batcher.begin("key", places=places)
            batch = submission.put_or_take(1, "cpu")
            assert batch is not None
            batch.fail(ForwardError("poisoned"))
            with pytest.raises(ForwardError, match="poisoned"):
                await submission.result()
        await asyncio.sleep(0)
        assert await lone(batcher, 2) == (True, 4)

    run(scenario())


def test_who_has_company_is_not_lone() -> None:
    """Nor who had some a moment ago: they are batched by the threads."""

    async def scenario() -> None:
        clock = Clock()
        batcher = numbers(clock=clock)
        with Doubler(batcher).working():
            with batcher.places(1):
                assert await lone(batcher, 1) == (False, 2)
            assert await lone(batcher, 2) == (False, 4)
            clock.now += 0.2
            assert await lone(batcher, 3) == (True, 6)

    run(scenario())


def test_only_one_item_a_turn_is_lone() -> None:
    """Those that came meanwhile would wait for one after the other."""

    async def scenario() -> None:
        batcher = numbers()
        with Doubler(batcher).working():
            found = await asyncio.gather(*(lone(batcher, item) for item in range(4)))
        assert found == [(True, 0), (False, 2), (False, 4), (False, 6)]

    run(scenario())


@pytest.mark.parametrize("what", ["running", "gathering", "late"])
def test_an_item_that_is_not_lone(what: str) -> None:
    """Beside a batch under way, where batches gather, or when its time is over."""

    async def scenario() -> None:
        clock = Clock()
        batcher = numbers(max_wait_s=1 if what == "gathering" else 0, clock=clock)
        deadline = clock.now + 1
        if what == "running":
            waiting = asyncio.ensure_future(batcher.submit("key", [7]))
            await until(lambda: batcher.depth == 1)
            assert batcher.take() is not None
        with batcher.places(1) as places:
            submission = batcher.begin("key", places=places, deadline=deadline)
            if what == "late":
                clock.now += 2
            assert submission.put_or_take(1, "cpu") is None
        if what == "running":
            waiting.cancel()

    run(scenario())
