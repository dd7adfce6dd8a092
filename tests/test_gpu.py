"""What a GPU must not change."""

from pathlib import Path

import pytest
import torch

from app.core.cuda import PinnedCopies
from app.core.images import load
from app.store import Store
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


def test_convolutions_run_in_whole_fp32() -> None:
    """A detector on a GPU turns TF32 off: the bundle's dtype is float32."""
    Store(STORE).load("cifar10-resnet18").detector(device="cuda:0")

    assert not torch.backends.cudnn.allow_tf32
