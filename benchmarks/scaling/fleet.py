"""A fleet of replicas through a day: SimPy, second by second.

A day has hundreds of millions of requests, too many to follow one by one. What happens to the fleet
(autoscaler, starts, losses) are SimPy's events; requests go in whole numbers through steps of one
second. A queue below its capacity is back in balance within far less than a second, so a step's
latencies are those of the queueing model at the step's load; what is beyond the capacity piles up
in each replica's queue and is worked off, and what finds no room is refused and, once, comes again
when told to. :mod:`benchmarks.scaling.events` simulates single requests, and the two must agree.
"""

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
import simpy
from numpy.typing import NDArray

from benchmarks.scaling.autoscaler import Autoscaler, Load, Policy
from benchmarks.scaling.batch_queue import BatchQueue, BatchTime
from benchmarks.scaling.events import Rules

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
Events = Generator[simpy.Event, Any, None]

EDGES: Final[Array] = np.geomspace(1e-4, 1e3, 701)
"""Of the bins of latencies, in seconds; each 2.3 % wide."""
LOADS: Final = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94)
"""Shares of the capacity at which the model is solved; above the last, its answer is kept."""
CALM: Final = 0.9
"""Share of the capacity below which a replica's queue cannot grow for a second."""
_AFTER_S: Final = 60
"""After the day, for those that come again."""
_LEAST_PACE: Final = 0.05
"""Of its capacity that a replica keeps, whatever it refuses."""
_POINTS: Final = 16
"""Into which the latencies of a replica with a backlog are spread."""


class Curves:
    """The queueing model at all loads.

    Args:
        time: of a batch.
        forward_share: of a batch's seconds that its device computes.
    """

    def __init__(self, time: BatchTime, *, forward_share: float) -> None:
        self.time = time
        queues = [BatchQueue(time, rate=load * time.capacity) for load in LOADS]
        self._latencies = np.stack([queue.latency.shares(EDGES) for queue in queues])
        self._waits = np.stack([queue.wait.shares(EDGES) for queue in queues])
        self._busy = np.array([queue.busy for queue in queues])
        self.forward_share = forward_share
        self._balances = [self._balance(percent) for percent in range(101)]

    def at(self, load: float) -> "Balance":
        """The queue in balance at this load, to the percent; above the last solved, as there."""
        return self._balances[min(100, round(100 * load))]

    def _balance(self, percent: int) -> "Balance":
        load = percent / 100
        place = float(np.interp(load, LOADS, np.arange(len(LOADS))))
        low = min(int(place), len(LOADS) - 2)
        latencies, waits = (
            rows[low] + (place - low) * (rows[low + 1] - rows[low])
            for rows in (self._latencies, self._waits)
        )
        busy = np.interp(load, (0.0, *LOADS, 1.0), (0.0, *self._busy, 1.0))
        return Balance(latencies, waits, float(busy))


@dataclass(frozen=True)
class Balance:
    """A replica at a steady load.

    Args:
        latencies: share of the requests in each bin.
        waits: the same of their waits for a batch.
        busy: share of the time in which its core is in use.
    """

    latencies: Array
    waits: Array
    busy: float


@dataclass(frozen=True)
class Loss:
    """Replicas that are gone at once.

    Args:
        at_s: since midnight.
        share: of the ready ones; at least one goes.
    """

    at_s: float
    share: float


@dataclass(frozen=True)
class Plan:
    """A day.

    Args:
        rate: arrivals a second at a time since midnight.
        seconds: its length.
        start_s: from the wish for a replica to its first answer.
        notice_s: in which a lost replica is still sent requests.
        window_s: that the metrics of the triggers look back on.
        losses: of replicas.
        policy: of the autoscaler.
        replicas: at midnight.
        seed: of everything drawn.
    """

    rate: Callable[[float], float]
    seconds: int
    start_s: float
    policy: Policy
    replicas: int
    losses: Sequence[Loss] = ()
    notice_s: float = 10.0
    window_s: float = 120.0
    cores_window_s: float = 30.0
    seed: int = 0


