"""The review queue: bounded whatever comes, found again after any end, never in a request's way."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.cli import main
from app.core.images import load
from app.errors import ReviewError, ReviewNotFoundError, SettingsError
from app.serving.budget import MemoryBudget
from app.serving.metrics import Metrics
from app.serving.review import Intake, ReviewQueue
from app.serving.review_folder import Label, Limits, ReviewFolder, ReviewImage, export_sample
from app.serving.worker import Detection
from app.settings import Settings
from app.store import Store
from tests.conftest import IMAGES
from tests.pictures import encoded, jpeg

ROOT = Path(__file__).resolve().parents[2]
START = datetime(2026, 1, 1, tzinfo=UTC)
MANY = Limits(images=1000, max_bytes=2**24, retention_s=1e9)
WITHIN_S = 60


class Clock:
    """A time of day that goes on when it is told to."""

    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        """What time it is."""
        return self.time

    def advance(self, seconds: float) -> None:
        """Go on."""
        self.time += timedelta(seconds=seconds)


def record(number: int, clock: Clock, *, size: int = 3, **changes: Any) -> ReviewImage:
    """The record of an image of ``size`` bytes that is scored now."""
    fields: dict[str, Any] = {
        "id": f"{number:032x}",
        "time": clock(),
        "model": "tiny",
        "version": 1,
        "score": 1.0,
        "threshold": 2.0,
        "p_value": 0.01,
        "verdict": "ood",
        "prediction": "cat",
        "is_sampled": False,
        "suffix": "jpg",
        "width": 1,
        "height": 1,
        "file_bytes": size,
    }
    return ReviewImage.model_validate(fields | changes)


def opened(folder: Path, limits: Limits = MANY, clock: Clock | None = None) -> ReviewFolder:
    """The folder, taken."""
    review = ReviewFolder(folder, limits, now=clock or Clock())
    review.open()
    return review


def bytes_on_disk(folder: Path) -> int:
    """Of every file, whatever it is called."""
    return sum(file.stat().st_size for file in folder.iterdir())


def ids(review: ReviewFolder) -> list[str]:
    """Newest first."""
    return [image.id for image in review.images()]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 250), st.booleans()),
        st.tuples(st.just("label"), st.integers(0, 40), st.sampled_from(["really_ood", None])),
        st.tuples(st.just("wait"), st.integers(0, 60), st.none()),
        st.tuples(st.just("remove"), st.integers(0, 40), st.none()),
        st.tuples(st.just("reopen"), st.none(), st.none()),
    ),
    max_size=40,
)


@hypothesis_settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_bounds(
    steps: list[tuple[str, Any, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is done, count, bytes and age stay within the limits, and a restart finds all."""
    folder, clock = tmp_path_factory.mktemp("review"), Clock()
    limits = Limits(images=4, max_bytes=4000, retention_s=100)
    review, number = opened(folder, limits, clock), 0
    for action, value, flag in steps:
        kept = ids(review)
        if action == "add":
            number += 1
            image = record(number, clock, size=value, is_sampled=flag)
            assert review.add(image, bytes(value)) == review.images()[0]
        elif action == "label" and value < len(kept):
            review.label(kept[value], flag)
        elif action == "wait":
            clock.advance(value)
        elif action == "remove" and value < len(kept):
            review.remove(kept[value])
        elif action == "reopen":
            review.expire()
            before = review.images()
            review.close()
            review = opened(folder, limits, clock)
            assert review.images() == before
        review.expire()
        images = review.images()
        assert bytes_on_disk(folder) == review.size_bytes <= limits.max_bytes
        for is_sampled in (False, True):
            assert sum(image.is_sampled == is_sampled for image in images) <= limits.images
        assert all((clock() - image.time).total_seconds() < 100 for image in images)
        assert all(len(review.read(image.id)) == image.file_bytes for image in images)
    review.close()


def test_the_newest_stay(tmp_path: Path) -> None:
    """Of five images, three of which may stay, the last three do."""
    clock = Clock()
    review = opened(tmp_path, Limits(images=3, max_bytes=2**20, retention_s=100), clock)
    for number in range(5):
        clock.advance(1)
        review.add(record(number, clock), b"abc")

    assert ids(review) == [f"{number:032x}" for number in (4, 3, 2)]


def test_times_are_told_apart(tmp_path: Path) -> None:
    """Images of one moment get times of their own, so that no page of a list loses one."""
    clock = Clock()
    review = opened(tmp_path, clock=clock)
    for number in range(3):
        review.add(record(number, clock), b"abc")

    assert len({image.time for image in review.images()}) == 3


