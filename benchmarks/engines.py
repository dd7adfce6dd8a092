"""What each way of running a network gives: ``python -m benchmarks.engines``.

Every way runs the same batch in turn, round after round, and is compared with the others of its
round: what else the machine does then counts for all alike. The figures are medians over the
rounds; ``spread`` is half the range of the middle half, relative.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
import torch._inductor.config
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils.flop_counter import FlopCounterMode

from app.core.allocator import keep_memory
from app.core.blocks import Block, BlockNorms, find_blocks
from app.core.engines import TorchEngine
from app.core.images import Preprocessing
from app.core.networks import Architecture, build, default_preprocessing
from app.core.onnx_engine import OnnxEngine
from app.core.onnx_graph import export_graphs
from app.store import Store
from benchmarks.bench.figures import Goal, Spread, spread
from benchmarks.datasets import ROOT

Run = Callable[[], object]
"""One batch."""
Clock = Callable[[], float]

RESULTS: Final = ROOT / "build" / "bench" / "engines.json"
OF_PEER: Final = 0.95
OF_CLASSIFIER: Final = 0.98
PEER: Final = "onnxruntime, the network alone"
OURS: Final = "onnxruntime, full answer"
GATE: Final = "onnxruntime, gate"
CLASSIFIER: Final = "onnxruntime, ours without score"
EAGER: Final = "torch, full answer"
TORCH_GATE: Final = "torch, gate"
TORCH_CLASSIFIER: Final = "torch, network alone"
_SECONDS_A_TURN: Final = 0.3


@dataclass(frozen=True)
class Subject:
    """A network to run, with the block that is read."""

    title: str
    network: nn.Module
    block: Block
    preprocessing: Preprocessing

    def images(self, batch_size: int) -> Tensor:
        """Noise, uint8."""
        side = self.preprocessing.crop
        generator = torch.Generator().manual_seed(0)
        return torch.randint(
            256, (batch_size, 3, side, side), generator=generator, dtype=torch.uint8
        )


@dataclass(frozen=True)
class Row:
    """One way to run a network."""

    way: str
    images_per_s: float
    spread: float
    against_peer: float


@dataclass(frozen=True)
class Result:
    """All ways to run one network.

    ``gate_flops`` is the gate's share of the operations, ``gate_time`` of the full answer's time.
    """

    network: str
    block: str
    batch_size: int
    rows: tuple[Row, ...]
    gate_flops: float
    gate_time: float
    full_against_peer: Spread
    full_against_classifier: Spread

    def goals(self) -> list[Goal]:
        """What the engine should reach on this network."""
        return [
            Goal(
                f"{self.network}: engine / ONNX Runtime",
                self.full_against_peer,
                "at least",
                OF_PEER,
            ),
            Goal(
                f"{self.network}: engine, full answer / classifier only",
                self.full_against_classifier,
                "at least",
                OF_CLASSIFIER,
            ),
        ]


def bundled() -> Subject:
    """The network that ships with NormGate."""
    loaded = Store(ROOT / "model_store").load("cifar10-resnet18")
    selected = loaded.bundle.norm_ratios.selected
    network = loaded.detector().network
    return Subject("cifar10-resnet18", network, selected, loaded.bundle.preprocessing)


def published(name: str) -> Subject:
    """One of torchvision's networks with random weights, read at its last block but one."""
    torch.manual_seed(0)
    architecture = Architecture(id=f"torchvision/{name}")
    network, preprocessing = build(architecture), default_preprocessing(architecture)
    side = preprocessing.crop
    return Subject(
        name, network, find_blocks(network, torch.zeros(1, 3, side, side))[-2], preprocessing
    )


def torch_ways(subject: Subject, images: Tensor, *, compiles: bool) -> dict[str, Run]:
    """The ways that torch offers."""
    network, block, preprocessing = subject.network, subject.block, subject.preprocessing
    inputs = preprocessing.normalise(images)
    engine = TorchEngine(network, block=block, preprocessing=preprocessing)
    fused = fuse(network)
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    both = copy.deepcopy(fused).to(memory_format=torch.channels_last)
    last_inputs = inputs.contiguous(memory_format=torch.channels_last)
    ways: dict[str, Run] = {
        EAGER: lambda: engine.run(images),
        TORCH_GATE: lambda: engine.run_to_block(images),
        TORCH_CLASSIFIER: lambda: network(inputs),
        "torch, network alone, convolutions fused": lambda: fused(inputs),
        "torch, network alone, channels last": lambda: last(last_inputs),
        "torch, network alone, fused and channels last": lambda: both(last_inputs),
    }
    if compiles:
        torch._inductor.config.freezing = True
        compiled = torch.compile(copy.deepcopy(network), dynamic=False)
        ways["torch, network alone, compiled and frozen"] = lambda: compiled(inputs)
    return ways


def onnx_ways(subject: Subject, images: Tensor, *, threads: int) -> dict[str, Run]:
    """Ours, and ONNX Runtime as its documentation has it."""
    weights = subject.network.state_dict()
    graphs = export_graphs(
        subject.network, block=subject.block, preprocessing=subject.preprocessing, head=None
    )
    engine = OnnxEngine(graphs, weights, threads=threads)
    inputs = subject.preprocessing.normalise(images)
    peer = _peer(_exported(subject.network, inputs[:2], name="inputs"), threads=threads)
    classifier = _peer(_exported(_Normalised(subject), images[:2], name="images"), threads=threads)
    return {
        PEER: lambda: peer.run(None, {"inputs": inputs.numpy()}),
        OURS: lambda: engine.run(images),
        GATE: lambda: engine.run_to_block(images),
        CLASSIFIER: lambda: classifier.run(None, {"images": images.numpy()}),
    }


