"""Engines: whatever runs the network, the scores are torch's and so are the verdicts."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from app.core.blocks import Block, find_blocks
from app.core.detector import ENGINE_TOLERANCE, check_agreement
from app.core.engines import EngineName, Outputs, TorchEngine
from app.core.graph_files import read_graphs, write_graphs
from app.core.images import Preprocessing
from app.core.networks import CIFAR_PREPROCESSING, Architecture, build
from app.core.onnx_engine import OnnxEngine
from app.core.onnx_graph import Graph, Graphs, export_graphs
from app.core.scores import SCORES_WITH_HEAD, ScoreName
from app.errors import EngineError, NetworkError, NoEngineError, NoGraphsError
from tests.core.test_detector import detector_of

THREADS = 1


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small networks gain nothing from more, and lose a lot where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def noise(count: int, side: int = 32) -> Tensor:
    """``[count, 3, side, side]`` uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def onnx_engine(network: nn.Module, graphs: Graphs, *, threads: int = THREADS) -> OnnxEngine:
    """An engine with the network's own weights."""
    return OnnxEngine(graphs, network.state_dict(), threads=threads)


@pytest.fixture(scope="module")
def graphs(network: nn.Module, block: Block) -> Graphs:
    """The graphs of the small network, with the head's input."""
    return export_graphs(network, block=block, preprocessing=CIFAR_PREPROCESSING, head="fc")


@pytest.mark.parametrize(
    ("version", "threads", "spins"), [("1.26.0", 2, "1"), ("1.25.1", 2, "0"), ("1.32.0", 1, "0")]
)
def test_threads_spin_where_they_can_be_told_how_briefly(
    network: nn.Module,
    graphs: Graphs,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    threads: int,
    spins: str,
) -> None:
    """Older versions of ONNX Runtime would spin for milliseconds; one thread waits for nobody."""
    monkeypatch.setattr(onnxruntime, "__version__", version)

    options = onnx_engine(network, graphs, threads=threads)._network.get_session_options()

    assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    if spins == "1":
        assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "20"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such policy")
def test_the_sessions_threads_are_patient(network: nn.Module, graphs: Graphs) -> None:
    """The threads that share a pass with the caller put no other thread aside."""
    onnx_engine(network, graphs)  # which may start threads of the library's own
    before = set(os.listdir("/proc/self/task"))
    engine = onnx_engine(network, graphs, threads=2)
    started = set(os.listdir("/proc/self/task")) - before

    engine.run(noise(4))

    assert started
    assert {os.sched_getscheduler(int(thread)) for thread in started} == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_gate_and_full_answer(network: nn.Module, graphs: Graphs) -> None:
    """ONNX Runtime's gate gives the norm of its full answer."""
    engine = onnx_engine(network, graphs)
    images = noise(5)

    np.testing.assert_allclose(
        engine.run_to_block(images), engine.run(images).feature_norms, rtol=1e-6
    )


def test_any_batch_size(network: nn.Module, block: Block, graphs: Graphs) -> None:
    """One session takes every batch size; an image scores alike in all."""
    detector = detector_of(network, block, CIFAR_PREPROCESSING)
    other = detector.on_engine(onnx_engine(network, graphs))
    images = noise(32)
    truth = detector.detect(images).scores

    for size in range(1, 33):
        found = other.detect(images[:size])
        np.testing.assert_allclose(found.scores, truth[:size], rtol=ENGINE_TOLERANCE["float32"])
        assert found.logits.shape == (size, 10)


@pytest.mark.parametrize("score", sorted(SCORES_WITH_HEAD))
def test_scores_with_a_head(
    network: nn.Module, block: Block, graphs: Graphs, score: ScoreName
) -> None:
    """The head's input comes out of the graph, so that its norm can be replaced."""
    detector = detector_of(network, block, CIFAR_PREPROCESSING, score)
    other = detector.on_engine(onnx_engine(network, graphs))

    check_agreement(other, detector, noise(4))
    np.testing.assert_allclose(
        other.detect(noise(4)).scores,
        detector.detect(noise(4)).scores,
        rtol=ENGINE_TOLERANCE["float32"],
    )


class Tokens(nn.Module):
    """Four patches of an image as tokens, mixed in place: ``[B, 4, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        tokens = self.mix(self.patches(images).flatten(2).transpose(1, 2))
        logits: Tensor = self.fc(tokens.mean(dim=1))
        return logits


class LastChannels(nn.Module):
    """Maps with the channels last, negative in part, and changed in place once they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        maps = self.last(self.maps(images).permute(0, 2, 3, 1))
        maps += 1
        logits: Tensor = self.fc(maps.relu_().mean(dim=(1, 2)))
        return logits


