"""A store in a bucket, behind a real S3 API: whole versions only, copies, outages, a pointer."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import httpx
import pytest
import torch
from fsspec.registry import _registry

from app.cli import main
from app.errors import ActivationError, BundleError, StoreUnavailableError
from app.object_storage import KEPT_COPIES
from app.serving.metrics import Metrics
from app.serving.pool import ModelPool
from app.settings import Settings
from app.store import BUNDLE_FILE, WEIGHTS_FILE, Store
from tests.bucket import SECRET, Answer, Bucket
from tests.test_lifecycle import Load, until
from tests.test_server import ROOT, START_S, Server, serving, serving_together
from tests.versions import add_version, edit

Requests = list[tuple[str, str]]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    """An empty bucket, which this process and those it starts know of."""
    bucket = Bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NORMGATE_MODEL_CACHE", str(tmp_path / "cache"))
    # Clients are kept by their arguments, and the address is none of them.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket.files().mkdir(bucket.name)
    yield bucket
    bucket.on_request = lambda method, path: None
    bucket.stop()


@pytest.fixture
def folder(tiny_store: Store, tmp_path: Path) -> Store:
    """A folder with ``tiny/1`` and ``tiny/2``."""
    shutil.copytree(tiny_store.root, tmp_path / "folder")
    add_version(tmp_path / "folder" / "tiny", 2)
    return Store(tmp_path / "folder")


@pytest.fixture
def store(bucket: Bucket, folder: Store, tmp_path: Path) -> Store:
    """The bucket's store, with ``tiny/1``."""
    store = Store(bucket.url, cache=tmp_path / "cache")
    folder.push("tiny", 1, store)
    return store


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def spoil(bucket: Bucket, version: int) -> bytes:
    """Change a byte of a version's weights in the bucket; what it held before."""
    path = f"{bucket.url}/tiny/{version}/{WEIGHTS_FILE}"
    before = bytes(bucket.files().cat_file(path))
    bucket.files().pipe_file(path, before[:-1] + bytes([before[-1] ^ 1]))
    return before


def make_pool(bucket: Bucket, tmp_path: Path) -> ModelPool:
    """A pool over the bucket's store, not loaded yet."""
    settings = Settings.read(
        {"model_store": bucket.url, "model_cache": tmp_path / "cache", "max_batch_size": 1}
    )
    return ModelPool(settings, Metrics(), devices=["cpu"])


def run(*arguments: str) -> "subprocess.Popen[str]":
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def test_a_bundle_travels_byte_for_byte(
    bucket: Bucket, folder: Store, store: Store, tmp_path: Path
) -> None:
    """From a folder to a bucket to a folder every file stays the same, reports too."""
    (folder.root / "tiny" / "2" / "figures").mkdir()
    (folder.root / "tiny" / "2" / "figures" / "a.svg").write_bytes(b"<svg/>")
    back = Store(tmp_path / "back")

    assert folder.push("tiny", 2, store) == f"{bucket.url}/tiny/2"
    store.push("tiny", 2, back)

    assert store.index() == {"tiny": [1, 2]}
    assert files_below(back.root / "tiny" / "2") == files_below(folder.root / "tiny" / "2")


def test_what_is_written_is_what_is_read(bucket: Bucket, folder: Store, store: Store) -> None:
    """A bundle calibrated into a bucket is the one read from it, and the URL is told."""
    loaded = folder.load("tiny", 1)

    where = store.write(
        lambda digest: loaded.bundle.model_copy(update={"version": 2, "weights_sha256": digest}),
        name="tiny",
        weights=loaded.weights,
        calibration_scores=loaded.calibration_scores,
    )

    again = store.load("tiny", 2)
    assert where == f"{bucket.url}/tiny/2"
    assert all(torch.equal(again.weights[key], loaded.weights[key]) for key in loaded.weights)
    assert again.calibration_scores.tobytes() == loaded.calibration_scores.tobytes()
    assert store.next_version("tiny") == 3


