"""No lever changes a verdict: every engine, layout and batch, and the server, on real images."""

import copy
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Final

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from app.core.blocks import find_blocks
from app.core.detector import ENGINE_TOLERANCE, Detector, Verdicts
from app.core.engines import TorchEngine
from app.core.graph_files import read_graphs
from app.core.images import Preprocessing, load
from app.core.networks import Architecture, build
from app.core.onnx_engine import OnnxEngine
from app.core.onnx_graph import export_graphs
from app.store import LoadedBundle, Store
from benchmarks.datasets import ROOT, archive_folder
from tests.recorder import EagerRecorder
from tests.test_server import serving

IMAGES: Final = 1000
PHOTOGRAPHS: Final = 100
TOLERANCE: Final = ENGINE_TOLERANCE["float32"]
LARGEST_BATCH: Final = 32
CONNECTIONS: Final = 32


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small networks gain nothing from more, and lose a lot where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def files_of(archive: str, *, below: str, suffix: str, count: int) -> list[bytes]:
    """So many files from all over an archive of research images."""
    path = archive_folder() / archive
    if not path.exists():
        pytest.skip(f"{path} does not exist; set NORMGATE_DATA to its folder")
    with zipfile.ZipFile(path) as opened:
        names = sorted(name for name in opened.namelist() if name.startswith(below))
        names = [name for name in names if name.endswith(suffix)]
        return [opened.read(name) for name in names[:: len(names) // count][:count]]


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """A thousand CIFAR-10 test images of all classes."""
    return files_of("cifar10.zip", below="cifar10/test/", suffix=".jpg", count=IMAGES)


@pytest.fixture(scope="module")
def bundled() -> LoadedBundle:
    """The bundle that ships with NormGate."""
    return Store(ROOT / "model_store").load("cifar10-resnet18")


@pytest.fixture(scope="module")
def detector(bundled: LoadedBundle) -> Detector:
    """Its detector on torch, whose scores the threshold was set on."""
    return bundled.detector()


@pytest.fixture(scope="module")
def images(files: Sequence[bytes], bundled: LoadedBundle) -> Tensor:
    """The images as the network is fed with them."""
    return torch.stack([load(data, bundled.bundle.preprocessing) for data in files])


@pytest.fixture(scope="module")
def expected(detector: Detector, images: Tensor) -> Verdicts:
    """What torch says of them, in batches of 64 as in calibration."""
    return in_batches(detector, images, 64)


def in_batches(detector: Detector, images: Tensor, size: int, *, gate: bool = False) -> Verdicts:
    """The verdicts of all images, asked for in batches of a size."""
    run = detector.judge if gate else detector.detect
    parts = [run(images[start : start + size]) for start in range(0, len(images), size)]
    columns = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(Verdicts)
    }
    return Verdicts(**columns)


def assert_alike(found: Verdicts, expected: Verdicts) -> None:
    """Scores within the tolerance; the same verdict wherever the tolerance leaves no doubt."""
    np.testing.assert_allclose(found.scores, expected.scores, rtol=TOLERANCE, atol=0)
    is_clear = np.abs(expected.scores / expected.thresholds - 1) > TOLERANCE
    assert is_clear.mean() > 0.98
    np.testing.assert_array_equal(found.is_ood[is_clear], expected.is_ood[is_clear])
    assert 0 < expected.is_ood.sum() < len(expected.is_ood)


def on_onnxruntime(bundled: LoadedBundle, detector: Detector, *, threads: int) -> Detector:
    """On ONNX Runtime, with the graphs that ship with it."""
    assert bundled.folder is not None
    graphs = read_graphs(bundled.folder / "onnx")
    return detector.on_engine(OnnxEngine(graphs, bundled.weights, threads=threads))


def channels_last(bundled: LoadedBundle, detector: Detector) -> Detector:
    """On torch, with the other memory layout."""
    network = copy.deepcopy(detector.network).to(memory_format=torch.channels_last)
    bundle = bundled.bundle
    engine = TorchEngine(
        network, block=bundle.norm_ratios.selected, preprocessing=bundle.preprocessing
    )
    return detector.on_engine(engine)


def recorded(bundled: LoadedBundle, detector: Detector) -> Detector:
    """Padded to the sizes that a GPU's graphs have, and replayed, by a recorder for the CPU."""
    return detector.recorded(EagerRecorder(LARGEST_BATCH, bundled.bundle.preprocessing.crop))


ENGINES: Final[Mapping[str, Callable[[LoadedBundle, Detector], Detector]]] = {
    "torch": lambda bundled, detector: detector,
    "channels last": channels_last,
    "recorded": recorded,
    "onnxruntime": lambda bundled, detector: on_onnxruntime(bundled, detector, threads=1),
    "two threads": lambda bundled, detector: on_onnxruntime(bundled, detector, threads=2),
}


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, LARGEST_BATCH])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines(
    bundled: LoadedBundle,
    detector: Detector,
    images: Tensor,
    expected: Verdicts,
    engine: str,
    batch_size: int,
    gate: bool,
) -> None:
    """A thousand images, whole or up to the block, in any company: the verdicts are torch's."""
    other = ENGINES[engine](bundled, detector)

    assert_alike(in_batches(other, images, batch_size, gate=gate), expected)


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    """A hundred photographs."""
    return files_of("photos.zip", below="", suffix=".JPEG", count=PHOTOGRAPHS)