class Gated(nn.Module):
    """Channels weighted by their own means, before the block that is read and after it."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)
        self.register_buffer("mean", torch.tensor((0.5, 0.5, 0.5)) * 255)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        maps = self.maps(images)
        maps = self.last(maps * maps.mean((2, 3), keepdim=True))
        means = maps.mean((2, 3))
        logits: Tensor = self.fc(maps.relu().mean((2, 3)) * means) + self.mean / 255
        return logits


CASES = [
    (Gated, Block("last", "maps"), 8),
    (Tokens, Block("mix", "tokens"), 8),
    (LastChannels, Block("last", "channels_last"), 8),
    ("cifar/vgg11", None, 32),
    pytest.param("torchvision/mobilenet_v3_small", None, 64, marks=pytest.mark.slow),
    pytest.param("timm/vit_tiny_patch16_224", None, 224, marks=pytest.mark.slow),
]
ARGUMENTS: dict[str, dict[str, bool | int | float | str]] = {
    "cifar/vgg11": {"width": 8},
    "timm/vit_tiny_patch16_224": {"depth": 2},
}


@pytest.mark.parametrize(("kind", "read", "side"), CASES)
def test_kinds_of_networks(kind: type[nn.Module] | str, read: Block | None, side: int) -> None:
    """Tokens, channels last, plain, mobile and attention: exported, they score as torch does."""
    torch.manual_seed(0)
    if isinstance(kind, str):
        network = build(Architecture(id=kind, arguments=ARGUMENTS.get(kind, {})))
    else:
        network = kind().eval()
    block = read or find_blocks(network, torch.zeros(1, 3, side, side))[-2]
    preprocessing = Preprocessing(resize=side, crop=side, mean=(0.5,) * 3, std=(0.2,) * 3)
    detector = detector_of(network, block, preprocessing)

    graphs = export_graphs(network, block=block, preprocessing=preprocessing, head=None)
    other = detector.on_engine(onnx_engine(network, graphs))

    check_agreement(other, detector, noise(3, side))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert len(graphs.network.content) < 50_000 or len(graphs.network.content) < parameters


class Off:
    """Torch's outputs, all a factor too large in one of them."""

    name: EngineName = "onnxruntime"

    def __init__(self, inner: TorchEngine, **factors: float) -> None:
        self._inner, self._factors = inner, factors

    def run(self, images: Tensor) -> Outputs:
        """The whole network."""
        found = self._inner.run(images)
        return Outputs(
            found.feature_norms * self._factors.get("norms", 1),
            found.logits * self._factors.get("logits", 1),
        )

    def run_to_block(self, images: Tensor) -> Tensor:
        """The norms."""
        factor = self._factors.get("gate", 1)
        if len(images) == 1:
            factor *= self._factors.get("gate_alone", 1)
        return self._inner.run_to_block(images) * factor


@pytest.mark.parametrize("output", ["norms", "logits", "gate", "gate_alone"])
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_an_engine_that_disagrees(
    network: nn.Module, block: Block, output: str, factor: float
) -> None:
    """A score or logit one percent off, or no number, is refused; the same outputs pass."""
    detector = detector_of(network, block, CIFAR_PREPROCESSING)
    inner = TorchEngine(network, block=block, preprocessing=CIFAR_PREPROCESSING)

    check_agreement(detector.on_engine(Off(inner)), detector, noise(2))
    with pytest.raises(EngineError, match="differs from torch's by"):
        check_agreement(detector.on_engine(Off(inner, **{output: factor})), detector, noise(2))


def test_an_engine_whose_norm_is_off_behind_another_score(network: nn.Module, block: Block) -> None:
    """The norm is told in every answer, also where the verdict does not depend on it."""
    detector = detector_of(network, block, CIFAR_PREPROCESSING, "msp")
    inner = TorchEngine(network, block=block, preprocessing=CIFAR_PREPROCESSING)

    check_agreement(detector.on_engine(Off(inner)), detector, noise(2))
    with pytest.raises(EngineError, match="a FeatureNorm differs"):
        check_agreement(detector.on_engine(Off(inner, norms=1.01)), detector, noise(2))


def test_another_engine_lets_the_network_go(network: nn.Module, graphs: Graphs) -> None:
    """A detector on another engine names it, and holds no torch network."""
    detector = detector_of(network, Block("layer4.0", "maps"), CIFAR_PREPROCESSING)
    other = detector.on_engine(onnx_engine(network, graphs))

    assert (detector.engine, other.engine) == ("torch", "onnxruntime")
    assert detector.network is network
    with pytest.raises(NetworkError, match="onnxruntime has no torch network"):
        _ = other.network


