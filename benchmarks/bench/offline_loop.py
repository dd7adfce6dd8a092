"""The limit: decode, resize and forward in one process, as fast as this machine can.

No server, no queue, no JSON; every trick that NormGate may use. Several ways to share the cores
are tried first, each for a moment, and the best of them is the limit. The process waits for
commands on its standard input, so that it takes no processor between its turns.
"""

import argparse
import itertools
import json
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from app.core.allocator import keep_memory
from app.core.detector import Detector
from app.core.images import decode
from benchmarks.bench.cases import MAX_BATCH_SIZE
from benchmarks.bench.contestants import CORES
from benchmarks.bench.detectors import Engine, Loader

_POLL_S: Final = 0.1
_WARM_UP_S: Final = 0.5
_BATCH_SIZES: Final = (4, 8, MAX_BATCH_SIZE)


@dataclass(frozen=True)
class Plan:
    """How the work is shared.

    Args:
        engine: that runs the network.
        runners: threads that run the network, each with one of its own.
        threads: of a forward pass.
        decoders: threads that decode for them; with 0 each runner decodes for itself.
        batch_size: images in one forward pass.
    """

    engine: Engine
    runners: int
    threads: int
    decoders: int
    batch_size: int


def plans(engines: Sequence[Engine], *, cores: int) -> list[Plan]:
    """Every plan worth trying on so many cores."""
    shapes = [(cores, 1, 0), (1, max(1, cores - 1), 1), (1, cores, cores), (1, cores, 0)]
    return [
        Plan(engine, runners, threads, decoders, batch_size)
        for engine in engines
        for runners, threads, decoders in dict.fromkeys(shapes)
        for batch_size in _BATCH_SIZES
    ]


class Offline:
    """Scores the same images again and again.

    Args:
        loader: makes the detectors.
        images: encoded.
    """

    def __init__(self, loader: Loader, images: Sequence[bytes]) -> None:
        self._loader = loader
        self.engines = loader.engines
        self._images = images
        self._preprocessing = loader.preprocessing
        self._made: dict[tuple[Engine, int], list[Detector]] = {}

    def images_per_s(self, plan: Plan, *, seconds: float) -> float:
        """Images scored a second, once the plan is warm."""
        detectors = self._detectors(plan)
        for detector in detectors:
            detector.detect(torch.zeros(self._batch_shape(plan), dtype=torch.uint8))
        done = [0] * plan.runners
        is_over = threading.Event()
        sources = self._sources(plan, is_over)

        def run(number: int) -> None:
            torch.set_num_threads(plan.threads)
            for batch in sources(number):
                detectors[number].detect(batch)
                done[number] += len(batch)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(plan.runners)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        is_over.set()
        for thread in threads:
            thread.join()
        return sum(done) / (time.perf_counter() - started)

    def image_ms(self, plan: Plan, *, seconds: float) -> float:
        """Median time of one image from its bytes to its verdict, one after the other."""
        torch.set_num_threads(plan.threads)
        [detector] = self._detectors(plan)
        times, end = [], time.perf_counter() + seconds
        for data in itertools.cycle(self._images):
            started = time.perf_counter()
            detector.detect(self._prepare(data)[None])
            times.append(time.perf_counter() - started)
            if time.perf_counter() > end:
                return 1000 * statistics.median(times)
        raise AssertionError("there are no images")

    def _detectors(self, plan: Plan) -> list[Detector]:
        made = self._made.setdefault((plan.engine, plan.threads), [])
        while len(made) < plan.runners:
            made.append(self._loader.detector(engine=plan.engine, threads=plan.threads))
        return made[: plan.runners]

    def _batch_shape(self, plan: Plan) -> tuple[int, ...]:
        side = self._preprocessing.crop
        return plan.batch_size, 3, side, side

    def _prepare(self, data: bytes) -> Tensor:
        return self._preprocessing.resize_and_crop(decode(data))

    def _sources(self, plan: Plan, is_over: threading.Event) -> Callable[[int], Iterator[Tensor]]:
        if plan.decoders:
            batches = self._decoded_by_others(plan, is_over)
            return lambda number: batches
        return lambda number: self._decoded_here(plan, is_over, start=number)

    def _decoded_here(
        self, plan: Plan, is_over: threading.Event, *, start: int
    ) -> Iterator[Tensor]:
        buffer = torch.empty(self._batch_shape(plan), dtype=torch.uint8)
        endless = itertools.islice(itertools.cycle(self._images), start * plan.batch_size, None)
        while not is_over.is_set():
            for place in buffer:
                place.copy_(self._prepare(next(endless)))
            yield buffer

    def _decoded_by_others(self, plan: Plan, is_over: threading.Event) -> Iterator[Tensor]:
        ready: queue.Queue[Tensor] = queue.Queue(2 * plan.batch_size)
        endless = itertools.cycle(self._images)

        def prepare() -> None:
            while not is_over.is_set():
                image = self._prepare(next(endless))
                while not is_over.is_set():
                    with suppress(queue.Full):
                        ready.put(image, timeout=_POLL_S)
                        break

        threads = [threading.Thread(target=prepare) for _ in range(plan.decoders)]
        for thread in threads:
            thread.start()
        buffer = torch.empty(self._batch_shape(plan), dtype=torch.uint8)
        while not is_over.is_set():
            if not _fill(buffer, ready, is_over):
                break
            yield buffer
        for thread in threads:
            thread.join()


def _fill(buffer: Tensor, ready: "queue.Queue[Tensor]", is_over: threading.Event) -> bool:
    """Whether the buffer was filled before it was over: the decoders end then."""
    for place in buffer:
        while True:
            try:
                place.copy_(ready.get(timeout=_POLL_S))
                break
            except queue.Empty:
                if is_over.is_set():
                    return False
    return True


def best(offline: Offline, *, seconds: float) -> tuple[Plan, dict[Plan, float]]:
    """The fastest plan, and what each did in ``seconds``."""
    found = {
        plan: offline.images_per_s(plan, seconds=seconds)
        for plan in plans(offline.engines, cores=len(CORES))
    }
    return max(found, key=lambda plan: found[plan]), found


def fastest_alone(offline: Offline, *, seconds: float) -> Plan:
    """The plan that scores one image soonest."""
    found = [
        Plan(engine, 1, threads, 0, 1) for engine in offline.engines for threads in {1, len(CORES)}
    ]
    return min(found, key=lambda plan: offline.image_ms(plan, seconds=seconds))


def main() -> None:
    """Answer commands until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("model")
    parser.add_argument("device")
    parser.add_argument("images", type=Path, nargs="+")
    arguments = parser.parse_args()
    keep_memory()
    images = [image.read_bytes() for image in arguments.images]
    offline = Offline(Loader(arguments.store, arguments.model, device=arguments.device), images)
    chosen: Plan | None = None
    alone: Plan | None = None
    for line in sys.stdin:
        command = json.loads(line)
        seconds = command["seconds"]
        answer: Any
        if command["what"] == "plan":
            chosen, found = best(offline, seconds=seconds)
            alone = fastest_alone(offline, seconds=seconds)
            answer = {str(plan): rate for plan, rate in found.items()}
        elif command["what"] == "throughput":
            assert chosen is not None, "ask for the plan first"
            # Minutes have passed since the last turn, and the system has reclaimed what lay idle.
            offline.images_per_s(chosen, seconds=_WARM_UP_S)
            answer = offline.images_per_s(chosen, seconds=seconds)
        else:
            assert alone is not None, "ask for the plan first"
            answer = offline.image_ms(alone, seconds=seconds)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