def measure(
    ways: Mapping[str, Run], *, rounds: int, clock: Clock
) -> dict[str, NDArray[np.float64]]:
    """Seconds of one batch for each way, ``[rounds]``; in each round every way has its turn."""
    counts = {way: _warm(run) for way, run in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            started = clock()
            for _ in range(counts[way]):
                run()
            seconds[way].append((clock() - started) / counts[way])
    return {way: np.array(found) for way, found in seconds.items()}


def flop_share(subject: Subject) -> float:
    """Floating-point operations up to the block over those of the whole network."""
    side = subject.preprocessing.crop
    inputs = torch.zeros(1, 3, side, side)
    counts = []
    norms = BlockNorms(subject.network, [subject.block])
    for run in (norms.run_to_last_block, subject.network):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(inputs)
        counts.append(counter.get_total_flops())
    return float(counts[0] / counts[1])


def compare(
    subject: Subject, *, batch_size: int, threads: int, rounds: int, compiles: bool, clock: Clock
) -> Result:
    """All ways, measured."""
    images = subject.images(batch_size)
    with torch.no_grad():
        ways = torch_ways(subject, images, compiles=compiles)
        ways |= onnx_ways(subject, images, threads=threads)
        seconds = measure(ways, rounds=rounds, clock=clock)
    return Result(
        network=subject.title,
        block=subject.block.name,
        batch_size=batch_size,
        rows=tuple(
            Row(
                way,
                batch_size / float(np.median(found)),
                _spread(found),
                _ratio(seconds, PEER, way),
            )
            for way, found in seconds.items()
        ),
        gate_flops=flop_share(subject),
        gate_time=_ratio(seconds, GATE, OURS),
        full_against_peer=_ratios(seconds, PEER, OURS),
        full_against_classifier=_ratios(seconds, CLASSIFIER, OURS),
    )


def show(results: Sequence[Result]) -> None:
    """Print a table a network."""
    console = Console(width=110)
    for result in results:
        table = Table(
            title=f"{result.network}, read at {result.block}, {result.batch_size} a batch"
        )
        for heading in ("way", "images/s", "spread", "against the peer"):
            table.add_column(heading, justify="left" if heading == "way" else "right")
        for row in result.rows:
            table.add_row(
                row.way, f"{row.images_per_s:.1f}", f"{row.spread:.1%}", f"{row.against_peer:.3f}"
            )
        console.print(table)
        saved = 1 - result.gate_time
        console.print(
            "full answer against the classifier alone: "
            f"{result.full_against_classifier.format(3)}; the gate "
            f"saves {saved:.1%} of the time and {1 - result.gate_flops:.1%} "
            "of the operations\n"
        )


def main() -> None:
    """Measure, print, and write ``build/bench/engines.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile too; takes minutes")
    parser.add_argument(
        "--cpu-time", action="store_true", help="the process's own, where others use the machine"
    )
    parser.add_argument(
        "--networks", nargs="+", default=["bundled", "mobilenet_v3_large", "resnet50"]
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="three rounds of the bundled network")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.networks = 3, ["bundled"]
    keep_memory()
    torch.set_num_threads(options.threads)
    results = [
        compare(
            bundled() if name == "bundled" else published(name),
            batch_size=options.batch_size,
            threads=options.threads,
            rounds=options.rounds,
            compiles=options.compile,
            clock=time.process_time if options.cpu_time else time.perf_counter,
        )
        for name in options.networks
    ]
    show(results)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    goals = [goal.as_json() for result in results for goal in result.goals()]
    found = {"goals": goals, "networks": [asdict(result) for result in results]}
    options.json.write_text(json.dumps(found, indent=2) + "\n")


def _warm(run: Run) -> int:
    """How many runs take a turn's time, found after two."""
    run()
    run()
    started = time.perf_counter()
    run()
    return max(1, round(_SECONDS_A_TURN / (time.perf_counter() - started)))


def _spread(seconds: NDArray[np.float64]) -> float:
    low, middle, high = np.percentile(seconds, (25, 50, 75))
    return float((high - low) / middle / 2)


def _ratio(seconds: Mapping[str, NDArray[np.float64]], over: str, under: str) -> float:
    """How much longer ``over`` takes than ``under``, in the same round."""
    return _ratios(seconds, over, under).median


def _ratios(seconds: Mapping[str, NDArray[np.float64]], over: str, under: str) -> Spread:
    found = spread((seconds[over] / seconds[under]).tolist())
    assert found is not None, "there is a round at least"
    return found


def _peer(model: bytes, *, threads: int) -> Any:
    """A session as the documentation makes one, on so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class _Normalised(nn.Module):
    """Logits from uint8 images."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.network = subject.network
        self._preprocessing = subject.preprocessing
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """``[B, classes]``."""
        logits: Tensor = self.network(self._preprocessing.normalise(images))
        return logits


def _exported(network: nn.Module, example: Tensor, *, name: str) -> bytes:
    """The network as torch exports it, weights and all."""
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[name],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


if __name__ == "__main__":
    main()
