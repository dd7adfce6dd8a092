"""The example pictures of the README."""

import subprocess
import sys
from pathlib import Path

import pytest

from app.core.detector import Detector
from app.core.images import load
from app.store import LoadedBundle, Store

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def loaded() -> LoadedBundle:
    """The bundled model."""
    return Store(ROOT / "model_store").load("cifar10-resnet18")


@pytest.fixture(scope="module")
def detector(loaded: LoadedBundle) -> Detector:
    """The bundled model's detector."""
    return loaded.detector()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as this installation draws them."""
    folder = tmp_path_factory.mktemp("drawn")
    subprocess.run([sys.executable, EXAMPLES / "draw.py", folder], check=True)
    return folder


@pytest.mark.parametrize(
    ("name", "is_ood", "label"),
    [
        ("ship", False, "ship"),
        ("truck", False, "truck"),
        ("automobile", False, "automobile"),
        ("noise", True, None),
        ("text", True, None),
        ("gradient", True, None),
    ],
)
@pytest.mark.parametrize("is_fresh", [False, True])
def test_verdicts(
    loaded: LoadedBundle,
    detector: Detector,
    drawn: Path,
    name: str,
    is_ood: bool,
    label: str | None,
    is_fresh: bool,
) -> None:
    """A committed or freshly drawn picture gets the verdict and label that the README shows."""
    file = (drawn if is_fresh else EXAMPLES) / f"{name}.jpg"

    found = detector.detect(load(file.read_bytes(), loaded.bundle.preprocessing)[None])

    assert bool(found.is_ood[0]) is is_ood
    if label is not None:
        assert loaded.bundle.labels[int(found.logits[0].argmax())] == label
