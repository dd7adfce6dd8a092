"""A network's ONNX graphs on disk: ``network.onnx``, ``gate.onnx`` and what they must hash to."""

import hashlib
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from app.core.onnx_graph import Graph, Graphs
from app.errors import EngineError, NoGraphsError

MANIFEST_FILE: Final = "manifest.json"
_LIBRARIES: Final = ("torch", "onnx", "onnxscript")


class GraphFile(BaseModel):
    """One graph: its file's sha256, and the keys of the weights it lacks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    weights: tuple[str, ...]


class Manifest(BaseModel):
    """What lies in the folder, and what wrote it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    network: GraphFile
    gate: GraphFile
    libraries: dict[str, str]


def write_graphs(graphs: Graphs, folder: Path) -> None:
    """Write the graphs, in place of those that are there.

    Raises:
        EngineError: the disk is full or refuses; what was there is still there, or nothing is.
    """
    manifest = Manifest(
        network=_describe(graphs.network),
        gate=_describe(graphs.gate),
        libraries={library: version(library) for library in _LIBRARIES},
    )
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
            staged = Path(partial, folder.name)
            staged.mkdir()
            (staged / "network.onnx").write_bytes(graphs.network.content)
            (staged / "gate.onnx").write_bytes(graphs.gate.content)
            (staged / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")
            if folder.exists():
                folder.rename(Path(partial, "before"))
            staged.rename(folder)
    except (OSError, shutil.Error) as error:
        raise EngineError(f"the graphs cannot be written to {folder}: {error}") from error


def read_graphs(folder: Path) -> Graphs:
    """The graphs in a folder, verified.

    Raises:
        NoGraphsError: there are none.
        EngineError: a file is damaged, or is not the one that was written.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise NoGraphsError(f"there is no {file}: normgate export writes it")
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
        return Graphs(
            network=_read(folder / "network.onnx", manifest.network),
            gate=_read(folder / "gate.onnx", manifest.gate),
        )
    except OSError as error:
        raise EngineError(f"{folder} cannot be read: {error}") from error
    except ValidationError as error:
        raise EngineError(f"{file} is damaged: {error.errors()[0]['msg']}") from error


def _describe(graph: Graph) -> GraphFile:
    return GraphFile(sha256=hashlib.sha256(graph.content).hexdigest(), weights=graph.weights)


def _read(file: Path, expected: GraphFile) -> Graph:
    content = file.read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected.sha256:
        raise EngineError(f"{file} has sha256 {actual}, but its manifest says {expected.sha256}")
    return Graph(content, expected.weights)
