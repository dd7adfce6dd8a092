"""Peak memory of calibrating few and many images: it must not grow with their number.

Each calibration runs in a process of its own, on random weights, and prints its peak resident
memory::

    python -m benchmarks.calibration_memory --few 5000 --many 50000

The images are CIFAR-10's training images, half of them to choose the block and half to set the
threshold. With ``--ray`` the workers of a Ray cluster compute, and the memory is the driver's. With
``--score`` the same images are scored with the shipped bundle instead.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from app.core.networks import Architecture
from app.offline.calibrate import RANDOM_WEIGHTS, CalibrationOptions, calibrate
from app.offline.reading import Place, ThisMachine
from app.offline.score import find_source, score_files
from app.store import Store
from benchmarks.datasets import ROOT, cifar10_split

TOLERANCE: Final = 0.10
MODEL: Final = "cifar10-resnet18"
SELECTION: Final = "selection"
HELD_OUT: Final = "threshold"


def main() -> None:
    """Print both peaks and whether they agree within the tolerance."""
    options = _parse_arguments()
    if options.images is not None:
        print(_peak_mib(options.images, options))
        return
    counts = (options.few, options.many)
    peaks = [_in_own_process(count) for count in counts]
    for count, peak in zip((options.few, options.many), peaks, strict=True):
        print(f"{count} images: {peak:.0f} MiB at the peak")
    growth = peaks[1] / peaks[0] - 1
    verdict = "within" if abs(growth) <= TOLERANCE else "NOT within"
    print(f"{growth:+.1%}: {verdict} {TOLERANCE:.0%}")
    more = (peaks[1] - peaks[0]) * 2**20 / (options.many - options.few)
    print(f"{more:.0f} bytes more an image")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", type=int, default=5_000)
    parser.add_argument("--many", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=4, help="of the CIFAR ResNet18")
    parser.add_argument("--ray", action="store_true", help="on the Ray cluster, or a new one")
    parser.add_argument("--score", action="store_true", help="score them instead")
    parser.add_argument("--images", type=int, help="work on this many, here")
    return parser.parse_args()


def _in_own_process(images: int) -> float:
    command = [sys.executable, "-m", "benchmarks.calibration_memory", *sys.argv[1:]]
    answer = subprocess.run(
        [*command, "--images", str(images)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(answer.stdout.splitlines()[-1])


@contextmanager
def _place(*, with_ray: bool) -> Iterator[Place]:
    if not with_ray:
        yield ThisMachine()
        return
    from app.distributed.offline import ray_cluster

    with ray_cluster(worker_cpus=1) as cluster:
        yield cluster


def _peak_mib(images: int, options: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as scratch, _place(with_ray=options.ray) as place:
        _folders(images, Path(scratch))
        if options.score:
            _score(Path(scratch), place)
        else:
            _calibrate(Path(scratch), options.width, place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _calibrate(scratch: Path, width: int, place: Place) -> None:
    calibrate(
        CalibrationOptions(
            name="memory",
            architecture=Architecture(id="cifar/resnet18", arguments={"width": width}),
            selection_images=scratch / SELECTION,
            threshold_images=scratch / HELD_OUT,
            weights=RANDOM_WEIGHTS,
        ),
        Store(scratch / "store"),
        progress=_silent,
        place=place,
    )


def _score(scratch: Path, place: Place) -> None:
    loaded = Store(ROOT / "model_store").load(MODEL)
    source = find_source(str(scratch / "*" / "*.jpg"))
    score_files(loaded, source, scratch / "scores.parquet", progress=_silent, place=place)


def _silent(title: str, *, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _folders(images: int, scratch: Path) -> None:
    """Fill two folders with links, half of the images in each; no image lies in both."""
    train, held_out, _ = cifar10_split()
    files = sorted([*train.rglob("*.jpg"), *held_out.rglob("*.jpg")])
    if images > len(files):
        raise SystemExit(f"{images} images were asked for; CIFAR-10 has {len(files)}")
    # Every so manieth file, so that few images come from all classes too.
    chosen = files[:: len(files) // images][:images]
    folders = scratch / SELECTION, scratch / HELD_OUT
    for folder, some in zip(folders, (chosen[::2], chosen[1::2]), strict=True):
        folder.mkdir()
        for index, file in enumerate(some):
            (folder / f"{index:06}.jpg").symlink_to(file)


if __name__ == "__main__":
    main()
