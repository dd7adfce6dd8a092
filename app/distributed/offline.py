"""Offline work on many machines, by Ray Data: each worker takes stretches of the images.

A stretch is some whole batches, the very ones that one machine would make, and a worker does with
them what one machine would do. What comes back, in order, are the batches' results.
"""

import logging
import pickle
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar
from uuid import uuid4

import numpy as np
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from app.distributed.attempts import Attempts
from app.distributed.failures import joining, last_line
from app.errors import NormGateError
from app.offline.reading import Batch, Reading
from app.offline.sources import ImageSource, Spread

_STRETCHES_A_WORKER: Final = 4
"""At least, so that a slow worker holds nobody up for long."""
_MOST_BATCHES: Final = 64
"""In a stretch: what a lost worker did of it is done again."""
_RETRIES: Final = 5
"""Of a stretch whose workers die; an image that kills them must not do so for ever."""
_JOBS_AHEAD: Final = 2

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@contextmanager
def ray_cluster(
    *, device: str = "cpu", workers: int | None = None, worker_cpus: int | None = None
) -> Iterator["RayCluster"]:
    """The cluster that ``RAY_ADDRESS`` names, or else a new one on this machine.

    Args:
        device: where each worker runs the network, ``cpu`` or ``cuda``.
        workers: how many; by default as many as the cluster has room for now.
        worker_cpus: cores that each reserves and computes with; by default as many as torch
            computes with here, since with another number of threads some sums have another order.

    Raises:
        NormGateError: there is no such cluster, or it has no room for a worker.
    """
    if device not in ("cpu", "cuda"):
        raise NormGateError(f"device is {device}; with --ray it must be cpu or cuda")
    is_own = not ray.is_initialized()
    if is_own:
        _connect()
    try:
        gpus = 1 if device == "cuda" else 0
        cpus = worker_cpus or min(torch.get_num_threads(), _largest_node())
        room = _room(cpus=cpus, gpus=gpus)
        yield RayCluster(workers=min(workers or room, room), cpus=cpus, gpus=gpus)
    finally:
        if is_own:
            ray.shutdown()


def _connect() -> None:
    with joining(), warnings.catch_warnings():
        # It is about GPUs that a worker reserved none of, and sees none of.
        warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
            # Failures go to Ray's own log, with tracebacks: a job that fails says so in one line.
            handler.addFilter(lambda record: record.levelno < logging.ERROR and not record.exc_info)


