"""The graphs that let ONNX Runtime serve a bundle, written into the bundle's folder."""

from dataclasses import dataclass
from pathlib import Path

from app.core.graph_files import write_graphs
from app.core.onnx_graph import export_graphs
from app.core.scores import SCORES_WITH_HEAD
from app.errors import EngineError
from app.store import GRAPHS_FOLDER, LoadedBundle, check_fits_onnxruntime


@dataclass(frozen=True)
class Export:
    """Graphs just written: where, and their bytes in all."""

    folder: Path
    size: int


def export(loaded: LoadedBundle) -> Export:
    """Export a bundle's network, compare its scores with torch's, and write the graphs.

    Raises:
        EngineError: the network cannot be exported, or does not score alike.
        BundleError: the bundle cannot serve.
    """
    bundle = loaded.bundle
    if loaded.folder is None:
        raise EngineError(f"bundle {bundle.name}/{bundle.version} lies in no folder")
    check_fits_onnxruntime(bundle)
    detector = loaded.detector()
    graphs = export_graphs(
        detector.network,
        block=bundle.norm_ratios.selected,
        preprocessing=bundle.preprocessing,
        head=bundle.head if bundle.score in SCORES_WITH_HEAD else None,
    )
    loaded.on_onnxruntime(detector, graphs)
    folder = loaded.folder / GRAPHS_FOLDER
    write_graphs(graphs, folder)
    return Export(folder, len(graphs.network.content) + len(graphs.gate.content))
