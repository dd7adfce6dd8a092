"""A network run by ONNX Runtime on the CPU, with the weights of the bundle put in."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from app.core.cores import patient_threads
from app.core.engines import EngineName, Outputs
from app.core.onnx_graph import FEATURE_NORMS, INPUT, WEIGHT_PREFIX, Graph, Graphs
from app.errors import EngineError, NoEngineError

_OPTIONS: Final = {
    # Threads that spin between batches would take the cores of the event loop and the decoders;
    # within one they do, briefly, where several share it: see below.
    "session.intra_op.allow_spinning": "0",
    "session.inter_op.allow_spinning": "0",
    "session.force_spinning_stop": "1",
    # A folder that cannot be: a graph may read no file, whatever it names.
    "session.model_external_initializers_file_folder_path": "/dev/null/none",
}
_SPINNING: Final = {
    "session.intra_op.allow_spinning": "1",
    # From one layer to the next: to sleep and be woken takes about as long as a small layer.
    "session.intra_op.spin_duration_us": "20",
}
_SPINS_BRIEFLY_FROM: Final = (1, 26)
"""The first version that can be told how long; those before spin for milliseconds."""
_FATAL: Final = 4


class OnnxEngine:
    """Two sessions, of the whole network and of its part up to the block.

    The interpreter is free while one runs: ONNX Runtime takes and returns a batch at once.

    Args:
        graphs: of :func:`app.core.onnx_graph.export_graphs`.
        weights: the network's state dict.
        threads: of one forward pass.

    Raises:
        EngineError: ONNX Runtime is not installed, or refuses the graphs or the weights.
    """

    name: EngineName = "onnxruntime"

    def __init__(self, graphs: Graphs, weights: Mapping[str, Tensor], *, threads: int) -> None:
        self._network = _session(graphs.network, weights, threads=threads)
        self._gate = _session(graphs.gate, weights, threads=threads)

    def run(self, images: Tensor) -> Outputs:
        """As :meth:`app.core.engines.Engine.run`."""
        found = self._network.run(None, {INPUT: images.numpy()})
        return Outputs(*map(torch.from_numpy, found))

    def run_to_block(self, images: Tensor) -> Tensor:
        """As :meth:`app.core.engines.Engine.run_to_block`."""
        [norms] = self._gate.run([FEATURE_NORMS], {INPUT: images.numpy()})
        return torch.from_numpy(norms)


def _session(graph: Graph, weights: Mapping[str, Tensor], *, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise NoEngineError("onnxruntime is not installed: pip install 'normgate[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    # The C library's allocator already keeps what was freed; an arena of its own would keep more.
    options.enable_cpu_mem_arena = False
    for key, value in (_OPTIONS | _spinning(onnxruntime.__version__, threads=threads)).items():
        options.add_session_config_entry(key, value)
    try:
        values = {
            WEIGHT_PREFIX + key: onnxruntime.OrtValue.ortvalue_from_numpy(weights[key].numpy())
            for key in graph.weights
        }
        options.add_external_initializers(list(values), list(values.values()))
        with patient_threads():
            return onnxruntime.InferenceSession(
                graph.content, options, providers=["CPUExecutionProvider"]
            )
    except Exception as error:  # its errors have no common class
        reason = " ".join(str(error).split())
        raise EngineError(f"onnxruntime refuses the graph: {reason}") from error


def _spinning(version: str, *, threads: int) -> dict[str, str]:
    major, minor = map(int, version.split(".")[:2])
    return _SPINNING if threads > 1 and (major, minor) >= _SPINS_BRIEFLY_FROM else {}
