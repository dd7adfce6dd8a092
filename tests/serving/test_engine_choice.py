"""Which engine the pool chooses: what the settings say, as far as the scores agree."""

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core.detector import ENGINE_TOLERANCE, Detector
from app.core.recorded_engine import Pass, Recording
from app.errors import EngineError
from app.offline.export import export
from app.serving.metrics import Metrics
from app.serving.pool import ModelPool
from app.settings import Settings
from app.store import LoadedBundle, Store
from tests.recorder import EagerRecorder, EagerTransfer


@pytest.fixture(scope="module")
def exported(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with ``tiny/1`` and its graphs."""
    root = tmp_path_factory.mktemp("exported") / "store"
    shutil.copytree(tiny_store.root, root)
    written = export(Store(root).load("tiny"))
    assert written.folder == root / "tiny" / "1" / "onnx"
    assert written.size == sum(file.stat().st_size for file in written.folder.glob("*.onnx"))
    return root


@pytest.fixture
def store(exported: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    shutil.copytree(exported, tmp_path / "store")
    return tmp_path / "store"


def load(store: Path, *, devices: tuple[str, ...] = ("cpu",), **settings: Any) -> Metrics:
    """Load all models; the metrics then tell the engine."""
    metrics = Metrics()
    read = Settings.read({"model_store": store, "max_batch_size": 2, **settings})
    ModelPool(read, metrics, devices=devices).load()
    return metrics


def engine_of(metrics: Metrics) -> str:
    """The one engine that runs ``tiny/1``."""
    [family] = [one for one in metrics.registry.collect() if one.name == "normgate_model_engine"]
    [sample] = family.samples
    assert sample.value == 1
    assert (sample.labels["model"], sample.labels["version"]) == ("tiny", "1")
    return sample.labels["engine"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("auto", "onnxruntime"), ("onnxruntime", "onnxruntime"), ("torch", "torch")],
)
def test_an_exported_bundle(store: Path, wanted: str, found: str) -> None:
    """ONNX Runtime runs it, unless torch is asked for."""
    assert engine_of(load(store, engine=wanted)) == found


def _remove(store: Path) -> None:
    shutil.rmtree(store / "tiny" / "1" / "onnx")


def _damage(store: Path) -> None:
    file = store / "tiny" / "1" / "onnx" / "gate.onnx"
    file.write_bytes(file.read_bytes()[::-1])


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [(_remove, "normgate export writes it"), (_damage, "gate.onnx has sha256")],
)
def test_graphs_that_cannot_run(
    store: Path,
    capsys: pytest.CaptureFixture[str],
    break_it: Callable[[Path], None],
    reason: str,
) -> None:
    """By default torch runs the network and the log says why; asked for, the start fails."""
    break_it(store)

    assert engine_of(load(store)) == "torch"
    assert reason in capsys.readouterr().out
    with pytest.raises(EngineError, match=rf"^bundle tiny/1: .*{reason}"):
        load(store, engine="onnxruntime")


def test_scores_that_differ(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine that scores 1 % higher is not used, and the log says by how much it differs."""
    honest = LoadedBundle.on_onnxruntime

    def biased(self: LoadedBundle, *arguments: Any, **options: Any) -> Any:
        weights = dict(self.weights)
        weights["layer4.0.bn2.weight"] = 1.01 * weights["layer4.0.bn2.weight"]
        weights["layer1.0.bn2.weight"] = 1.01 * weights["layer1.0.bn2.weight"]
        return honest(replace(self, weights=weights), *arguments, **options)

    monkeypatch.setattr(LoadedBundle, "on_onnxruntime", biased)

    assert engine_of(load(store)) == "torch"
    assert "differs from torch's by" in capsys.readouterr().out
    with pytest.raises(EngineError, match="the limit is"):
        load(store, engine="onnxruntime")


def test_onnxruntime_is_not_installed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default torch runs the network; asked for, the start fails and says what to install."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    assert engine_of(load(store)) == "torch"
    with pytest.raises(EngineError, match=r"tiny/1: onnxruntime is not installed: pip install"):
        load(store, engine="onnxruntime")


def test_a_bundle_in_bfloat16(half_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Torch runs it and the log says why; ONNX Runtime is refused, and so is an export."""
    assert engine_of(load(half_store.root)) == "torch"
    assert "onnxruntime runs networks of dtype float32 alone" in capsys.readouterr().out
    with pytest.raises(EngineError, match=r"^bundle tiny/1: dtype is bfloat16"):
        load(half_store.root, engine="onnxruntime")
    with pytest.raises(EngineError, match="dtype is bfloat16"):
        export(half_store.load("tiny"))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two GPUs that are none: networks stay on the CPU, and so do their recordings."""
    on_cpu, made = LoadedBundle.detector, list[str]()

    def detector(self: LoadedBundle, *, device: str) -> Detector:
        made.append(device)
        return on_cpu(self)

    def record(self: LoadedBundle, detector: Detector, *, device: str, batch_size: int) -> Detector:
        side = self.bundle.preprocessing.crop
        return self.recorded(detector, lambda: EagerRecorder(batch_size, side))

    monkeypatch.setattr(LoadedBundle, "detector", detector)
    monkeypatch.setattr(LoadedBundle, "on_cuda_graphs", record)
    return made


def test_gpus_replay_recordings(store: Path, gpus: list[str]) -> None:
    """Each GPU has a detector of its own, recorded for batches as large as the settings allow."""
    metrics = Metrics()
    settings = Settings.read({"model_store": store, "max_batch_size": 2})
    pool = ModelPool(settings, metrics, devices=("cuda:0", "cuda:1"))
    pool.load()

    detectors = pool.resolve("tiny").detectors
    assert list(detectors) == gpus == ["cuda:0", "cuda:1"]
    assert detectors["cuda:0"]._engine is not detectors["cuda:1"]._engine
    assert engine_of(metrics) == "cuda_graphs"


def test_torch_is_asked_for_on_a_gpu(store: Path, gpus: list[str]) -> None:
    """Nothing is recorded; ONNX Runtime, which runs on the CPU, is refused."""
    assert engine_of(load(store, devices=("cuda:0",), engine="torch")) == "torch"
    with pytest.raises(EngineError, match="not on cuda:0"):
        load(store, devices=("cuda:0",), engine="onnxruntime")


def test_passes_that_cannot_be_recorded(
    store: Path,
    gpus: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Torch runs the network without recordings, and the log says why."""

    def fail(self: EagerRecorder, run: Pass, size: int) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing\nand a page more")

    monkeypatch.setattr(EagerRecorder, "record", fail)

    assert engine_of(load(store, devices=("cuda:0",))) == "torch"
    log = capsys.readouterr().out
    assert "recording failed: operation not permitted when stream is capturing" in log
    assert "and a page more" not in log


def test_recordings_that_score_otherwise(
    store: Path,
    gpus: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Recordings that forget the images they are given are not used."""
    monkeypatch.setattr(EagerTransfer, "put", lambda self, inputs: None)

    assert engine_of(load(store, devices=("cuda:0",))) == "torch"
    assert "differs from torch's by" in capsys.readouterr().out


def test_a_version_let_go_has_no_engine(store: Path) -> None:
    """The series ends with the version."""
    metrics = Metrics()
    pool = ModelPool(Settings.read({"model_store": store}), metrics, devices=["cpu"])
    pool.load()
    pool.unload("tiny")

    [family] = [one for one in metrics.registry.collect() if one.name == "normgate_model_engine"]
    assert family.samples == []


@pytest.mark.parametrize(
    ("tiny_side", "threads", "passes"), [(64, 2, 2), (16, 2, 2), (16, 1, 1), (16, 4, 2)]
)
def test_passes_at_once(
    store: Path, monkeypatch: pytest.MonkeyPatch, tiny_side: int, threads: int, passes: int
) -> None:
    """Two share the threads, where there are two; alone or together they score alike."""
    monkeypatch.setattr("app.core.cores._TINY_SIDE", tiny_side)
    settings = Settings.read({"model_store": store, "compute_threads": threads})
    pool = ModelPool(settings, Metrics(), devices=("cpu",))
    pool.load()
    detector = pool.resolve("tiny").detectors["cpu"]
    images = torch.stack([torch.full((3, 32, 32), 20 * i, dtype=torch.uint8) for i in range(8)])
    truth = Store(store).load("tiny").detector().detect(images).scores

    with ThreadPoolExecutor(passes) as workers:
        found = list(workers.map(detector.beside.detect, [images] * 8))
    found.append(detector.detect(images))

    assert detector.passes == passes
    assert (detector.beside is detector) == (passes == 1 or tiny_side == 64)
    for detections in found:
        assert detections.scores == pytest.approx(truth, rel=ENGINE_TOLERANCE["float32"])
