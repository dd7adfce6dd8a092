"""What is measured: networks, images, and how they are asked for."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.datasets import unpack
from benchmarks.server import ROOT

OUTPUT: Final = ROOT / "build" / "bench"
MAX_BATCH_SIZE: Final = 32
"""Images in one forward pass, the same for every server."""
MANY: Final = 16
"""Images of a request that carries several."""
NAMES: Final = ("cifar", "mobilenet", "resnet50")
_CIFAR_STEP: Final = 20


@dataclass(frozen=True)
class Load:
    """Requests that are under way at once, and the images that each carries."""

    concurrency: int
    images: int = 1

    def __str__(self) -> str:
        many = "" if self.images == 1 else f" x {self.images} images"
        return f"c={self.concurrency}{many}"


SINGLE: Final = (Load(1), Load(8), Load(32))
FULL: Final = Load(32)
"""The load that throughput goals speak of."""
ALONE: Final = Load(1)
"""The load that latency goals speak of."""


@dataclass(frozen=True)
class Case:
    """A calibrated network and the images it is sent.

    Args:
        name: on the command line.
        title: in the tables.
        store: holds the bundle and no other.
        model: the bundle's name.
        images: files of ``Load``'s requests.
        is_photographs: or else 32 px images.
        seconds: of one measurement, unless the command line says otherwise.
        loads: that the documented servers are measured under.
        our_loads: that the servers with our decoder and detector are measured under.
    """

    name: str
    title: str
    store: Path
    model: str
    images: Sequence[Path]
    is_photographs: bool
    seconds: float
    loads: Sequence[Load]
    our_loads: Sequence[Load]
    device: str = "cpu"
    """That every server runs the network on."""


def make_case(name: str, *, images: Path | None = None) -> Case:
    """The case, with its bundle made when there is none that fits this installation.

    Args:
        name: one of ``NAMES``.
        images: a folder of JPEG files to send instead of the case's own.
    """
    case = _case(name) if images is None else _case(name, sorted(images.rglob("*.jpg")))
    if not case.images:
        raise ValueError(f"no *.jpg below {images}")
    return case


def _case(name: str, images: Sequence[Path] | None = None) -> Case:
    if name == "cifar":
        return Case(
            name=name,
            title="cifar10-resnet18, 32 px JPEG",
            store=ROOT / "model_store",
            model="cifar10-resnet18",
            images=images or sorted((unpack("cifar10") / "test").rglob("*.jpg"))[::_CIFAR_STEP],
            is_photographs=False,
            seconds=2,
            loads=(*SINGLE, Load(1, MANY), Load(8, MANY)),
            our_loads=SINGLE,
        )
    if name == "mobilenet":
        return Case(
            name=name,
            title="mobilenet_v3_large, photographs",
            store=photographs_store("mobilenet_v3_large"),
            model="mobilenet_v3_large",
            images=images or _photographs(),
            is_photographs=True,
            seconds=3,
            loads=(*SINGLE, Load(1, MANY)),
            our_loads=SINGLE,
        )
    return Case(
        name=name,
        title="resnet50, photographs",
        store=photographs_store("resnet50"),
        model="resnet50",
        images=images or _photographs(),
        is_photographs=True,
        seconds=4,
        loads=(*SINGLE, Load(1, MANY)),
        our_loads=SINGLE,
    )


def photographs_store(network: str, *, blocks: str | None = None) -> Path:
    """A store with a torchvision network of random weights, calibrated on the photographs.

    Args:
        network: a name of torchvision's, and the bundle's.
        blocks: a glob that leaves only some blocks to choose from.
    """
    # Here and below, not at the top: the 32 px case needs none of what they load.
    from app.errors import BundleError
    from app.store import GRAPHS_FOLDER, Store

    folder = network if blocks is None else f"{network}-{blocks}"
    store = Store(OUTPUT / "store" / folder)
    try:
        store.load(network).detector()
    except BundleError:
        shutil.rmtree(store.root, ignore_errors=True)
        _calibrate(network, store.root, blocks=blocks)
    if not any(store.root.rglob(GRAPHS_FOLDER)):
        _export(network, store.root)
    return store.root


def _calibrate(network: str, store: Path, *, blocks: str | None) -> None:
    from app.core.networks import Architecture
    from app.offline.calibrate import RANDOM_WEIGHTS, CalibrationOptions, calibrate
    from app.store import Store

    photographs = _photographs()
    with tempfile.TemporaryDirectory() as folder:
        halves = [Path(folder, name) for name in ("selection", "threshold")]
        for number, half in enumerate(halves):
            half.mkdir()
            for photograph in photographs[number::2]:
                shutil.copy(photograph, half)
        options = CalibrationOptions(
            name=network,
            architecture=Architecture(id=f"torchvision/{network}"),
            weights=RANDOM_WEIGHTS,
            selection_images=halves[0],
            threshold_images=halves[1],
            blocks=blocks,
        )
        calibrate(options, Store(store), progress=lambda title, *, done, total: None)


def _export(network: str, store: Path) -> None:
    """Let ONNX Runtime serve the bundle, where it is installed; torch does otherwise."""
    command = [sys.executable, "-m", "app.cli", "export", "--bundle", network]
    done = subprocess.run(
        [*command, "--model-store", str(store)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        print(f"{network} is served by torch: {done.stderr.strip()}", file=sys.stderr)


def _photographs() -> Sequence[Path]:
    return sorted(unpack("photos").rglob("*.JPEG"))