class Undecided(nn.Module):
    """Takes another way for bright images: no graph can say that."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        maps = self.maps(images)
        if maps.sum() > 0:
            maps = maps * 2
        logits: Tensor = self.fc(maps.mean(dim=(2, 3)))
        return logits


def test_a_network_that_cannot_be_exported() -> None:
    """It is refused in one line that names it."""
    preprocessing = Preprocessing(resize=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1))

    with pytest.raises(EngineError, match="Undecided cannot be exported to ONNX: ") as caught:
        export_graphs(
            Undecided().eval(), block=Block("maps", "maps"), preprocessing=preprocessing, head=None
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["onnxscript", "onnxruntime"])
def test_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, network: nn.Module, block: Block, graphs: Graphs, module: str
) -> None:
    """The error names what to install."""
    uses: dict[str, Callable[[], object]] = {
        "onnxruntime": lambda: onnx_engine(network, graphs),
        "onnxscript": lambda: export_graphs(
            network, block=block, preprocessing=CIFAR_PREPROCESSING, head=None
        ),
    }
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(NoEngineError, match=rf"{module} is not installed: pip install 'normgate"):
        uses[module]()


def damaged(graphs: Graphs) -> Iterator[Graphs]:
    """Graphs that are none, lack a weight, or want one that is not there."""
    yield Graphs(Graph(b"no graph", ()), graphs.gate)
    yield Graphs(Graph(graphs.network.content, graphs.network.weights[1:]), graphs.gate)
    yield Graphs(Graph(graphs.network.content, (*graphs.network.weights, "other")), graphs.gate)


@pytest.mark.parametrize("kind", range(3))
def test_graphs_that_are_refused(network: nn.Module, graphs: Graphs, kind: int) -> None:
    """Whatever is wrong with a graph is one error, in one line."""
    [bad] = islice(damaged(graphs), kind, kind + 1)

    with pytest.raises(EngineError, match="onnxruntime refuses the graph") as caught:
        onnx_engine(network, bad)
    assert "\n" not in str(caught.value)


def test_a_graph_reads_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, network: nn.Module, graphs: Graphs
) -> None:
    """A weight that a graph would take from a file is refused, even where the file is there."""
    monkeypatch.chdir(tmp_path)
    size = network.state_dict()["conv1.weight"].numel() * 4
    (tmp_path / "secret").write_bytes(bytes(size))
    location = b"put in by NormGate"
    content = graphs.network.content.replace(location, b"secret".ljust(len(location), b"\0"), 1)
    for name in (location, b"secret"):
        padded = name.decode().ljust(len(location), "x")
        (tmp_path / padded).write_bytes(bytes(size))
    lacking = tuple(key for key in graphs.network.weights if key != "conv1.weight")

    for changed in (content, graphs.network.content):
        with pytest.raises(EngineError, match="refuses the graph"):
            onnx_engine(network, Graphs(Graph(changed, lacking), graphs.gate))


def test_operators_of_the_graphs(graphs: Graphs) -> None:
    """Normalisation is one operator, and lengths are made by those that are vectorised."""
    for graph in (graphs.network, graphs.gate):
        kinds = Counter(node.op_type for node in onnx.load_from_string(graph.content).graph.node)

        assert not {"Div", "Sub", "ReduceL2"} & set(kinds)
        assert kinds["ReduceSum"] == kinds["Sqrt"] == 1


def test_graphs_on_disk(tmp_path: Path, graphs: Graphs) -> None:
    """What is written is what is read, also in place of others; nothing else is left."""
    folder = tmp_path / "onnx"
    with pytest.raises(NoGraphsError, match="normgate export"):
        read_graphs(folder)

    write_graphs(Graphs(graphs.gate, graphs.gate), folder)
    write_graphs(graphs, folder)

    assert read_graphs(folder) == graphs
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert sorted(path.name for path in folder.iterdir()) == [
        *("gate.onnx", "manifest.json", "network.onnx")
    ]


@pytest.mark.parametrize("name", ["network.onnx", "gate.onnx", "manifest.json"])
def test_damaged_files(tmp_path: Path, graphs: Graphs, name: str) -> None:
    """A file of other content, or none, is refused, and named."""
    write_graphs(graphs, tmp_path / "onnx")
    file = tmp_path / "onnx" / name
    file.write_bytes(file.read_bytes()[:-3])

    with pytest.raises(EngineError, match=name):
        read_graphs(tmp_path / "onnx")
