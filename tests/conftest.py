"""Drawn image folders and a tiny calibrated bundle, made once for all tests."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from app.core.networks import Architecture
from app.offline.calibrate import RANDOM_WEIGHTS, CalibrationOptions, calibrate
from app.store import Store
from tests.pictures import jpeg

TESTS = Path(__file__).parent
SIDE_BY_SIDE = (
    *("api", "benchmarks", "core", "docs", "offline", "serving"),
    *("test_cli.py", "test_client.py", "test_gpu.py", "test_imports.py", "test_logs.py"),
    *("test_object_storage.py", "test_settings.py", "test_store.py"),
)
"""Whose tests compute, mostly in their own process, and bear with others that do."""
IMAGES = 24
TINY = Architecture(id="cifar/resnet18", arguments={"width": 4})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs servers and programs is ``alone``: they would be late where others compute."""
    for item in items:
        is_beside = item.path.relative_to(TESTS).parts[0] in SIDE_BY_SIDE
        if not is_beside or item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.alone)


def draw_images(folder: Path, seeds: Iterable[int]) -> Path:
    """The folder, with one drawn JPEG of 32 x 32 pixels a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / f"{seed:04}.jpg").write_bytes(jpeg(seed))
    return folder


def silent(title: str, *, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="session")
def tiny_options(tmp_path_factory: pytest.TempPathFactory) -> CalibrationOptions:
    """A calibration of a small random network on two folders of ``IMAGES`` drawings."""
    root = tmp_path_factory.mktemp("drawn")
    return CalibrationOptions(
        name="tiny",
        architecture=TINY,
        selection_images=draw_images(root / "selection", range(IMAGES)),
        threshold_images=draw_images(root / "threshold", range(IMAGES, 2 * IMAGES)),
        weights=RANDOM_WEIGHTS,
        alpha=0.2,
    )


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, tiny_options: CalibrationOptions) -> Store:
    """A store that holds ``tiny/1``; tests read it and change copies."""
    store = Store(tmp_path_factory.mktemp("store"))
    calibrate(tiny_options, store, progress=silent)
    return store


@pytest.fixture(scope="session")
def half_store(tmp_path_factory: pytest.TempPathFactory, tiny_options: CalibrationOptions) -> Store:
    """A store that holds ``tiny/1`` calibrated in bfloat16."""
    store = Store(tmp_path_factory.mktemp("half"))
    calibrate(replace(tiny_options, dtype="bfloat16"), store, progress=silent)
    return store
