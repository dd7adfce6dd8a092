"""Peak memory of calibrating few and many images: it must not grow with their number.

Each calibration runs in a process of its own, on random weights, and prints its peak resident
memory::

    python -m benchmarks.calibration_memory --few 5000 --many 50000

The images are CIFAR-10's training images, half of them to choose the block and half to set the
threshold. With ``--ray`` the workers of a Ray cluster compute, and the memory is the driver's.
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
from app.store import Store
from benchmarks.datasets import cifar10_split

TOLERANCE: Final = 0.10


def main() -> None:
    """Print both peaks and whether they agree within the tolerance."""
    options = _parse_arguments()
    if options.images is not None:
        print(_peak_mib(options.images, options.width, with_ray=options.ray))
        return
    counts = (options.few, options.many)
    peaks = [_in_own_process(count, options.width, with_ray=options.ray) for count in counts]
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
    parser.add_argument("--images", type=int, help="calibrate this many, here")
    return parser.parse_args()


def _in_own_process(images: int, width: int, *, with_ray: bool) -> float:
    command = [sys.executable, "-m", "benchmarks.calibration_memory"]
    answer = subprocess.run(
        [
            *(*command, "--images", str(images), "--width", str(width)),
            *(["--ray"] if with_ray else []),
        ],
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


def _peak_mib(images: int, width: int, *, with_ray: bool) -> float:
    with tempfile.TemporaryDirectory() as scratch, _place(with_ray=with_ray) as place:
        selection, held_out = _folders(images, Path(scratch))
        calibrate(
            CalibrationOptions(
                name="memory",
                architecture=Architecture(id="cifar/resnet18", arguments={"width": width}),
                selection_images=selection,
                threshold_images=held_out,
                weights=RANDOM_WEIGHTS,
            ),
            Store(Path(scratch, "store")),
            progress=lambda title, *, done, total: None,
            place=place,
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _folders(images: int, scratch: Path) -> tuple[Path, Path]:
    """Two folders of links, half of the images in each; no image lies in both."""
    train, held_out, _ = cifar10_split()
    files = sorted([*train.rglob("*.jpg"), *held_out.rglob("*.jpg")])
    if images > len(files):
        raise SystemExit(f"{images} images were asked for; CIFAR-10 has {len(files)}")
    # Every so manieth file, so that few images come from all classes too.
    chosen = files[:: len(files) // images][:images]
    folders = scratch / "selection", scratch / "threshold"
    for folder, some in zip(folders, (chosen[::2], chosen[1::2]), strict=True):
        folder.mkdir()
        for index, file in enumerate(some):
            (folder / f"{index:06}.jpg").symlink_to(file)
    return folders


if __name__ == "__main__":
    main()
