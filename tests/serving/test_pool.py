"""The pool: a change takes effect whole or not at all, and what was let go goes."""

import gc
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import ActivationError, BundleError, BundleNotFoundError
from app.serving.metrics import Metrics
from app.serving.pool import ModelPool, VersionState
from app.settings import Settings
from app.store import BUNDLE_FILE, Store
from tests.versions import DAMAGES, add_version


@pytest.fixture
def model(tiny_store: Store, tmp_path: Path) -> Path:
    """The folder of ``tiny``, with version 1, in a store of its own."""
    shutil.copytree(tiny_store.root, tmp_path / "store")
    return tmp_path / "store" / "tiny"


def make_pool(model: Path, **settings: Any) -> ModelPool:
    """A pool over the store that ``model`` lies in, not loaded yet."""
    read = Settings.read({"model_store": model.parent, "max_batch_size": 2, **settings})
    return ModelPool(read, Metrics(), devices=["cpu"])


def loaded_pool(model: Path, **settings: Any) -> ModelPool:
    """The same, loaded."""
    pool = make_pool(model, **settings)
    pool.load()
    return pool


def states(pool: ModelPool) -> dict[int, str]:
    """What each version of the only model does."""
    return {one.version: one.state for one in pool.index()}


def test_the_newest_version_answers(model: Path) -> None:
    """Of two versions the newer is loaded and active; the older is only stored."""
    add_version(model, 2)

    pool = loaded_pool(model)

    assert pool.resolve().bundle.version == 2
    assert pool.resolve("tiny", 2) is pool.resolve()
    assert states(pool) == {1: "stored", 2: "active"}
    with pytest.raises(BundleNotFoundError, match="no version 1 loaded; it has: 2"):
        pool.resolve("tiny", 1)


def test_several_versions_at_once(model: Path) -> None:
    """With ``kept_versions`` the newest ones are loaded, and each answers when it is named."""
    add_version(model, 2)
    add_version(model, 3)

    pool = loaded_pool(model, kept_versions=2)

    assert pool.loaded_versions("tiny") == [2, 3]
    assert pool.resolve("tiny", 2).bundle.version == 2
    assert states(pool) == {1: "stored", 2: "loaded", 3: "active"}


def test_an_older_version_that_is_damaged_stops_no_start(model: Path) -> None:
    """Only the version that is to answer must load; the damaged one says why it did not."""
    add_version(model, 2)
    DAMAGES["corrupt weights"][0](model / "1")

    pool = loaded_pool(model, kept_versions=2)

    assert states(pool) == {1: "failed", 2: "active"}
    assert "sha256" in pool.state("tiny", 1).reason


def test_a_newest_version_that_is_damaged_stops_the_start(model: Path) -> None:
    """A start that would answer with something else than the newest calibration fails."""
    add_version(model, 2)
    DAMAGES["corrupt weights"][0](model / "2")

    with pytest.raises(BundleError, match="sha256"):
        make_pool(model).load()


def test_activation_and_the_way_back(model: Path) -> None:
    """Any stored version can be made the one that answers, the older one too."""
    pool = loaded_pool(model)
    add_version(model, 2)

    pool.activate("tiny", 2)
    assert states(pool) == {1: "stored", 2: "active"}

    pool.activate("tiny", 1)
    assert states(pool) == {1: "active", 2: "stored"}

    pool.activate("tiny")
    assert pool.resolve("tiny").bundle.version == 2


def test_what_was_let_go_goes(model: Path) -> None:
    """The old version lives as long as somebody holds it, and no longer."""
    pool = loaded_pool(model)
    held = pool.resolve()
    gone = threading.Event()
    weakref.finalize(held, gone.set)
    add_version(model, 2)

    pool.activate("tiny", 2)
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert held.detectors["cpu"].detect(images).scores.shape == (1,)
    assert not gone.is_set()

    del held
    gc.collect()
    assert gone.is_set()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_failed_activation_changes_nothing(model: Path, damage: str) -> None:
    """Whatever is wrong with a version, the old one goes on answering, and the reason is told."""
    pool = loaded_pool(model)
    before = pool.resolve()
    spoil, word = DAMAGES[damage]
    spoil(add_version(model, 2))

    with pytest.raises(ActivationError, match=rf"{word}.*; version 1 answers as before") as caught:
        pool.activate("tiny", 2)

    assert "\n" not in str(caught.value)
    assert pool.resolve() is before
    assert states(pool) == {1: "active", 2: "failed"}
    assert word in pool.state("tiny", 2).reason