def test_a_killed_upload_is_never_seen(
    bucket: Bucket, folder: Store, store: Store, tmp_path: Path
) -> None:
    """The description goes up last; without it there is no version, and its number is not reused.

    The same upload again completes it.
    """
    is_there, go_on = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> Answer | None:
        if method == "PUT" and path.endswith(f"2/{BUNDLE_FILE}"):
            is_there.set()
            go_on.wait(START_S)
            return "500 Internal Server Error", "InternalError"
        return None

    bucket.on_request = hold
    process = run("models", "--model-store", str(folder.root), "push", "tiny/2", bucket.url)
    assert is_there.wait(START_S)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    go_on.set()
    bucket.on_request = lambda method, path: None

    assert bucket.files().exists(f"{bucket.url}/tiny/2/{WEIGHTS_FILE}")
    assert store.versions("tiny") == [1]
    assert store.next_version("tiny") == 3
    with pytest.raises(BundleError, match="no version 2; it has: 1"):
        store.activate("tiny", 2)

    folder.push("tiny", 2, store)
    assert store.load("tiny", 2).bundle.version == 2


def test_versions_are_immutable(bucket: Bucket, folder: Store, store: Store) -> None:
    """A version is written once, even by two writers who both found it absent."""
    with pytest.raises(BundleError, match=r"could not be written .* the version exists"):
        folder.push("tiny", 1, store)
    theirs = b"of the other writer"

    def be_faster(method: str, path: str) -> Answer | None:
        if method == "PUT" and path.endswith(f"2/{BUNDLE_FILE}"):
            bucket.on_request = lambda method, path: None
            bucket.files().pipe_file(f"{bucket.url}/tiny/2/{BUNDLE_FILE}", theirs)
        return None

    bucket.on_request = be_faster
    with pytest.raises(BundleError, match=r"could not be written .* with another content"):
        folder.push("tiny", 2, store)

    assert bucket.files().cat_file(f"{bucket.url}/tiny/2/{BUNDLE_FILE}") == theirs


def test_a_store_without_conditions(bucket: Bucket, folder: Store, store: Store) -> None:
    """A store that knows no conditional write is written to after a look."""
    seen: Requests = []

    def refuse_once(method: str, path: str) -> Answer | None:
        if method == "PUT" and (method, path) not in seen:
            seen.append((method, path))
            return "501 Not Implemented", "NotImplemented"
        return None

    bucket.on_request = refuse_once
    folder.push("tiny", 2, store)

    assert len(seen) == 2
    assert store.versions("tiny") == [1, 2]


def test_weights_are_fetched_once(bucket: Bucket, store: Store, tmp_path: Path) -> None:
    """A second reader on the machine takes the verified copy; a damaged one is fetched again."""
    store.load("tiny")
    bucket.requests.clear()

    store.load("tiny")
    assert bucket.sent("GET", WEIGHTS_FILE) == 0

    copy = store.root / "tiny" / "1" / WEIGHTS_FILE
    right = copy.read_bytes()
    copy.write_bytes(right[:100])
    store.load("tiny")
    assert bucket.sent("GET", WEIGHTS_FILE) == 1
    assert copy.read_bytes() == right


def test_a_cache_that_cannot_be_written_serves(
    bucket: Bucket, store: Store, tmp_path: Path
) -> None:
    """Without a cache bundles are served all the same."""
    (tmp_path / "file").write_text("no folder")

    loaded = Store(bucket.url, cache=tmp_path / "file").load("tiny")

    assert loaded.bundle.version == 1


def test_old_copies_go(store: Store, folder: Store, tmp_path: Path) -> None:
    """The last few versions used stay, and the one that is pointed to."""
    store.activate("tiny", 1)
    store.pointer("tiny")
    versions = range(2, KEPT_COPIES + 4)
    for version in versions:
        if version > 2:
            add_version(folder.root / "tiny", version)
        folder.push("tiny", version, store)
        store.load("tiny", version)

    kept = sorted(int(path.name) for path in (store.root / "tiny").iterdir() if path.is_dir())
    assert kept == [1, *versions[-KEPT_COPIES:]]


def test_two_processes_fill_the_cache_together(bucket: Bucket, store: Store) -> None:
    """Both load the bundle, and one whole copy stays."""
    shutil.rmtree(store.root, ignore_errors=True)
    code = (
        "import sys; from pathlib import Path; from app.store import Store; print('ready'); "
        f"sys.stdout.flush(); cache = Path({str(store.root.parent)!r}); sys.stdin.readline(); "
        f"Store({bucket.url!r}, cache=cache).load('tiny').detector()"
    )
    both = threading.Barrier(2)

    def meet(method: str, path: str) -> Answer | None:
        if method == "GET" and path.endswith(WEIGHTS_FILE):
            both.wait(START_S)
        return None

    bucket.on_request = meet
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda process: process.communicate(b"\n", START_S), processes))

    assert [process.returncode for process in processes] == [0, 0]
    assert files_below(store.root).keys() == {f"tiny/1/{BUNDLE_FILE}", f"tiny/1/{WEIGHTS_FILE}"}
    assert Store(store.root).load("tiny").bundle.version == 1


