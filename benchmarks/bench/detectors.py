"""Detectors on every engine that NormGate can run here, for use without its server."""

import importlib
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch

from app.core.detector import Detector
from app.errors import NormGateError
from app.store import Bundle, LoadedBundle, Store

Engine = Literal["torch", "onnxruntime"]

LOGITS: Final = "logits"


def served(loaded: LoadedBundle, *, device: str) -> Detector:
    """The detector that the service would run: ONNX Runtime's where it can be, or torch's.

    Args:
        loaded: the bundle.
        device: that the network runs on.
    """
    detector = loaded.detector(device=device)
    if device == "cpu" and has_onnxruntime(loaded):
        return on_onnxruntime(loaded, detector)
    return detector


def has_onnxruntime(loaded: LoadedBundle) -> bool:
    """Whether ONNX Runtime is installed, has the bundle's graphs, and scores as torch does."""
    try:
        on_onnxruntime(loaded, loaded.detector())
    except (NormGateError, AttributeError):
        return False
    return True


def on_onnxruntime(loaded: LoadedBundle, detector: Detector) -> Detector:
    """The detector on ONNX Runtime, with as many threads as torch has now.

    Raises:
        NormGateError: it cannot be.
        AttributeError: this NormGate knows no other engine than torch.
    """
    return cast(Detector, loaded.on_onnxruntime(detector))  # type: ignore[attr-defined]


class Loader:
    """Makes detectors of one bundle.

    Args:
        store: where the bundle lies.
        model: its name.
        device: that the detectors run on.
    """

    def __init__(self, store: Path, model: str, *, device: str = "cpu") -> None:
        self._loaded = Store(store).load(model)
        self._device = device
        self.engines: tuple[Engine, ...] = ("torch",)
        if device == "cpu" and has_onnxruntime(self._loaded):
            self.engines = ("torch", "onnxruntime")

    @property
    def bundle(self) -> Bundle:
        """What the detectors are made of."""
        return self._loaded.bundle

    def detector(self, *, engine: Engine, threads: int) -> Detector:
        """A detector of its own network.

        Args:
            engine: one of ``engines``.
            threads: of a forward pass.
        """
        torch.set_num_threads(threads)
        detector = self._loaded.detector(device=self._device)
        return detector if engine == "torch" else on_onnxruntime(self._loaded, detector)


def logits_session(loaded: LoadedBundle) -> Any:
    """An ONNX Runtime session of the network that gives the logits and nothing else.

    ONNX Runtime leaves out what no output needs.
    """
    onnx = importlib.import_module("onnx")
    engine = importlib.import_module("app.core.onnx_engine")
    graph_type = importlib.import_module("app.core.onnx_graph").Graph
    read_graphs = importlib.import_module("app.core.graph_files").read_graphs
    graph = read_graphs(cast(Any, loaded).folder / "onnx").network
    model = onnx.load_from_string(graph.content)
    for output in [one for one in model.graph.output if one.name != LOGITS]:
        model.graph.output.remove(output)
    trimmed = graph_type(model.SerializeToString(), graph.weights)
    return engine._session(trimmed, loaded.weights, threads=torch.get_num_threads())