def test_a_flood_leaves_the_sample(tmp_path: Path) -> None:
    """OOD images that fill the folder push out each other, not the smaller sample."""
    clock = Clock()
    review = opened(tmp_path, Limits(images=1000, max_bytes=20_000, retention_s=100), clock)
    for number in range(5):
        review.add(record(number, clock, is_sampled=True), b"abc")
    for number in range(5, 300):
        clock.advance(0.01)
        review.add(record(number, clock, size=1000), bytes(1000))

    assert sum(image.is_sampled for image in review.images()) == 5
    assert review.size_bytes <= 20_000


def test_smaller_limits_hold_from_the_start(tmp_path: Path) -> None:
    """A folder opened with lower limits lets the oldest go at once."""
    clock = Clock()
    review = opened(tmp_path, clock=clock)
    for number in range(9):
        clock.advance(1)
        review.add(record(number, clock), b"abc")
    review.close()

    assert len(opened(tmp_path, Limits(images=2, max_bytes=2**20, retention_s=100), clock)) == 2


def test_labels(tmp_path: Path) -> None:
    """A label outlives a restart; the same again keeps its time; None takes it away."""
    clock = Clock()
    review = opened(tmp_path, clock=clock)
    image = review.add(record(1, clock), b"abc")

    first = review.label(image.id, "was_fine")
    clock.advance(5)
    assert review.label(image.id, "was_fine") == first
    assert (first.label, first.labelled_at) == ("was_fine", START)
    review.close()
    assert opened(tmp_path, clock=clock).images() == [first]


def test_unknown_images(tmp_path: Path) -> None:
    """What is not kept can be neither read nor labelled nor removed."""
    review = opened(tmp_path)
    for ask in (review.read, review.remove, lambda one: review.label(one, "was_fine")):
        with pytest.raises(ReviewNotFoundError, match=r"no image 0+ is kept"):
            ask("0" * 32)