def test_a_corrupted_object_is_refused(
    bucket: Bucket, folder: Store, store: Store, tmp_path: Path
) -> None:
    """Nobody is pointed to it; who is sent there all the same goes on with what served before.

    Once it is mended the pointer is followed.
    """
    pool = make_pool(bucket, tmp_path)
    pool.load()
    before = pool.resolve()
    folder.push("tiny", 2, store)
    right = spoil(bucket, 2)

    with pytest.raises(BundleError, match=r"2/weights\.safetensors has sha256"):
        store.activate("tiny", 2)
    with pytest.raises(ActivationError, match=r"sha256.*; version 1 answers as before"):
        pool.activate("tiny", 2)
    pointer = {"version": 2, "written": "2026-01-01T00:00:00Z"}
    bucket.files().pipe_file(f"{bucket.url}/tiny/active.json", json.dumps(pointer).encode())
    assert [one.state for one in pool.refresh()] == ["failed"]
    assert pool.refresh() == []
    assert pool.resolve() is before

    bucket.files().pipe_file(f"{bucket.url}/tiny/2/{WEIGHTS_FILE}", right)
    assert [one.state for one in pool.refresh()] == ["active"]
    assert pool.resolve().bundle.version == 2


def test_an_outage(bucket: Bucket, folder: Store, store: Store, tmp_path: Path) -> None:
    """Copies serve a start without the store; what has no copy is refused, and nothing changes."""
    folder.push("tiny", 2, store)
    store.activate("tiny", 1)
    first = make_pool(bucket, tmp_path)
    first.load()
    bucket.stop()

    pool = make_pool(bucket, tmp_path)
    pool.load()

    assert pool.resolve().bundle.version == 1  # what the pointer says, not the newest
    with pytest.raises(StoreUnavailableError, match="cannot be reached"):
        pool.refresh()
    with pytest.raises(StoreUnavailableError, match=bucket.url):
        pool.activate("tiny", 2)
    with pytest.raises(StoreUnavailableError, match=f"{bucket.url}: the store cannot be reached"):
        make_pool(bucket, tmp_path / "another").load()


def active(server: Server) -> int:
    """The version that answers."""
    answer = httpx.get(f"{server.url}/v1/models/tiny", timeout=START_S)
    return int(answer.json()["active_version"])


@pytest.mark.alone
@pytest.mark.slow
def test_a_fleet_follows_the_pointer(
    bucket: Bucket,
    folder: Store,
    store: Store,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Two servers on one bucket switch forward and back with one write each, without a refusal.

    An outage meanwhile is told of once and changes nothing; a server that starts in it serves.
    """
    store.activate("tiny", 1)
    folder.push("tiny", 2, store)
    flags = ["--model-store", bucket.url, "--model-cache", str(tmp_path / "cache")]
    flags += ["--watch-s", "0.2", "--max-batch-size", "4"]
    with serving_together(flags, flags) as servers:
        one, two = servers
        with Load(one, clients=1).running() as load, Load(two, clients=1).running() as other:
            assert [active(server) for server in servers] == [1, 1]
            assert main(["models", "activate", "tiny/2", "--model-store", bucket.url]) == 0
            until(lambda: [active(server) for server in servers] == [2, 2])
            assert main(["models", "--model-store", bucket.url, "rollback", "tiny"]) == 0
            until(lambda: [active(server) for server in servers] == [1, 1])
            bucket.stop()
            seen = ""

            def told() -> int:
                nonlocal seen
                seen += capfd.readouterr().err
                return seen.count("the store cannot be reached")

            until(lambda: told() >= 2)
        with serving(flags) as three:
            assert active(three) == 1
            bucket.start()
            store.activate("tiny", 2)
            until(lambda: [active(server) for server in (*servers, three)] == [2, 2, 2])
    told()

    assert set(load.outcomes) == set(other.outcomes) == {200}
    # One line of each server that looked meanwhile, and one of the start from copies.
    assert seen.count("what is loaded serves on") in (2, 3)
    assert seen.count("the store cannot be reached, the cache serves") == 1
    assert SECRET not in seen


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What reads ``s3://`` is an extra, and the message tells how to get it."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)

    with pytest.raises(BundleError) as caught:
        Store("s3://bucket/models", cache=tmp_path)

    assert str(caught.value) == (
        "NORMGATE_MODEL_STORE is s3://bucket/models: pip install 'normgate[s3]'"
    )


def test_a_folder_needs_no_fsspec(tiny_store: Store) -> None:
    """Without a URL none of the packages is imported."""
    code = (
        "import sys; from pathlib import Path; from app.store import Store; "
        f"Store(Path({str(tiny_store.root)!r})).load('tiny'); "
        "sys.exit(any(name in sys.modules for name in ('s3fs', 'fsspec.core', 'aiobotocore')))"
    )

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("url", "words"),
    [("nosuch://a/b", "Protocol not known: nosuch"), ("s3://", "it names no bucket")],
)
def test_bad_urls(url: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A URL that leads nowhere is told in one line that names it."""
    assert main(["models", "--model-store", url]) == 1

    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"normgate: error: NORMGATE_MODEL_STORE is {url}: {words}")


