"""One replica, request by request: SimPy's check of the queueing model and of the fleet's steps.

The replica is NormGate's: a bounded queue, a free server that takes what waits, a request refused
at the door when there is no room or when the wait would take more than half of its deadline, with
``Retry-After`` from the queue. A client that is refused asks once more, when it was told to.
"""

import math
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from benchmarks.scaling.batch_queue import BatchTime

Events = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Rules:
    """What a replica lets in.

    Args:
        queue_size: ``NORMGATE_QUEUE_SIZE``.
        deadline_s: ``NORMGATE_DEADLINE_MS``.
        waiting_share: of a deadline that waiting may take.
        max_wait_s: ``NORMGATE_MAX_WAIT_MS``.
        refusal_s: seconds of the server that a refusal takes.
    """

    queue_size: int = 1024
    deadline_s: float = 10.0
    waiting_share: float = 0.5
    max_wait_s: float = 0.0
    refusal_s: float = 0.0

    def expected_wait_s(self, time: BatchTime, waiting: int) -> float:
        """What a replica thinks that one more will wait behind ``waiting``."""
        return (waiting + min(waiting, time.batch_limit)) / time.capacity

    def has_room(self, time: BatchTime, waiting: int) -> bool:
        """Whether one more is let in."""
        if waiting + 1 > self.queue_size and waiting:
            return False
        return self.expected_wait_s(time, waiting) <= self.waiting_share * self.deadline_s

    def retry_after_s(self, time: BatchTime, waiting: int) -> int:
        """Told to one that is refused."""
        return max(1, math.ceil(self.expected_wait_s(time, waiting)))

    def most_waiting(self, time: BatchTime) -> int:
        """Beyond this many none is let in."""
        low, high = 0, self.queue_size
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.has_room(time, middle) else (low, middle)
        return low


@dataclass
class Outcome:
    """How requests ended, and how long those took that were answered, waits for a retry included.

    Every request of ``asked`` is in ``latencies_s`` or in ``refused`` in the end.
    """

    asked: int = 0
    retried: int = 0
    refused: int = 0
    latencies_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Waiting:
    arrived: float
    answered: simpy.Event


class Replica:
    """A server with a queue, from now on."""

    def __init__(
        self,
        env: simpy.Environment,
        time: BatchTime,
        rules: Rules,
        *,
        generator: np.random.Generator,
    ) -> None:
        self._env, self._time, self._rules, self._generator = env, time, rules, generator
        self._queue: deque[_Waiting] = deque()
        self._came = env.event()
        self._debt_s = 0.0
        self.waits_s: list[float] = []
        env.process(self._serve())

    def ask(self) -> simpy.Event | int:
        """What comes to pass with the answer, or after how many seconds to ask again."""
        waiting = len(self._queue)
        if not self._rules.has_room(self._time, waiting):
            self._debt_s += self._rules.refusal_s
            return self._rules.retry_after_s(self._time, waiting)
        one = _Waiting(self._env.now, self._env.event())
        self._queue.append(one)
        came, self._came = self._came, self._env.event()
        came.succeed()
        return one.answered

    def _serve(self) -> Events:
        while True:
            rested = not self._queue
            if rested:
                yield self._came
            yield from self._wait_for_company()
            count = min(len(self._queue), self._time.batch_limit)
            batch = [self._queue.popleft() for _ in range(count)]
            self.waits_s += [self._env.now - one.arrived for one in batch]
            factor = self._generator.choice(self._time.factors, p=self._time.shares)
            seconds = self._time.seconds(count) + rested * self._time.waking_s
            yield self._env.timeout(seconds * factor)
            # The core that refuses does not compute meanwhile.
            while self._debt_s:
                debt_s, self._debt_s = self._debt_s, 0.0
                yield self._env.timeout(debt_s)
            for one in batch:
                one.answered.succeed()

    def _wait_for_company(self) -> Events:
        until = self._queue[0].arrived + self._rules.max_wait_s
        while len(self._queue) < self._time.batch_limit and self._env.now < until:
            yield self._came | self._env.timeout(until - self._env.now)


def simulate(
    time: BatchTime,
    rules: Rules,
    *,
    rates: list[tuple[float, float]],
    seed: int,
    retries: int = 1,
) -> Outcome:
    """One replica under Poisson arrivals, until the last request has come to its end.

    Args:
        time: of its batches.
        rules: of its door.
        rates: seconds, and the arrivals a second in them, one after the other.
        seed: of everything drawn.
        retries: of a request that is refused.
    """
    env, generator, outcome = simpy.Environment(), np.random.default_rng(seed), Outcome()
    replica = Replica(env, time, rules, generator=generator)

    def client() -> Events:
        started = env.now
        outcome.asked += 1
        for left in range(retries, -1, -1):
            answer = replica.ask()
            if isinstance(answer, simpy.Event):
                yield answer
                outcome.latencies_s.append(env.now - started)
                return
            if left:
                outcome.retried += 1
                yield env.timeout(answer)
        outcome.refused += 1

    def clients() -> Events:
        for seconds, rate in rates:
            end = env.now + seconds
            while rate and (gap := generator.exponential(1 / rate)) < end - env.now:
                yield env.timeout(gap)
                env.process(client())
            yield env.timeout(end - env.now)

    env.process(clients())
    env.run()
    outcome.waits_s = replica.waits_s
    return outcome
