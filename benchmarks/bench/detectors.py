"""Detectors on every engine that NormGate can run here, for use without its server."""

import sys
from pathlib import Path
from typing import Any, Final, Literal

import torch

from app.core.detector import Detector
from app.core.graph_files import read_graphs
from app.core.onnx_engine import OnnxEngine
from app.core.onnx_graph import LOGITS, Graph, Graphs
from app.errors import EngineError
from app.store import GRAPHS_FOLDER, LoadedBundle, Store
from benchmarks.bench.cases import MAX_BATCH_SIZE

Engine = Literal["torch", "onnxruntime", "cuda_graphs"]

CPU: Final = "cpu"


def served(loaded: LoadedBundle, *, device: str) -> Detector:
    """The detector that the service would run: ONNX Runtime's, CUDA graphs', or torch's.

    Args:
        loaded: the bundle.
        device: that the network runs on.
    """
    detector = loaded.detector(device=device)
    if device == CPU and has_onnxruntime(loaded):
        return loaded.on_onnxruntime(detector)
    return detector if device == CPU else on_cuda_graphs(loaded, detector, device=device)


def on_cuda_graphs(loaded: LoadedBundle, detector: Detector, *, device: str) -> Detector:
    """The same on CUDA graphs, or itself where they cannot be; it then says why."""
    try:
        return loaded.on_cuda_graphs(detector, device=device, batch_size=MAX_BATCH_SIZE)
    except EngineError as error:
        print(f"torch runs the network: {error}", file=sys.stderr)
        return detector


def has_onnxruntime(loaded: LoadedBundle) -> bool:
    """Whether ONNX Runtime is installed, has the bundle's graphs, and scores as torch does."""
    try:
        loaded.on_onnxruntime(loaded.detector())
    except EngineError:
        return False
    return True


class Loader:
    """Makes detectors of one bundle.

    Args:
        store: where the bundle lies.
        model: its name.
        device: that the detectors run on.
    """

    def __init__(self, store: Path, model: str, *, device: str = CPU) -> None:
        self._loaded = Store(store).load(model)
        self._device = device
        self.preprocessing = self._loaded.bundle.preprocessing
        self.engines: tuple[Engine, ...] = ("torch",)
        if device == CPU and has_onnxruntime(self._loaded):
            self.engines = ("torch", "onnxruntime")
        if device != CPU:
            self.engines = ("torch", "cuda_graphs")

    def detector(self, *, engine: Engine, threads: int) -> Detector:
        """A detector of its own network.

        Args:
            engine: one of ``engines``.
            threads: of a forward pass.
        """
        torch.set_num_threads(threads)
        detector = self._loaded.detector(device=self._device)
        if engine == "onnxruntime":
            return self._loaded.on_onnxruntime(detector)
        if engine == "cuda_graphs":
            return on_cuda_graphs(self._loaded, detector, device=self._device)
        return detector


def logits_session(loaded: LoadedBundle, *, threads: int) -> Any:
    """The session of ONNX Runtime that NormGate uses, for the logits and nothing else.

    ONNX Runtime leaves out what no output needs.

    Raises:
        EngineError: it cannot run the bundle.
    """
    import onnx  # an extra

    assert loaded.folder is not None
    graphs = read_graphs(loaded.folder / GRAPHS_FOLDER)
    model: Any = onnx.load_from_string(graphs.network.content)
    for output in [one for one in model.graph.output if one.name != LOGITS]:
        model.graph.output.remove(output)
    network = Graph(model.SerializeToString(), graphs.network.weights)
    engine = OnnxEngine(Graphs(network, graphs.gate), loaded.weights, threads=threads)
    return engine._network