def test_refusals(bucket: Bucket, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rights that do not suffice, a bucket that is not there, no keys: each is told by its URL."""
    bucket.on_request = lambda method, path: ("403 Forbidden", "AccessDenied")
    with pytest.raises(BundleError, match=f"^{bucket.url}/tiny: the store refuses: Acc") as denied:
        store.load("tiny")
    assert not isinstance(denied.value, StoreUnavailableError)
    assert SECRET not in str(denied.value)

    bucket.on_request = lambda method, path: None
    absent = "s3://normgate-absent/models"
    with pytest.raises(BundleError, match=f"^{absent}: The specified bucket does not exist"):
        Store(absent).index()
    with pytest.raises(BundleError, match=f"^{absent}: The specified bucket does not exist"):
        Store(absent).next_version("tiny")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(BundleError, match=f"^{bucket.url}: no credentials for the store"):
        Store(bucket.url).index()


def test_other_urls(folder: Store, tmp_path: Path) -> None:
    """Whatever fsspec knows will do; a password in a URL is not told."""
    store = Store("memory://user:pass@models/here", cache=tmp_path / "cache")
    assert store.title == "memory://models/here"
    assert store.index() == {}

    folder.push("tiny", 1, store)
    folder.push("tiny", 2, store)
    store.activate("tiny", 1)

    assert store.read("tiny").version == 1
    assert store.load("tiny", 2).bundle.version == 2
    assert "pass" not in str(store.root)


def test_a_folder_that_begins_with_a_number_is_no_version(folder: Store, tmp_path: Path) -> None:
    """The next version counts whole numbers alone."""
    store = Store("memory://numbers", cache=tmp_path / "cache")
    folder.push("tiny", 1, store)
    fsspec.filesystem("memory").pipe_file("/numbers/tiny/7-old/notes.txt", b"")

    assert store.versions("tiny") == [1]
    assert store.next_version("tiny") == 2


def test_no_name_in_a_store_leads_out_of_the_cache(folder: Store, tmp_path: Path) -> None:
    """An object called ``..`` is written nowhere: the bundle is served without its copy."""
    store = Store("memory://ways/out", cache=tmp_path / "cache")
    folder.push("tiny", 1, store)
    files = fsspec.filesystem("memory")
    # Of its copy, four folders up is the cache's own.
    for file in ("!", "../../../../evil"):
        content = files.store[f"/ways/out/tiny/1/{BUNDLE_FILE}"]
        files.store[f"/ways/out/tiny/1/onnx/{file}"] = content

    assert store.load("tiny").bundle.version == 1
    with pytest.raises(BundleError, match="no name of a file in a bundle"):
        store.push("tiny", 1, Store(tmp_path / "pushed"))

    assert not list(tmp_path.rglob("evil"))


def test_another_bundle_in_the_place_of_a_copy(bucket: Bucket, store: Store, folder: Store) -> None:
    """A version deleted and uploaded anew is not mistaken for its copy."""
    store.load("tiny")
    bucket.files().rm(f"{bucket.url}/tiny/1", recursive=True)
    edit(folder.root / "tiny" / "1", lambda document: document.update(warnings=["another"]))

    folder.push("tiny", 1, store)

    assert store.load("tiny").bundle.warnings == ("another",)