@dataclass
class Day:
    """What became of the requests, second by second.

    ``asked`` is the sum of ``answered``, ``refused`` and ``broken`` once the day is over.

    Args:
        asked: new requests.
        answered: with a verdict, at the first or the second time of asking.
        refused: twice.
        broken: twice, or once refused and once broken.
        retried: asked for the second time.
        ready: replicas.
        replicas: with those that start.
        latencies: of the answers, by bin; waits for a retry included.
    """

    asked: Counts
    answered: Counts
    refused: Counts
    broken: Counts
    retried: Counts
    ready: Counts
    replicas: Counts
    latencies: Array

    @classmethod
    def of(cls, seconds: int) -> "Day":
        """An empty one."""
        counts = {
            field.name: np.zeros(seconds, np.int64)
            for field in fields(cls)
            if field.name != "latencies"
        }
        return cls(**counts, latencies=np.zeros((seconds // 60 + 1, len(EDGES) - 1)))

    def without_minutes(self, minutes: slice) -> "Day":
        """The same, but for the latencies of those minutes."""
        return replace(self, latencies=np.delete(self.latencies, minutes, axis=0))

    def p_s(self, share: float) -> float:
        """The latency below which this share of the answers lies, to the bin."""
        sums = self.latencies.sum(axis=0).cumsum()
        place = int(np.searchsorted(sums, share * sums[-1]))
        return float(np.sqrt(EDGES[place] * EDGES[place + 1]))

    def failed(self, seconds: slice = slice(None)) -> float:
        """Share of the requests that got no answer, retries included."""
        lost = self.refused[seconds].sum() + self.broken[seconds].sum()
        return float(lost / max(1, self.asked[seconds].sum()))

    @property
    def replica_hours(self) -> float:
        """Paid for: ready or starting."""
        return float(self.replicas.sum() / 3600)


class _Retries:
    """Requests that will ask again: by the second, how many have waited for how long."""

    def __init__(self) -> None:
        self._due: dict[int, Counter[int]] = {}

    def add(self, second: int, count: int, *, waited_s: int) -> None:
        if count:
            self._due.setdefault(second, Counter())[waited_s] += count

    def take(self, second: int) -> Counter[int]:
        return self._due.pop(second, Counter())


@dataclass(frozen=True)
class _Accepted:
    """What replicas took in within a second: how many, and where their times lie."""

    count: int
    latencies: Array
    waits: Array
    cores: float


class Fleet:
    """Replicas behind a balancer that chooses at random, from midnight on."""

    def __init__(self, env: simpy.Environment, plan: Plan, curves: Curves, rules: Rules) -> None:
        self._env, self._plan, self._curves, self._rules = env, plan, curves, rules
        self._capacity = curves.time.capacity
        self._most_waiting = rules.most_waiting(curves.time)
        self._generator = np.random.default_rng(plan.seed)
        self._autoscaler = Autoscaler(plan.policy)
        self._queues = np.zeros(plan.replicas)
        self._starting: list[simpy.Process] = []
        self._gone = 0
        self._retries = _Retries()
        self._retry_after_s = rules.retry_after_s(curves.time, self._most_waiting)
        self._seen: deque[_Accepted] = deque(maxlen=int(plan.window_s))
        self.day = Day.of(plan.seconds + _AFTER_S)
        env.process(self._traffic())
        env.process(self._scaling())
        for loss in plan.losses:
            env.process(self._lose(loss))

    def _replicas(self) -> int:
        return len(self._queues) + self._gone + len(self._starting)

    def _scaling(self) -> Events:
        while True:
            yield self._env.timeout(self._plan.policy.every_s)
            wanted = self._autoscaler.look(self._env.now, self._load(), replicas=self._replicas())
            self._set(wanted)

    def _set(self, wanted: int) -> None:
        for _ in range(wanted - self._replicas()):
            self._starting.append(self._env.process(self._start()))
        for _ in range(self._replicas() - wanted):
            if self._starting:
                self._starting.pop().interrupt()
            elif len(self._queues) > 1:
                # It answers what it has accepted; the others take over what would still come.
                self._queues = np.sort(self._queues)[1:]

    def _start(self) -> Events:
        try:
            yield self._env.timeout(self._plan.start_s)
        except simpy.Interrupt:
            return
        assert self._env.active_process is not None
        self._starting.remove(self._env.active_process)
        self._queues = np.append(self._queues, 0.0)

    def _lose(self, loss: Loss) -> Events:
        yield self._env.timeout(loss.at_s)
        count = min(len(self._queues), max(1, round(loss.share * len(self._queues))))
        order = self._generator.permutation(len(self._queues))
        lost, self._queues = self._queues[order[:count]], self._queues[order[count:]]
        self._gone += count
        # What they had accepted is not answered after all, and is sent again.
        waiting, second = round(float(lost.sum())), int(self._env.now)
        self.day.answered[second] -= waiting
        self._retries.add(second + 1, waiting, waited_s=1)
        yield self._env.timeout(self._plan.notice_s)
        self._gone -= count
        # The Deployment replaces them without being asked.
        for _ in range(count):
            self._starting.append(self._env.process(self._start()))

    def _load(self) -> Load:
        """What the triggers see; their metrics look back."""
        seen = list(self._seen)
        sums = np.stack([second.waits for second in seen]).sum(axis=0).cumsum()
        place = int(np.searchsorted(sums, 0.95 * sums[-1])) if sums[-1] else 0
        cores = [second.cores for second in seen]
        return Load(
            wait_s=float(EDGES[place]),
            busy_devices=float(np.mean(cores)) * self._curves.forward_share,
            cores=float(np.mean(cores[-int(self._plan.cores_window_s) :])),
            ready=len(self._queues),
        )

    def _traffic(self) -> Events:
        for second in range(len(self.day.asked)):
            rate = self._plan.rate(second) if second < self._plan.seconds else 0.0
            self._step(second, int(self._generator.poisson(rate)))
            yield self._env.timeout(1)

    def _step(self, second: int, new: int) -> None:
        day, coming = self.day, self._retries.take(second)
        day.asked[second], day.retried[second] = new, coming.total()
        day.ready[second], day.replicas[second] = len(self._queues), self._replicas()
        # Groups of requests: the new ones, which may come again, and those that do.
        waited_s = [0, *coming]
        sizes = np.array([new, *coming.values()])
        broken = self._broken(sizes)
        accepted = self._accept(int((sizes - broken).sum()))
        self._seen.append(accepted)
        refused = self._chosen(sizes - broken, accepted.count)
        self._retries.add(second + 1, int(broken[0]), waited_s=1)
        self._retries.add(
            second + self._retry_after_s, int(refused[0]), waited_s=self._retry_after_s
        )
        day.broken[second], day.refused[second] = broken[1:].sum(), refused[1:].sum()
        day.answered[second] += accepted.count
        for waited, count in zip(waited_s, sizes - broken - refused, strict=True):
            if count:
                day.latencies[second // 60] += count * later(accepted.latencies, waited)

    def _chosen(self, sizes: Counts, accepted: int) -> Counts:
        """Of each group, those that are refused when so many of all are not."""
        refused = int(sizes.sum()) - accepted
        if not refused:
            return np.zeros_like(sizes)
        return self._generator.multivariate_hypergeometric(sizes, refused)

    def _broken(self, sizes: Counts) -> Counts:
        """Of each group, those sent to replicas that are gone without the balancer knowing."""
        if not len(self._queues):
            return sizes
        if not self._gone:
            return np.zeros_like(sizes)
        return self._generator.binomial(sizes, self._gone / (self._gone + len(self._queues)))

    def _accept(self, offered: int) -> _Accepted:
        replicas = len(self._queues)
        if not replicas:
            nothing = np.zeros(len(EDGES) - 1)
            return _Accepted(0, nothing, nothing, 0.0)
        load = offered / replicas / self._capacity
        if load < CALM and not self._queues.any():
            return self._calm(offered, load, replicas)
        each = self._generator.multinomial(offered, np.full(replicas, 1 / replicas))
        before, refused = self._queues, self._refused(each)
        paces = self._capacity * np.maximum(1 - self._rules.refusal_s * refused, _LEAST_PACE)
        self._queues = np.maximum(before + each - refused - paces, 0.0)
        counts = each - refused
        is_late = np.maximum(before, self._queues) > self._curves.time.batch_limit
        calm = self._calm(int(counts[~is_late].sum()), load, int((~is_late).sum()))
        waits = np.linspace(before / paces, self._queues / paces, _POINTS)[:, is_late]
        weights = np.broadcast_to(counts[is_late] / _POINTS, waits.shape)
        limit_s = self._curves.time.seconds(self._curves.time.batch_limit)
        late = [
            np.histogram(np.clip(waits + more_s, EDGES[0], EDGES[-2]), EDGES, weights=weights)[0]
            for more_s in (limit_s, 0.0)
        ]
        count = int(counts.sum())
        latencies = calm.latencies * calm.count + late[0]
        return _Accepted(
            count=count,
            latencies=latencies / max(1, count),
            waits=calm.waits + late[1],
            cores=calm.cores + int(is_late.sum()),
        )

    def _calm(self, count: int, load: float, replicas: int) -> _Accepted:
        """Requests to replicas whose queues are in balance."""
        balance = self._curves.at(load)
        return _Accepted(
            count=count,
            latencies=balance.latencies,
            waits=count * balance.waits,
            cores=replicas * balance.busy,
        )

    def _refused(self, each: Counts) -> Counts:
        """Of those sent to each replica: what is beyond its pace and the room in its queue."""
        over = self._queues + each - self._capacity - self._most_waiting
        # A refusal takes time from the answers, so that more are refused.
        refused = over / max(1 - self._capacity * self._rules.refusal_s, _LEAST_PACE)
        most = self._queues + each - self._most_waiting - self._capacity * _LEAST_PACE
        return np.clip(np.ceil(np.minimum(refused, most)), 0, each).astype(np.int64)


def later(latencies: Array, seconds: int) -> Array:
    """The same distribution, so many whole seconds later."""
    if not seconds:
        return latencies
    middles = np.sqrt(EDGES[:-1] * EDGES[1:]) + seconds
    found, _ = np.histogram(np.clip(middles, EDGES[0], EDGES[-2]), EDGES, weights=latencies)
    return np.asarray(found, dtype=np.float64)


def simulate(plan: Plan, curves: Curves, rules: Rules) -> Day:
    """The day, and a minute more for those that come again."""
    env = simpy.Environment()
    fleet = Fleet(env, plan, curves, rules)
    env.run(until=len(fleet.day.asked))
    return fleet.day