def test_a_version_that_is_not_there(model: Path) -> None:
    """Activating what the store does not have is told as such."""
    pool = loaded_pool(model)

    with pytest.raises(BundleNotFoundError, match="no version 7; it has: 1"):
        pool.activate("tiny", 7)
    with pytest.raises(BundleNotFoundError, match="no model 'other'"):
        pool.activate("other", 1)


def test_refresh_activates_what_is_new(model: Path) -> None:
    """Each new version is found once."""
    pool = loaded_pool(model)
    assert pool.refresh() == []

    add_version(model, 2)

    assert pool.refresh() == [VersionState("tiny", 2, "active")]
    assert pool.refresh() == []


def test_refresh_leaves_a_step_back_alone(model: Path) -> None:
    """Who activates an older version is not overruled by the next search."""
    add_version(model, 2)
    pool = loaded_pool(model)

    pool.activate("tiny", 1)

    assert pool.refresh() == []
    assert pool.resolve("tiny").bundle.version == 1


def test_refresh_finds_new_models(model: Path) -> None:
    """A model that appears in the store is loaded, whatever is done with new versions."""
    pool = loaded_pool(model, on_new_version="shadow")
    shutil.copytree(model, model.parent / "second")
    file = model.parent / "second" / "1" / BUNDLE_FILE
    file.write_text(file.read_text().replace('"tiny"', '"second"'))

    assert pool.refresh() == [VersionState("second", 1, "active")]
    assert pool.resolve().bundle.name == "tiny"


@pytest.mark.parametrize(
    ("setting", "state"), [("activate", "active"), ("shadow", "shadow"), ("report", "stored")]
)
def test_what_is_done_with_new_versions(model: Path, setting: str, state: str) -> None:
    """The setting decides whether a new version answers, looks on, or is only told of."""
    pool = loaded_pool(model, on_new_version=setting)
    add_version(model, 2)

    assert pool.refresh() == [VersionState("tiny", 2, state)]  # type: ignore[arg-type]
    assert pool.resolve("tiny").bundle.version == (2 if state == "active" else 1)


def test_a_new_version_that_fails_is_tried_again_once_mended(model: Path) -> None:
    """A damaged version is told of once, and found again when its files have changed."""
    pool = loaded_pool(model)
    folder = add_version(model, 2)
    content = (folder / BUNDLE_FILE).read_bytes()
    DAMAGES["wrong hash"][0](folder)

    [failed] = pool.refresh()
    assert (failed.state, failed.version) == ("failed", 2)
    assert "sha256" in failed.reason
    assert pool.refresh() == []

    (folder / BUNDLE_FILE).write_bytes(content)
    assert pool.refresh() == [VersionState("tiny", 2, "active")]


def test_a_shadow_looks_on_until_it_is_activated(model: Path) -> None:
    """A shadow cannot be named by a request; activated, it answers and is no shadow any more."""
    pool = loaded_pool(model)
    add_version(model, 2)

    pool.start_shadow("tiny", 2, share=0.5)

    shadow = pool.shadow("tiny")
    assert shadow is not None
    assert (shadow.model.bundle.version, shadow.share) == (2, 0.5)
    assert states(pool) == {1: "active", 2: "shadow"}
    with pytest.raises(BundleNotFoundError):
        pool.resolve("tiny", 2)

    assert pool.activate("tiny", 2) is shadow.model
    assert pool.shadow("tiny") is None


def test_the_active_version_is_no_shadow_of_its_own(model: Path) -> None:
    """A shadow that would only repeat the answers is refused."""
    with pytest.raises(ActivationError, match="cannot be its own shadow"):
        loaded_pool(model).start_shadow("tiny", 1, share=0.5)


def test_ending_a_shadow(model: Path) -> None:
    """A shadow can be ended, and ending none does no harm."""
    pool = loaded_pool(model)
    add_version(model, 2)
    pool.start_shadow("tiny", 2, share=1)

    pool.stop_shadow("tiny")
    pool.stop_shadow("tiny")

    assert states(pool) == {1: "active", 2: "stored"}