@pytest.mark.slow
def test_photographs(photographs: Sequence[bytes]) -> None:
    """A mobile network of random weights on photographs, in passes as the service makes them."""
    preprocessing = Preprocessing(
        resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    images = torch.stack([load(data, preprocessing) for data in photographs])
    torch.manual_seed(0)
    network = build(Architecture(id="torchvision/mobilenet_v3_small"))
    block = find_blocks(network, torch.zeros(1, 3, 224, 224))[1]
    norms = in_batches(
        Detector(
            network,
            block=block,
            preprocessing=preprocessing,
            score="feature_norm",
            threshold=1,
            calibration_scores=np.ones(1, np.float32),
        ),
        images,
        4,
    ).scores
    detector = Detector(
        network,
        block=block,
        preprocessing=preprocessing,
        score="feature_norm",
        threshold=float(np.median(norms)) * (1 + 2 * TOLERANCE),
        calibration_scores=np.sort(norms),
    )
    expected = in_batches(detector, images, 4)
    graphs = export_graphs(network, block=block, preprocessing=preprocessing, head=None)

    for threads in (1, 2):
        engine = OnnxEngine(graphs, network.state_dict(), threads=threads)
        for size in (1, 3, 4):
            other = detector.on_engine(engine)
            assert_alike(in_batches(other, images, size), expected)
            assert_alike(in_batches(other, images, size, gate=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_server(files: Sequence[bytes], expected: Verdicts, engine: str) -> None:
    """Over HTTP, 32 at once in batches and parts as they fall: the verdicts are torch's."""
    flags = ["--engine", engine, "--queue-size", str(IMAGES), "--deadline-ms", "60000"]
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    with (
        serving(flags) as server,
        httpx.Client(base_url=server.url, timeout=60, limits=limits) as client,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):
        answers = list(pool.map(lambda data: client.post("/v1/score", content=data), files))

    results = [answer.raise_for_status().json()["results"][0] for answer in answers]
    scores = np.array([result["score"] for result in results])
    np.testing.assert_allclose(scores, expected.scores, rtol=TOLERANCE)
    is_clear = np.abs(expected.scores / expected.thresholds - 1) > TOLERANCE
    is_ood = np.array([result["verdict"] == "ood" for result in results])
    np.testing.assert_array_equal(is_ood[is_clear], expected.is_ood[is_clear])
