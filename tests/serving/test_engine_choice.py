"""Which engine the pool chooses: what the settings say, as far as the scores agree."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.errors import EngineError
from app.offline.export import export
from app.serving.metrics import Metrics
from app.serving.pool import ModelPool
from app.settings import Settings
from app.store import LoadedBundle, Store


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


def test_a_version_let_go_has_no_engine(store: Path) -> None:
    """The series ends with the version."""
    metrics = Metrics()
    pool = ModelPool(Settings.read({"model_store": store}), metrics, devices=["cpu"])
    pool.load()
    pool.unload("tiny")

    [family] = [one for one in metrics.registry.collect() if one.name == "normgate_model_engine"]
    assert family.samples == []