def test_unloading(model: Path) -> None:
    """An unloaded model is unknown to requests until it is activated again."""
    pool = loaded_pool(model)

    pool.unload("tiny")

    with pytest.raises(BundleNotFoundError, match="is loaded; there are: none"):
        pool.resolve("tiny")
    pool.activate("tiny")
    assert pool.resolve().bundle.version == 1


def test_the_metrics_know_what_is_loaded(model: Path) -> None:
    """One series for each loaded version, with its role; none for those that were let go."""
    metrics = Metrics()
    pool = ModelPool(Settings(model_store=model.parent), metrics, devices=["cpu"])
    pool.load()
    add_version(model, 2)
    pool.activate("tiny", 2)

    def roles() -> dict[tuple[str, str], float]:
        return {
            (sample.labels["version"], sample.labels["role"]): sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name == "normgate_model_role"
        }

    assert roles() == {("2", "active"): 1}
    read = metrics.registry.get_sample_value
    info = {"model": "tiny", "architecture": "cifar/resnet18", "block": pool.resolve().bundle.block}
    assert read("normgate_model_info", info | {"version": "2"}) == 1
    assert read("normgate_model_info", info | {"version": "1"}) is None


def test_the_pointer_decides_at_the_start(model: Path) -> None:
    """What the pointer names answers, not the newest version."""
    add_version(model, 2)
    Store(model.parent).activate("tiny", 1)

    assert states(loaded_pool(model)) == {1: "active", 2: "stored"}


def test_the_pointer_is_followed_both_ways(model: Path) -> None:
    """A refresh activates what the pointer names, and a rollback returns; a new version waits."""
    store = Store(model.parent)
    store.activate("tiny", 1)
    pool = loaded_pool(model)
    add_version(model, 2)
    assert pool.refresh() == [VersionState("tiny", 2, "stored")]

    store.activate("tiny", 2)
    assert pool.refresh() == [VersionState("tiny", 2, "active")]
    store.roll_back("tiny")
    assert pool.refresh() == [VersionState("tiny", 1, "active")]
    assert pool.refresh() == []


def test_what_is_activated_here_holds_until_the_pointer_moves(model: Path) -> None:
    """An operator's step on one process is not undone by the next search."""
    add_version(model, 2)
    store = Store(model.parent)
    store.activate("tiny", 1)
    pool = loaded_pool(model)

    pool.activate("tiny", 2)
    assert pool.refresh() == []
    assert pool.resolve().bundle.version == 2

    store.activate("tiny", 1)  # the same version, written anew
    assert pool.refresh() == [VersionState("tiny", 1, "active")]


def test_a_pointer_that_leads_nowhere(model: Path) -> None:
    """It changes nothing and is told of once; it is followed when there is what it names."""
    pool = loaded_pool(model)
    (model / "active.json").write_text('{"version": 2, "written": "2026-01-01T00:00:00Z"}')

    [failed] = pool.refresh()
    assert (failed.state, failed.version) == ("failed", 2)
    assert "no version 2; it has: 1" in failed.reason
    assert pool.refresh() == []
    assert pool.resolve().bundle.version == 1

    add_version(model, 2)
    assert pool.refresh() == [VersionState("tiny", 2, "active")]


def test_a_damaged_pointer(model: Path) -> None:
    """While serving it is not followed; a start that cannot know what to serve fails."""
    store = Store(model.parent)
    add_version(model, 2)
    store.activate("tiny", 1)
    pool = loaded_pool(model)

    (model / "active.json").write_text("{")
    assert pool.refresh() == []
    assert pool.resolve().bundle.version == 1
    with pytest.raises(BundleError, match=r"tiny/active\.json: the document"):
        make_pool(model).load()

    store.activate("tiny", 2)
    assert pool.refresh() == [VersionState("tiny", 2, "active")]


def test_a_lone_pass_takes_as_long_as_the_shortest(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What holds up one of the timed passes says nothing of those to come."""
    seconds = iter([0.03, 0.02, 0.001, 0.02, 0.03])
    monkeypatch.setattr("app.serving.pool._seconds", lambda detector, images: next(seconds))

    assert loaded_pool(model).resolve("tiny").lone_pass_s == 0.001