@dataclass(frozen=True)
class RayCluster:
    """Where offline work is done by Ray's workers; the driver keeps their results alone.

    Args:
        workers: most of them at once.
        cpus: of each.
        gpus: of each.
    """

    workers: int
    cpus: int
    gpus: int

    def spread(self) -> Spread:
        """Small jobs as tasks of their own."""
        return self._spread

    def device(self, wanted: str) -> str:
        """The driver's machine need not have what the workers compute on."""
        return "cpu"

    def run(
        self, reading: Reading, work: Callable[[Batch], ResultT], positions: range
    ) -> Iterator[ResultT]:
        """The result of each batch, in order.

        Raises:
            NormGateError: the work cannot be done, or its workers die again and again.
        """
        if not positions:
            return
        # A worker's folder is another; its name for an image is not.
        reading = replace(reading, source=reading.source.absolute(), threads=self.cpus)
        shipped = ray.put((reading, work))
        attempts = Attempts(uuid4().hex)
        stretches = self._stretches(positions, reading.batch_size)
        with DataContext.current(_in_order()):
            data = ray.data.from_items(
                [{"start": one.start, "stop": one.stop} for one in stretches],
                override_num_blocks=len(stretches),
            ).map_batches(
                _Worker,
                fn_constructor_args=(_Shipped(shipped), self.cpus, attempts),
                batch_size=1,
                batch_format="numpy",
                # One stretch at a time: a lost worker costs no other stretch one of its retries.
                compute=ActorPoolStrategy(
                    size=min(self.workers, len(stretches)), max_tasks_in_flight_per_actor=1
                ),
                num_cpus=self.cpus,
                num_gpus=self.gpus,
                max_restarts=-1,
                max_task_retries=_RETRIES,
            )
        try:
            for rows in data.iter_batches(batch_size=1, batch_format="numpy"):
                for results in map(_outcome, rows["results"]):
                    yield from results
        except RayError as error:
            where = _where(reading.source, attempts)
            raise NormGateError(f"Ray's workers failed{where}: {last_line(error)}") from error
        finally:
            attempts.forget()

    def _spread(
        self, function: Callable[[ItemT], ResultT], items: Iterable[ItemT], /
    ) -> Iterator[ResultT]:
        task: Any = ray.remote(num_cpus=1, max_retries=_RETRIES)(_attempt)
        pending: deque[tuple[ItemT, Any]] = deque()
        for item in items:
            pending.append((item, task.remote(function, item)))
            if len(pending) > _JOBS_AHEAD * self.workers:
                yield _result_of(*pending.popleft())
        while pending:
            yield _result_of(*pending.popleft())

    def _stretches(self, positions: range, batch_size: int) -> list[range]:
        batches = -(-len(positions) // batch_size)
        count = min(max(batches // (_STRETCHES_A_WORKER * self.workers), 1), _MOST_BATCHES)
        step = count * batch_size
        return [positions[start : start + step] for start in range(0, len(positions), step)]


@dataclass(frozen=True)
class _Shipped:
    """What all workers share; in an object of its own, so that each of them fetches it."""

    reference: Any


class _Worker:
    """One of Ray Data's actors: what it was shipped is made ready by its first stretch."""

    def __init__(self, shipped: _Shipped, threads: int, attempts: Attempts) -> None:
        self._shipped = shipped
        self._attempts = attempts
        self._work: tuple[Reading, Callable[[Batch], Any]] | None = None
        torch.set_num_threads(threads)

    def __call__(self, rows: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[np.object_]]:
        """The results of a stretch's batches, or the error that one machine would have met."""
        stretches = [
            range(int(start), int(stop))
            for start, stop in zip(rows["start"], rows["stop"], strict=True)
        ]
        results = np.empty(len(stretches), dtype=object)
        results[:] = [_attempt(self._results, stretch) for stretch in stretches]
        return {"results": results}

    def _results(self, stretch: range) -> list[Any]:
        if self._work is None:
            self._work = ray.get(self._shipped.reference)
        reading, work = self._work
        self._attempts.begin(stretch)
        try:
            return [work(batch) for batch in reading.batches(stretch)]
        finally:
            self._attempts.end(stretch)


def _attempt(function: Callable[[ItemT], Any], item: ItemT) -> bytes:
    """The result, or the failure, which is no reason to try again."""
    try:
        return pickle.dumps(function(item))
    except NormGateError as error:
        return pickle.dumps(error)


def _result_of(item: object, reference: Any) -> Any:
    """What a task made of an item.

    Raises:
        NormGateError: it could not, or its workers died again and again.
    """
    try:
        return _outcome(ray.get(reference))
    except RayError as error:
        raise NormGateError(f"Ray's workers failed on {item}: {last_line(error)}") from error


def _where(source: ImageSource, attempts: Attempts) -> str:
    """At which images workers died again and again, for a message; empty where none did."""
    worst = attempts.most()
    # What was begun once was under way when something else failed.
    if worst is None or worst[1] < 2:
        return ""
    stretch, count = worst
    first, last = source.where(stretch[0]), source.where(stretch[-1])
    return f" {count} times on images {stretch.start + 1} to {stretch.stop}, {first} to {last}"


def _outcome(pickled: bytes) -> Any:
    result = pickle.loads(pickled)
    if isinstance(result, NormGateError):
        raise result
    return result


def _in_order() -> DataContext:
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    return context


def _room(*, cpus: int, gpus: int) -> int:
    """How many workers fit on the cluster's machines, were nothing else on them.

    Raises:
        NormGateError: no machine has room for one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    room = sum(
        min(int(has.get(kind, 0) // count) for kind, count in wanted.items()) for has in nodes
    )
    if not room:
        largest = {kind: max(has.get(kind, 0) for has in nodes) for kind in ("CPU", "GPU")}
        raise NormGateError(
            f"no machine of the cluster has more than {largest['CPU']:g} cores and "
            f"{largest['GPU']:g} GPUs; a worker needs {cpus} and {gpus}"
        )
    return room


def _largest_node() -> int:
    """The cores of the machine that has most."""
    return max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]) or 1
