"""What a GPU must not change."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from app.core.blocks import Block
from app.core.cuda import PinnedCopies, streams_of
from app.core.cuda_graphs import CudaRecorder
from app.core.detector import BATCH_TOLERANCE
from app.core.engines import TorchEngine
from app.core.images import load
from app.core.networks import CIFAR_PREPROCESSING
from app.core.recorded_engine import RecordedEngine
from app.errors import UnfitEngineError
from app.store import GOLDEN_TOLERANCE, Store
from tests.core.test_engines import Undecided
from tests.pictures import jpeg

STORE = Path(__file__).resolve().parents[1] / "model_store"


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_scores_on_a_gpu() -> None:
    """The bundled model scores on a GPU as on the CPU, within the golden score's tolerance."""
    loaded = Store(STORE).load("cifar10-resnet18")
    images = torch.stack([load(jpeg(seed), loaded.bundle.preprocessing) for seed in range(64)])

    on_gpu = loaded.detector(device="cuda:0").detect(images)
    on_cpu = loaded.detector().detect(images)

    assert on_gpu.scores == pytest.approx(on_cpu.scores, rel=1e-3)


def test_copies_arrive_whole() -> None:
    """Batches of any size, one after the other without a pause, arrive as they were sent."""
    copies = PinnedCopies(torch.device("cuda:0"))
    batches = [torch.randint(256, (size, 3, 64, 64), dtype=torch.uint8) for size in (1, 32, 7) * 9]

    arrived = [copies.to_device(batch) for batch in batches]

    for sent, received in zip(batches, arrived, strict=True):
        assert received.is_cuda
        assert torch.equal(received.cpu(), sent)


def test_scores_in_bfloat16_on_a_gpu(half_store: Store) -> None:
    """A bundle in bfloat16 that was made on the CPU scores alike on a GPU, channels last."""
    loaded = half_store.load("tiny")
    images = torch.stack([load(jpeg(seed), loaded.bundle.preprocessing) for seed in range(64)])

    detector = loaded.detector(device="cuda:0")

    weight = detector.network.get_parameter("layer1.0.conv1.weight")
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert detector.detect(images).scores == pytest.approx(
        loaded.detector().detect(images).scores, rel=GOLDEN_TOLERANCE["bfloat16"]
    )


@pytest.mark.parametrize("name", ["tiny_store", "half_store"])
def test_graphs_score_alike(request: pytest.FixtureRequest, name: str) -> None:
    """Batches of every size, whole and gate, one after the other, score as without graphs."""
    loaded = request.getfixturevalue(name).load("tiny")
    images = torch.stack([load(jpeg(seed), loaded.bundle.preprocessing) for seed in range(13)])
    detector = loaded.detector(device="cuda:0")
    recorded = loaded.on_cuda_graphs(detector, device="cuda:0", batch_size=12)
    tolerance = BATCH_TOLERANCE[loaded.bundle.dtype]

    assert recorded.engine == "cuda_graphs"
    for size in [*range(1, 14), 3, 12, 1]:
        expected = detector.detect(images[:size])
        found = recorded.detect(images[:size])
        assert found.scores == pytest.approx(expected.scores, rel=tolerance)
        assert found.logits.shape == expected.logits.shape
        assert recorded.judge(images[:size]).scores == pytest.approx(found.scores, rel=tolerance)


def test_graphs_are_replayed_by_another_thread(tiny_store: Store) -> None:
    """What the loading thread recorded workers replay, while a second version is recorded."""
    loaded = tiny_store.load("tiny")
    images = torch.stack([load(jpeg(seed), loaded.bundle.preprocessing) for seed in range(8)])
    detector = loaded.detector(device="cuda:0")
    recorded = loaded.on_cuda_graphs(detector, device="cuda:0", batch_size=8)
    expected = detector.detect(images).scores

    with ThreadPoolExecutor() as threads:
        senders = [
            threads.submit(lambda: [recorded.detect(images).scores for _ in range(200)])
            for _ in range(recorded.passes)
        ]
        loaded.on_cuda_graphs(loaded.detector(device="cuda:0"), device="cuda:0", batch_size=8)

        for answers in senders:
            for scores in answers.result(timeout=60):
                assert scores == pytest.approx(expected, rel=BATCH_TOLERANCE["float32"])


def test_versions_share_the_streams_of_a_gpu() -> None:
    """However many are loaded, none is recorded on a stream that another uses for copies."""
    device = torch.device("cuda:0")
    recorders = [CudaRecorder(device, size=1, side=32) for _ in range(40)]

    assert {recorder._stream.cuda_stream for recorder in recorders} == {
        streams_of(device).computing.cuda_stream
    }
    assert streams_of(device).computing != streams_of(device).copying


def test_batches_under_way_at_once(tiny_store: Store) -> None:
    """Each of two threads has its own results, of batches of every size in turn."""
    loaded = tiny_store.load("tiny")
    images = torch.stack([load(jpeg(seed), loaded.bundle.preprocessing) for seed in range(16)])
    detector = loaded.detector(device="cuda:0")
    recorded = loaded.on_cuda_graphs(detector, device="cuda:0", batch_size=8)
    halves = images[:8], images[8:]
    expected = [detector.detect(half).scores for half in halves]

    def answers(number: int) -> list[tuple[int, NDArray[np.float32]]]:
        sizes = [1 + (turn + number) % 8 for turn in range(400)]
        return [(size, recorded.detect(halves[number][:size]).scores) for size in sizes]

    with ThreadPoolExecutor() as threads:
        for truth, found in zip(expected, threads.map(answers, range(2), timeout=60), strict=True):
            for size, scores in found:
                assert scores == pytest.approx(truth[:size], rel=BATCH_TOLERANCE["float32"])


def test_a_network_that_cannot_be_recorded() -> None:
    """It is refused before anything is captured, and the next network can be recorded."""
    device, block = torch.device("cuda:0"), Block("maps", "maps")
    engine = TorchEngine(
        Undecided().eval().to(device), block=block, preprocessing=CIFAR_PREPROCESSING
    )

    with pytest.raises(UnfitEngineError, match="depends on its images' values"):
        RecordedEngine(engine, CudaRecorder(device, size=4, side=32))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_each_gpu_has_its_own(tiny_store: Store) -> None:
    """Two devices hold a network and graphs each, and score alike."""
    loaded = tiny_store.load("tiny")
    images = torch.stack([load(jpeg(seed), loaded.bundle.preprocessing) for seed in range(4)])

    first, second = (
        loaded.on_cuda_graphs(loaded.detector(device=device), device=device, batch_size=4)
        for device in ("cuda:0", "cuda:1")
    )

    assert first.detect(images).scores == pytest.approx(
        second.detect(images).scores, rel=BATCH_TOLERANCE["float32"]
    )


def test_convolutions_run_in_whole_fp32() -> None:
    """A network on a GPU turns TF32 off: the bundle's dtype is float32."""
    Store(STORE).load("cifar10-resnet18").detector(device="cuda:0")

    assert not torch.backends.cudnn.allow_tf32
