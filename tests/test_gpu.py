"""What a GPU must not change."""

from pathlib import Path

import pytest
import torch

from app.core.images import load
from app.store import Store
from tests.pictures import jpeg

STORE = Path(__file__).resolve().parents[1] / "model_store"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_a_gpu() -> None:
    """The bundled model scores on a GPU as on the CPU, within the golden score's tolerance."""
    loaded = Store(STORE).load("cifar10-resnet18")
    images = torch.stack([load(jpeg(seed), loaded.bundle.preprocessing) for seed in range(64)])

    on_gpu = loaded.detector(device="cuda:0").detect(images)
    on_cpu = loaded.detector().detect(images)

    assert on_gpu.scores == pytest.approx(on_cpu.scores, rel=1e-3)
