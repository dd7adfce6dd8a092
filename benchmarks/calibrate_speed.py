"""Calibration against the offline limit: ``python -m benchmarks.calibrate_speed``.

The limit is what a calibration cannot do without: the same images read and decoded by as many
threads, both forward passes with a hook at every block of the network, and one over the threshold
images; no bookkeeping, no bootstrap, no bundle. Both sides take turns in one process, and the ratio
is the median over the rounds. The goal is 0.90.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from app.core.allocator import keep_memory
from app.core.blocks import Block, BlockNorms
from app.core.images import Preprocessing, load
from app.core.jigsaw import draw_permutations, jigsaw
from app.offline.calibrate import CalibrationOptions, calibrate
from app.store import Bundle, LoadedBundle, Store
from benchmarks.bench.figures import Goal, spread
from benchmarks.datasets import ROOT, cifar10_split

GOAL: Final = 0.90
RESULTS: Final = ROOT / "build" / "bench" / "calibrate.json"
_BATCH: Final = 64
_AHEAD: Final = 4


@dataclass(frozen=True)
class Folders:
    """Links to some training images and some held-out ones."""

    selection: Path
    threshold: Path

    @classmethod
    def of(cls, root: Path, *, count: int) -> "Folders":
        """The first images of every class, ``count`` in each folder."""
        train, held_out, _ = cifar10_split()
        folders = cls(root / "selection", root / "threshold")
        for source, folder in ((train, folders.selection), (held_out, folders.threshold)):
            folder.mkdir()
            for kind in sorted(source.iterdir()):
                for file in sorted(kind.iterdir())[: count // 10]:
                    (folder / f"{kind.name}-{file.name}").symlink_to(file)
        return folders


def ours(folders: Folders, bundle: Bundle, weights: Path, store: Store) -> None:
    """A calibration as the command runs it."""
    options = CalibrationOptions(
        name="speed",
        architecture=bundle.architecture,
        selection_images=folders.selection,
        threshold_images=folders.threshold,
        weights=str(weights),
        batch_size=_BATCH,
    )
    calibrate(options, store, progress=_silent)


@torch.inference_mode()
def limit(folders: Folders, loaded: LoadedBundle, *, threads: int) -> None:
    """The passes alone."""
    bundle = loaded.bundle
    network, preprocessing = loaded.detector().network, bundle.preprocessing
    blocks = [Block(row.block, row.layout) for row in bundle.norm_ratios.blocks]
    every, selected = (
        BlockNorms(network, blocks),
        BlockNorms(network, [bundle.norm_ratios.selected]),
    )
    with ThreadPoolExecutor(threads) as pool:
        for images in _batches(folders.selection, preprocessing, pool):
            inputs = preprocessing.normalise(images)
            every.run(inputs)
            every.run(jigsaw(inputs, draw_permutations(len(inputs), seed=0)))
        for images in _batches(folders.threshold, preprocessing, pool):
            selected.run(preprocessing.normalise(images))


def main() -> None:
    """Print the ratio and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000, help="in each folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one round of few images")
    options = parser.parse_args()
    if options.quick:
        options.images, options.rounds = 200, 1
    keep_memory()
    torch.set_num_threads(options.threads)
    loaded = Store(ROOT / "model_store").load("cifar10-resnet18")
    weights = ROOT / "model_store" / "cifar10-resnet18" / "1" / "weights.safetensors"
    seconds: dict[str, list[float]] = {"calibrate": [], "limit": []}
    with tempfile.TemporaryDirectory() as root:
        folders = Folders.of(Path(root), count=options.images)
        for _ in range(options.rounds):
            started = time.perf_counter()
            ours(folders, loaded.bundle, weights, Store(Path(root, "store")))
            between = time.perf_counter()
            limit(folders, loaded, threads=os.cpu_count() or 1)
            seconds["calibrate"].append(between - started)
            seconds["limit"].append(time.perf_counter() - between)
    _tell(seconds, images=2 * options.images)


def _tell(seconds: dict[str, list[float]], *, images: int) -> None:
    pairs = zip(seconds["limit"], seconds["calibrate"], strict=True)
    ratio = spread(limit_s / ours_s for limit_s, ours_s in pairs)
    assert ratio is not None, "there is a round at least"
    goal = Goal("calibrate / the offline limit over the same blocks", ratio, "at least", GOAL)
    rates = {name: images / statistics.median(found) for name, found in seconds.items()}
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f} images/s")
    print(f"ratio: {ratio.format(3)}, goal {GOAL}: {'met' if goal.is_met else 'missed'}")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(
        json.dumps({"goals": [goal.as_json()], "images_per_s": rates, **seconds}) + "\n"
    )


def _batches(
    folder: Path, preprocessing: Preprocessing, pool: ThreadPoolExecutor
) -> Iterator[Tensor]:
    def decode(files: Sequence[Path]) -> Tensor:
        return torch.stack([load(file.read_bytes(), preprocessing) for file in files])

    files = sorted(folder.iterdir())
    chunks = [files[start : start + _BATCH] for start in range(0, len(files), _BATCH)]
    pending = [pool.submit(decode, chunk) for chunk in chunks[:_AHEAD]]
    for chunk in [*chunks[_AHEAD:], *[[]] * len(pending)]:
        yield pending.pop(0).result()
        if chunk:
            pending.append(pool.submit(decode, chunk))


def _silent(title: str, *, done: int, total: int) -> None:
    """Progress that nobody watches."""


if __name__ == "__main__":
    main()
