"""Offline work on a Ray cluster: what one machine would have written, whoever dies meanwhile."""

import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import fsspec
import pytest
from pyarrow import parquet

from app.cli import main
from app.errors import NormGateError
from app.offline.calibrate import CalibrationOptions, calibrate
from app.offline.score import find_source, score_files
from app.store import BUNDLE_FILE, WEIGHTS_FILE, Store
from tests.bucket import Bucket
from tests.conftest import IMAGES as THRESHOLD_IMAGES
from tests.conftest import draw_images, silent
from tests.shards import as_tar_shards, names_in
from tests.test_lifecycle import until

if TYPE_CHECKING:
    from app.distributed.offline import RayCluster

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
pytestmark = [
    pytest.mark.slow,
    # Ray leaves the files and sockets of the processes that it starts to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # What Ray tells of its own settings, none of which is set here.
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

IMAGES: Final = 110
BATCH: Final = 4
WORKERS: Final = 2


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    """An empty bucket that this process and the cluster's know of."""
    bucket = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        bucket.files().mkdir(bucket.name)
        yield bucket
    bucket.stop()


@pytest.fixture(scope="module")
def cluster(bucket: Bucket) -> Iterator["RayCluster"]:
    """Ray on this machine alone, with two cores and a small store for objects."""
    from app.distributed.offline import ray_cluster

    # Its sockets' paths would be too long in pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(
                address="local",
                num_cpus=WORKERS,
                object_store_memory=100_000_000,
                include_dashboard=False,
                log_to_driver=False,
                _temp_dir=folder,
                _node_ip_address="127.0.0.1",
            )
        try:
            with ray_cluster(worker_cpus=1) as cluster:
                yield cluster
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings in class folders, and one text in a hundred that calls itself JPEG."""
    root = tmp_path_factory.mktemp("images")
    for label in ("a", "b"):
        draw_images(root / label, range(ord(label) * 1000, ord(label) * 1000 + IMAGES // 2))
    (root / "a" / "bad.jpg").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def options(tiny_options: CalibrationOptions, images: Path) -> CalibrationOptions:
    """A calibration of many small batches."""
    return replace(tiny_options, selection_images=images, batch_size=BATCH)


@contextmanager
def killed_worker(image: Path) -> Iterator[list[int]]:
    """Kill the worker that reads the image, in the middle of its stretch; its process id."""
    content, killed, is_over = image.read_bytes(), list[int](), threading.Event()
    image.unlink()
    os.mkfifo(image)

    def kill() -> None:
        while not killed and not is_over.wait(0.01):
            killed.extend(_kill_reader(image))
        # Whoever reads it next finds it whole.
        whole = image.with_suffix(".whole")
        whole.write_bytes(content)
        whole.replace(image)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        is_over.set()
        thread.join()
        image.unlink()
        image.write_bytes(content)


def _kill_reader(pipe: Path) -> list[int]:
    """Kill the process that waits for what is written to a pipe, if there is one."""
    try:
        # Refused while nobody reads.
        writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return []
    try:
        until(lambda: bool(_openers(pipe)))
        found = _openers(pipe)
        for process in found:
            os.kill(process, signal.SIGKILL)
        return found
    finally:
        os.close(writer)


def _openers(file: Path) -> list[int]:
    return [
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdecimal()
        and int(process.name) != os.getpid()
        and _has_open(process, file)
    ]


def _has_open(process: Path, file: Path) -> bool:
    with suppress(OSError):
        return any(os.readlink(link) == str(file) for link in (process / "fd").iterdir())
    return False


def written(root: Path) -> tuple[bytes, str]:
    """The weights file, and the description without its time of creation."""
    folder = root / "tiny" / "1"
    text = (folder / BUNDLE_FILE).read_text()
    return (folder / WEIGHTS_FILE).read_bytes(), re.sub(r'"created": "[^"]*"', "", text)


@contextmanager
def killed_if(is_killed: bool, image: Path) -> Iterator[list[int]]:
    """The worker that reads the image is killed, or none is."""
    if not is_killed:
        yield []
        return
    with killed_worker(image) as killed:
        yield killed


@pytest.fixture(scope="module")
def calibrated_here(
    options: CalibrationOptions, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, str]:
    """What one machine writes."""
    root = tmp_path_factory.mktemp("here")
    calibrate(options, Store(root), progress=silent)
    return written(root)


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_calibration(
    cluster: "RayCluster",
    options: CalibrationOptions,
    calibrated_here: tuple[bytes, str],
    tmp_path: Path,
    is_killed: bool,
) -> None:
    """The bundle is that of one machine to the byte, also when a worker is killed on the way."""
    folder = Path(options.selection_images)
    if not is_killed:
        cluster = replace(cluster, workers=1)
    seen: list[tuple[str, int]] = []

    def watch(title: str, *, done: int, total: int) -> None:
        seen.append((title, done))

    with killed_if(is_killed, folder / names_in(folder)[IMAGES // 2]) as killed:
        calibrate(options, Store(tmp_path / "there"), progress=watch, place=cluster)

    assert written(tmp_path / "there") == calibrated_here
    assert len(killed) == is_killed
    # Nothing was counted twice.
    assert seen == sorted(set(seen))
    assert seen[-1] == ("setting the threshold", THRESHOLD_IMAGES)


def test_scores(
    cluster: "RayCluster",
    tiny_store: Store,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table of a folder is that of one machine, byte for byte, though a worker is killed."""
    # A worker's folder is another.
    monkeypatch.chdir(images.parent)
    loaded, source = tiny_store.load("tiny"), find_source(images.name)
    here, there = tmp_path / "here.parquet", tmp_path / "there.parquet"
    score_files(loaded, source, here, progress=silent, batch_size=BATCH)

    with killed_worker(images / names_in(images)[IMAGES // 2]) as killed:
        summary = score_files(
            loaded, source, there, progress=silent, batch_size=BATCH, place=cluster
        )

    assert there.read_bytes() == here.read_bytes()
    assert len(killed) == 1
    assert (sum(summary.verdicts.values()), summary.unreadable) == (IMAGES, 1)


def test_shards_in_a_bucket(
    cluster: "RayCluster",
    bucket: Bucket,
    tiny_store: Store,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command reads them in the workers, and scores them as one machine does the folder."""
    shards = as_tar_shards(images, tmp_path / "shards")
    bucket.files().put(f"{shards}/", f"{bucket.name}/tar/", recursive=True)
    here, there = tmp_path / "here.parquet", tmp_path / "there.parquet"
    score_files(
        tiny_store.load("tiny"), find_source(str(images)), here, progress=silent, batch_size=BATCH
    )

    status = main(
        [
            *("score", f"s3://{bucket.name}/tar", "--out", str(there), "--ray"),
            *("--bundle", "tiny", "--model-store", str(tiny_store.root)),
            *("--batch-size", str(BATCH), "--worker-cpus", "1", "--workers", "1"),
        ]
    )

    assert status == 0, capsys.readouterr().err
    assert "without a verdict: 1" in capsys.readouterr().out
    tables = [parquet.read_table(table).to_pydict() for table in (here, there)]
    files = [table.pop("file") for table in tables]
    assert tables[0] == tables[1]
    assert [file.rpartition("/")[2] for file in files[0]] == [
        file.rpartition("/")[2] for file in files[1]
    ]


def test_what_killed_the_workers(cluster: "RayCluster") -> None:
    """The stretch that was begun again and again is named; what came to its end is not."""
    from app.distributed.attempts import Attempts

    attempts = Attempts("a job")
    for stretch, times in ((range(8), 1), (range(8, 16), 3), (range(16, 24), 2)):
        for _ in range(times):
            attempts.begin(stretch)
    attempts.begin(range(24, 32))
    attempts.end(range(24, 32))

    assert attempts.most() == (range(8, 16), 3)
    assert Attempts("another job").most() is None
    attempts.forget()
    assert attempts.most() is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.tar", "a.tar cannot be read as a tar file"),
        ("a.parquet", "a.parquet cannot be read as Parquet"),
        ("a.txt", "holds no image with a suffix of"),
    ],
)
def test_bad_sources(
    cluster: "RayCluster",
    options: CalibrationOptions,
    tmp_path: Path,
    name: str,
    message: str,
) -> None:
    """What the workers find wrong is told in the words of one machine."""
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / name).write_bytes(b"x" * 2000)

    with pytest.raises(NormGateError, match=message) as caught:
        calibrate(
            replace(options, selection_images=tmp_path / "no"),
            Store(tmp_path / "store"),
            progress=silent,
            place=cluster,
        )

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "more than 2 cores and 0 GPUs; a worker needs 1 and 1"),
        ({"device": "cuda:1"}, "device is cuda:1; with --ray it must be cpu or cuda"),
        ({"worker_cpus": 3}, "more than 2 cores and 0 GPUs; a worker needs 3 and 0"),
        ({"worker_cpus": 3, "workers": 1}, "a worker needs 3 and 0"),
    ],
)
def test_no_room(cluster: "RayCluster", options: dict[str, Any], message: str) -> None:
    """What the cluster does not have is said, and not waited for."""
    from app.distributed.offline import ray_cluster

    with pytest.raises(NormGateError, match=message), ray_cluster(**{"worker_cpus": 1} | options):
        pass
