"""How the cost of an image grows: ``python -m benchmarks.growth``.

With the images of a forward pass (threads of one pass, and two passes at once), with the pixels of
the file (decoded whole, and at a scale), and with the depth of the block at which the gate stops.
Milliseconds of processor time an image; medians of rounds in which all take turns, so that what
else the machine does counts for all.
"""

import argparse
import io
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from app.core.allocator import keep_memory
from app.core.blocks import BlockNorms, find_blocks
from app.core.cores import usable_cores
from app.core.detector import Detector
from app.core.images import Preprocessing, load
from app.core.networks import Architecture, build, default_preprocessing
from app.store import Store
from benchmarks.bench.cases import MAX_BATCH_SIZE, OUTPUT, make_case

RESULTS: Final = OUTPUT / "growth.json"
_NETWORKS: Final = ("cifar", "mobilenet")
_BATCH_SIZES: Final = (1, 2, 4, 8, 16, MAX_BATCH_SIZE)
_MEGAPIXELS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 12.0)
_TILES: Final = 8
"""Photographs on a side of the mosaic: about as many megapixels as the largest photograph."""
_AT_A_SCALE: Final = ", at a scale"
_COST: Final = "ms of processor time an image"
_DEPTH: Final = "torchvision/resnet50"
_ROUNDS: Final = 5
_SECONDS_A_TURN: Final = 0.3

Run = Callable[[], int]
"""Does some work; the images it was done for."""
Figures = Mapping[str, float]
"""Milliseconds of processor time an image, or ratios of them."""


def main() -> int:
    """Print the tables and keep them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, to see that it works")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="tables whose title holds it, such as megapixels"
    )
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else _ROUNDS
    keep_memory()
    console, found = Console(width=120), {}
    tables: dict[str, Callable[[], dict[str, Run]]] = {
        f"images in a pass, {name}": partial(_passes, name) for name in _NETWORKS
    }
    tables |= {"megapixels of a JPEG": _pixels, f"blocks of {_DEPTH}": _depth}
    for title in (title for title in tables if arguments.only in title):
        found[title] = in_turns(tables[title](), rounds=rounds)
        _print(title, found[title], console, unit=_COST)
        if ratios := times_as_long(found[title]):
            found[f"{title}, ratio"] = ratios
            _print(title, ratios, console, unit="decoded whole / at a scale")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1))
    return 0


def in_turns(
    ways: Mapping[str, Run],
    *,
    rounds: int,
    seconds: float = _SECONDS_A_TURN,
    clock: Callable[[], float] = time.process_time,
) -> Figures:
    """The median cost of an image in each way, in milliseconds of ``clock``.

    Args:
        ways: what is run, again and again for ``seconds`` of ``clock`` in each round.
        rounds: in which every way has a turn.
        seconds: of a turn, at least.
        clock: in seconds.
    """
    costs: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            started, images = clock(), 0
            while clock() - started < seconds:
                images += run()
            costs[name].append(1000 * (clock() - started) / images)
    return {name: statistics.median(values) for name, values in costs.items()}


def times_as_long(figures: Figures) -> Figures:
    """What decoding whole costs over what it does at a scale, where both were measured."""
    return {
        name: cost / figures[name + _AT_A_SCALE]
        for name, cost in figures.items()
        if name + _AT_A_SCALE in figures
    }


def _passes(name: str) -> dict[str, Run]:
    """Each batch size in one pass on one thread, on all cores, and in passes side by side."""
    case, cores = make_case(name), usable_cores()
    loaded = Store(case.store).load(case.model)
    alone, shared = (
        loaded.on_onnxruntime(loaded.detector(), threads=threads) for threads in (1, cores)
    )
    side = loaded.bundle.preprocessing.crop
    ways: dict[str, Run] = {}
    for size in _BATCH_SIZES:
        images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8)
        ways[f"{size}, one thread"] = _pass(alone, images)
        ways[f"{size}, {cores} threads"] = _pass(shared, images)
        ways[f"{size}, {cores} passes at once"] = _side_by_side(alone, images, passes=cores)
    return ways


def _pass(detector: Detector, images: torch.Tensor) -> Run:
    def run() -> int:
        detector.detect(images)
        return len(images)

    return run


def _side_by_side(detector: Detector, images: torch.Tensor, *, passes: int) -> Run:
    # A session of ONNX Runtime may be run by several threads; two passes each, to overlap.
    def twice() -> None:
        for _ in range(2):
            detector.detect(images)

    def run() -> int:
        threads = [threading.Thread(target=twice) for _ in range(passes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 2 * passes * len(images)

    return run


def _pixels() -> dict[str, Run]:
    """Decoding and resizing of one photograph, scaled to so many megapixels, and of a mosaic.

    Enlarged, a photograph has less to decode in a pixel than a camera's; the mosaic has more.
    """
    case = make_case("mobilenet")
    whole = Store(case.store).load(case.model).bundle.preprocessing
    scaled = whole.model_copy(update={"scaled_decode": True})
    photographs = [Image.open(file).convert("RGB") for file in case.images]
    files = {f"{size:g}": _scaled(photographs[0], size) for size in _MEGAPIXELS}
    files["mosaic"] = _mosaic(photographs)
    return {
        name + how: _load(data, preprocessing)
        for name, data in files.items()
        for how, preprocessing in (("", whole), (_AT_A_SCALE, scaled))
    }


def _scaled(photograph: Image.Image, megapixels: float) -> bytes:
    factor = (megapixels * 1e6 / (photograph.width * photograph.height)) ** 0.5
    size = (round(photograph.width * factor), round(photograph.height * factor))
    return _jpeg(photograph.resize(size))


def _mosaic(photographs: Sequence[Image.Image]) -> bytes:
    width, height = photographs[0].size
    mosaic = Image.new("RGB", (_TILES * width, _TILES * height))
    for place in range(_TILES**2):
        row, column = divmod(place, _TILES)
        tile = photographs[place % len(photographs)].resize((width, height))
        mosaic.paste(tile, (column * width, row * height))
    return _jpeg(mosaic)


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def _load(data: bytes, preprocessing: Preprocessing) -> Run:
    def run() -> int:
        load(data, preprocessing)
        return 1

    return run


def _depth() -> dict[str, Run]:
    """A pass that stops behind each block of a network, and the whole network."""
    architecture = Architecture(id=_DEPTH)
    network = build(architecture).eval()
    preprocessing = default_preprocessing(architecture)
    torch.set_num_threads(usable_cores())
    inputs = torch.rand(4, 3, preprocessing.crop, preprocessing.crop)
    return dict(_gates(network, inputs))


def _gates(network: torch.nn.Module, inputs: torch.Tensor) -> Iterator[tuple[str, Run]]:
    for block in find_blocks(network, inputs[:1]):
        norms = BlockNorms(network, [block])

        def gate(norms: BlockNorms = norms) -> int:
            with torch.inference_mode():
                norms.run_to_last_block(inputs)
            return len(inputs)

        yield block.name, gate

    def whole() -> int:
        with torch.inference_mode():
            network(inputs)
        return len(inputs)

    yield "whole network", whole


def _print(title: str, figures: Figures, console: Console, *, unit: str) -> None:
    table = Table(title=title)
    table.add_column(title.split(",")[0])
    table.add_column(unit, justify="right")
    for name, cost in figures.items():
        table.add_row(name, f"{cost:.3g}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