def test_a_file_that_somebody_removed(tmp_path: Path) -> None:
    """An image whose file is gone is not found; its record can still be removed."""
    clock = Clock()
    review = opened(tmp_path, clock=clock)
    image = review.add(record(1, clock), b"abc")
    (tmp_path / image.file).unlink()

    with pytest.raises(ReviewNotFoundError, match="is gone"):
        review.read(image.id)

    review.remove(image.id)
    assert ids(review) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / f"{1:032x}.json").write_bytes(b"{"),
        lambda folder: (folder / f"{1:032x}.json").write_bytes(b""),
        lambda folder: (folder / f"{1:032x}.jpg").write_bytes(b"a"),
        lambda folder: (folder / f"{1:032x}.jpg").unlink(),
        lambda folder: (folder / f"{1:032x}.json").rename(folder / f"{3:032x}.json"),
    ],
)
def test_what_is_not_whole_is_cleared(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    """A damaged image or record goes, with its other half and with partial files; others stay."""
    clock = Clock()
    review = opened(tmp_path, clock=clock)
    for number in (1, 2):
        review.add(record(number, clock), b"abc")
    review.close()
    spoil(tmp_path)
    (tmp_path / f"{4:032x}.jpg.partial").write_bytes(b"half")
    (tmp_path / "holiday.jpg").write_bytes(b"not ours")

    assert ids(opened(tmp_path, clock=clock)) == [f"{2:032x}"]
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {f"{2:032x}.jpg", f"{2:032x}.json", "review.lock", "holiday.jpg"}


def test_one_process_a_folder(tmp_path: Path) -> None:
    """A folder in use is refused, and free again once it is closed."""
    review = opened(tmp_path)
    with pytest.raises(OSError, match="another process"):
        opened(tmp_path)
    review.close()
    opened(tmp_path).close()


WRITER = """
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from app.serving.review_folder import Limits, ReviewFolder, ReviewImage
review = ReviewFolder(Path(sys.argv[1]), Limits(images=50, max_bytes=2**24, retention_s=1e9))
review.open()
image = ReviewImage.model_validate_json(sys.argv[2])
print("ready", flush=True)
for number in range(10**9):
    size = 1 + number * 7919 % 100_000
    changes = {"id": f"{number:032x}", "file_bytes": size, "time": datetime.now(UTC)}
    review.add(image.model_copy(update=changes), bytes([number % 256]) * size)
    review.label(f"{number:032x}", "was_fine")
"""


@pytest.mark.parametrize("writes", [1, 30, 80])
def test_kill_in_the_middle_of_writes(tmp_path: Path, writes: int) -> None:
    """After kill -9 every image found is whole, and nothing else is left but the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), record(0, Clock()).model_dump_json()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        while len(list(tmp_path.iterdir())) < writes:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait(WITHIN_S)

    review = opened(tmp_path)
    for image in review.images():
        content = review.read(image.id)
        assert content == bytes([int(image.id, 16) % 256]) * image.file_bytes
    assert len(list(tmp_path.iterdir())) == 2 * len(review) + 1
    assert review.size_bytes == bytes_on_disk(tmp_path)


def test_the_sample_is_not_held_up_by_others() -> None:
    """OOD images come to half of the room and 100 a second; the sample to all, at any pace."""
    now = [0.0]
    intake = Intake(clock=lambda: now[0])

    assert sum(intake.take(1, is_sampled=False) for _ in range(100)) == 32
    assert sum(intake.take(1, is_sampled=True) for _ in range(100)) == 32
    for _ in range(64):
        intake.release(1)
    assert sum(intake.take(1, is_sampled=False) for _ in range(32)) == 32
    for _ in range(32):
        intake.release(1)
    assert not intake.take(1, is_sampled=False)
    now[0] += 0.1
    assert sum(intake.take(1, is_sampled=False) for _ in range(32)) == 10


def test_waiting_bytes_are_bounded() -> None:
    """One image is always let in; beside it no more than 64 MiB wait."""
    intake = Intake()

    assert intake.take(2**27, is_sampled=False)
    assert not intake.take(1, is_sampled=True)
    intake.release(2**27)
    assert intake.take(2**25, is_sampled=True)
    assert intake.take(2**25, is_sampled=True)
    assert not intake.take(1, is_sampled=True)


def detection(*, verdict: Any = "ood", score: float = 1.0) -> Detection:
    """What a worker finds."""
    logits = np.asarray([0.0, 1.0, 0.5], dtype=np.float32)
    return Detection(1.0, score, 0.01, verdict, 2.0, logits)


class Queue:
    """An open queue over a folder, and its metrics."""

    def __init__(self, store: Store, folder: Path, **settings: Any) -> None:
        self.bundle = store.read("tiny")
        self.metrics = Metrics()
        self.draws = iter(np.random.default_rng(0).random(100_000).tolist())
        read = Settings.read({"review_folder": folder, "admin_token": "t", **settings})
        self.queue = ReviewQueue(
            read, self.metrics, MemoryBudget(2**30), draw=lambda: next(self.draws)
        )
        self.queue.open()

    def offer(self, data: bytes, found: Detection) -> None:
        """Offer an image and wait until it is written, or was not taken."""
        self.queue.offer(self.bundle, data, found)
        self.wait()

    def wait(self) -> None:
        """Return once nothing waits to be written."""
        self.queue._disk.submit(lambda: None).result(WITHIN_S)

    def images(self) -> list[ReviewImage]:
        """What is kept."""
        return self.queue._folder.images()

    def value(self, name: str, **labels: str) -> float:
        """One series of the metrics."""
        return self.metrics.registry.get_sample_value(f"normgate_review_{name}", labels) or 0.0


@pytest.fixture
def make_queue(tiny_store: Store, tmp_path: Path) -> Iterator[Callable[..., Queue]]:
    """Opens queues over ``tmp_path / "review"``, closed at the end."""
    queues: list[Queue] = []

    def make(**settings: Any) -> Queue:
        queues.append(Queue(tiny_store, tmp_path / "review", **settings))
        return queues[-1]

    yield make
    for one in queues:
        one.queue.close()


def test_only_ood_images_are_kept(make_queue: Callable[..., Queue]) -> None:
    """Of the three verdicts only ood is kept; the file is what was uploaded, byte for byte."""
    queue = make_queue()
    for seed, verdict in enumerate(("id", "uncertain", "ood")):
        queue.offer(jpeg(seed), detection(verdict=verdict))

    [image] = queue.images()
    assert queue.queue._folder.read(image.id) == jpeg(2)
    assert (image.verdict, image.score, image.threshold, image.p_value) == ("ood", 1.0, 2.0, 0.01)
    assert (image.width, image.height, image.suffix) == (32, 32, "jpg")
    assert image.prediction == queue.bundle.labels[1]
    assert queue.value("queue_images") == 1
    assert queue.value("queue_bytes") == queue.queue._folder.size_bytes > 0


def test_shares(make_queue: Callable[..., Queue]) -> None:
    """The sample is drawn from all images alike; of the other OOD ones a share is kept."""
    queue = make_queue(review_share=0.5, review_sample_share=0.2)
    for number in range(400):
        queue.offer(jpeg(1), detection(verdict="ood" if number % 2 else "id"))
        queue.queue._intake = Intake()  # no pace: these come as slowly as they are written

    kept = queue.images()
    sampled = [image for image in kept if image.is_sampled]
    for verdict in ("id", "ood"):
        # 200 draws with 0.2: 40, and five standard deviations are 28.
        assert sum(image.verdict == verdict for image in sampled) == pytest.approx(40, abs=28)
    others = [image for image in kept if not image.is_sampled]
    assert {image.verdict for image in others} == {"ood"}
    assert len(others) == pytest.approx(80, abs=35)


def test_large_images_are_counted_and_not_kept(make_queue: Callable[..., Queue]) -> None:
    """An image beyond a sixteenth of the folder is left out."""
    queue = make_queue(review_max_bytes=2**20)
    queue.offer(jpeg(1) + bytes(2**16), detection())

    assert queue.images() == []
    assert queue.value("dropped_total", reason="too_large") == 1


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_every_format(make_queue: Callable[..., Queue], name: str) -> None:
    """Every accepted format is kept under a name that calibrate reads."""
    queue = make_queue()
    queue.offer(encoded(1, name), detection())

    [image] = queue.images()
    assert image.suffix == {"JPEG": "jpg"}.get(name, name.lower())


def test_a_disk_that_fails_fails_nothing_else(
    make_queue: Callable[..., Queue], tmp_path: Path
) -> None:
    """Where nothing can be written, images are dropped and counted; later ones are kept again."""
    queue = make_queue()
    folder = tmp_path / "review"
    folder.rename(tmp_path / "gone")
    for seed in range(3):
        queue.offer(jpeg(seed), detection())
    assert queue.value("dropped_total", reason="failed") == 3

    (tmp_path / "gone").rename(folder)
    queue.offer(jpeg(4), detection())
    assert len(queue.images()) == 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A system on which a write ends after ``size`` bytes of a file, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(make_queue: Callable[..., Queue], tmp_path: Path) -> None:
    """A write that ends in the middle leaves nothing, is told once, and the next image is kept."""
    queue = make_queue()
    with capture_logs() as logs, largest_file(2000):
        for seed in range(5):
            queue.offer(encoded(seed, "BMP"), detection())  # 3 KiB
        queue.offer(jpeg(1), detection())

    assert [log["event"] for log in logs] == ["review queue cannot write; scoring goes on"]
    assert queue.value("dropped_total", reason="failed") == 5
    assert [image.suffix for image in queue.images()] == ["jpg"]
    assert len(list((tmp_path / "review").iterdir())) == 3


@pytest.mark.parametrize("what", ["a file", "below a file", "locked"])
def test_an_unusable_folder_stops_the_start(tiny_store: Store, tmp_path: Path, what: str) -> None:
    """The setting, the folder and the reason are told in one line."""
    (tmp_path / "file").write_bytes(b"")
    folder = {"a file": "file", "below a file": "file/review", "locked": "locked"}[what]
    other = opened(tmp_path / "locked")

    with pytest.raises(SettingsError, match=r"^NORMGATE_REVIEW_FOLDER is '[^\n]+': [^\n]+$"):
        Queue(tiny_store, tmp_path / folder)
    other.close()


def test_a_closed_queue_takes_nothing(tiny_store: Store, tmp_path: Path) -> None:
    """A request answered during the shutdown does not fail for want of a queue."""
    queue = Queue(tiny_store, tmp_path / "review")
    queue.queue.close()
    queue.queue.offer(queue.bundle, jpeg(1), detection())


def test_offers_from_many_threads(make_queue: Callable[..., Queue]) -> None:
    """Every offer is kept or counted as dropped."""
    queue = make_queue(review_sample_share=1)

    def offer() -> None:
        for seed in range(50):
            queue.queue.offer(queue.bundle, jpeg(seed), detection())

    threads = [threading.Thread(target=offer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)
    queue.wait()

    assert len(queue.images()) + queue.value("dropped_total", reason="busy") == 200


def sample(folder: Path, *labels: tuple[str, Label | None], model: str = "tiny") -> ReviewFolder:
    """A folder with one sampled image a verdict and label, and an OOD image that is not sampled."""
    clock = Clock()
    review = opened(folder, clock=clock)
    for number, (verdict, label) in enumerate(labels):
        clock.advance(1)
        data = jpeg(number)
        fields: dict[str, Any] = {
            "verdict": verdict,
            "is_sampled": True,
            "size": len(data),
            "model": model,
        }
        review.label(review.add(record(number, clock, **fields), data).id, label)
    data = jpeg(100)
    review.label(review.add(record(100, clock, size=len(data)), data).id, "was_fine")
    return review


def test_export(tmp_path: Path) -> None:
    """The sample without what is really OOD; an image kept for its verdict is no part of it."""
    sample(
        tmp_path / "review",
        *(("id", "was_fine"), ("id", None), ("ood", "was_fine"), ("ood", "really_ood")),
        ("id", "really_ood"),
    )

    export = export_sample(tmp_path / "review", tmp_path / "out")

    assert (export.images, export.unlabelled, export.really_ood) == (3, 1, 2)
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [f"{number:032x}.jpg" for number in range(3)]


@pytest.mark.parametrize(
    ("labels", "model", "words"),
    [
        ([], None, "no sampled image; NORMGATE_REVIEW_SAMPLE_SHARE"),
        ([("id", None)], "other", "no sampled image of model 'other'"),
        ([("id", None), ("ood", None), ("uncertain", None)], None, "2 of 3 sampled images"),
    ],
)
def test_exports_that_would_promise_nothing(
    tmp_path: Path, labels: list[tuple[str, Label | None]], model: str | None, words: str
) -> None:
    """Without a sample, or with odd images that nobody looked at, nothing is written."""
    sample(tmp_path / "review", *labels)

    with pytest.raises(ReviewError, match=words):
        export_sample(tmp_path / "review", tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_export_of_one_of_several_models(tmp_path: Path) -> None:
    """With two models' images the model has to be named."""
    sample(tmp_path / "review", ("id", None)).close()
    clock = Clock()
    review = opened(tmp_path / "review", clock=clock)
    review.add(record(7, clock, is_sampled=True, model="other", verdict="id"), b"abc")

    with pytest.raises(ReviewError, match="several models: other, tiny"):
        export_sample(tmp_path / "review", tmp_path / "out")
    assert export_sample(tmp_path / "review", tmp_path / "out", model="other").images == 1


def test_recalibration(tiny_store: Store, tiny_options: Any, tmp_path: Path) -> None:
    """The exported sample sets a threshold: it is the k-th score of exactly those images."""
    labels: list[tuple[str, Label | None]] = [("id", "was_fine")] * (IMAGES - 1)
    sample(tmp_path / "review", *labels, ("ood", "really_ood"))
    shutil.copytree(tiny_store.root, tmp_path / "store")

    exported = ["review", "export", "--folder", str(tmp_path / "review")]
    assert main([*exported, "--out", str(tmp_path / "out")]) == 0
    calibrated = main(
        [
            *("calibrate", "--architecture", "cifar/resnet18", "--arguments", '{"width": 4}'),
            *("--weights", "random", "--alpha", "0.2", "--name", "tiny", "--no-report"),
            *("--selection-images", str(drawings(tmp_path / "selection"))),
            *("--threshold-images", str(tmp_path / "out")),
            *("--model-store", str(tmp_path / "store")),
        ]
    )

    assert calibrated == 0
    bundle = Store(tmp_path / "store").read("tiny")
    assert (bundle.version, bundle.threshold.n) == (2, IMAGES - 1)
    loaded = Store(tmp_path / "store").load("tiny")
    uploads = [load(jpeg(number), bundle.preprocessing) for number in range(IMAGES - 1)]
    scores = np.sort(loaded.detector().detect(torch.stack(uploads)).scores)
    assert loaded.calibration_scores == pytest.approx(scores, rel=1e-4)
    # 23 images and alpha 0.2: k = floor(0.2 * 24) = 4.
    assert bundle.threshold.value == pytest.approx(scores[3], rel=1e-4)


def drawings(folder: Path) -> Path:
    """Images that no other test here uses."""
    folder.mkdir()
    for seed in range(1000, 1000 + IMAGES):
        (folder / f"{seed}.jpg").write_bytes(jpeg(seed))
    return folder


def test_export_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is unlabelled is told; a failure is one line."""
    sample(tmp_path / "review", ("id", None), ("id", "really_ood"))
    flags = ["review", "export", "--folder", str(tmp_path / "review"), "--out"]

    assert main([*flags, str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 images in" in printed
    assert "1 of them were judged id and have no label" in printed
    assert main([*flags, str(tmp_path / "out")]) == 1
    assert main([*flags[:-2], str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 1
    assert os.listdir(tmp_path / "out") == [f"{0:032x}.jpg"]
