"""Where images lie, in files, shards and tables, here or at a URL: the same names and bytes."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pytest
from fsspec.registry import _registry
from pyarrow import parquet

from app.errors import CalibrationError, NormGateError
from app.offline.calibrate import CalibrationOptions, calibrate
from app.offline.reading import Digests
from app.offline.score import find_source, score_files
from app.offline.sources import ImageSource, Names, find_images
from app.store import Store
from tests.bucket import Bucket
from tests.conftest import draw_images, silent
from tests.pictures import jpeg
from tests.shards import as_parquet_files, as_tar_shards, names_in, write_tar

Pack = Callable[[Path, Path], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven drawings in two folders, and a text that calls itself JPEG."""
    root = tmp_path / "images"
    draw_images(root / "b", range(6))
    draw_images(root / "a", range(6, 11))
    (root / "b" / "0002x.jpg").write_text("not an image")
    return root


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket that this process knows of."""
    bucket = Bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    # Clients are kept by their arguments, and the address is none of them.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket.files().mkdir(bucket.name)
    yield bucket
    bucket.stop()


def contents(source: ImageSource) -> list[bytes]:
    """Every image's bytes."""
    read = source.reader()
    return [read(position) for position in range(len(source))]


def named(source: ImageSource) -> list[str]:
    """Every image's name."""
    return [source.name(position) for position in range(len(source))]


@pytest.mark.parametrize("pack", [as_tar_shards, as_parquet_files])
def test_shards_hold_what_the_folder_holds(folder: Path, tmp_path: Path, pack: Pack) -> None:
    """The same bytes in the same order, and names in which the shard is a folder."""
    shards = pack(folder, tmp_path / "shards")

    plain, packed = find_images(folder), find_images(shards)

    assert named(plain) == names_in(folder)
    assert [name.split("/", 1)[1] for name in named(packed)] == names_in(folder)
    assert {name.split("/", 1)[0] for name in named(packed)} == {
        path.name for path in shards.iterdir()
    }
    assert contents(packed) == contents(plain)
    # Any order, as threads read.
    read = packed.reader()
    assert [read(position) for position in reversed(range(len(packed)))] == contents(plain)[::-1]


@pytest.mark.parametrize("pack", [as_tar_shards, as_parquet_files])
def test_one_file_is_a_source_too(folder: Path, tmp_path: Path, pack: Pack) -> None:
    """A single shard may be named itself."""
    file = next(pack(folder, tmp_path / "shards").glob("part-1.*"))

    source = find_images(file)

    assert named(source) == [f"{file.name}/{name}" for name in names_in(folder)[6:]]
    assert source.where(0) == str(file / names_in(folder)[6])


@pytest.mark.parametrize("pack", [as_tar_shards, as_parquet_files])
def test_scores_of_shards(tiny_store: Store, folder: Path, tmp_path: Path, pack: Pack) -> None:
    """The table of shards is the folder's, the unreadable image's reason included."""
    loaded, shards = tiny_store.load("tiny"), pack(folder, tmp_path / "shards")
    tables = []
    for location in (str(folder), str(shards), f"{shards}/*"):
        out = tmp_path / "out.parquet"
        source = find_source(location)
        score_files(loaded, source, out, progress=silent, batch_size=4, overwrite=True)
        tables.append(parquet.read_table(out).to_pydict())

    names = [[Path(file).name for file in table.pop("file")] for table in tables]
    assert sum(error is not None for error in tables[0]["error"]) == 1
    assert names[0] == names[1] == names[2]
    assert tables[0] == tables[1] == tables[2]


def test_a_calibration_on_shards(tiny_options: CalibrationOptions, tmp_path: Path) -> None:
    """It differs from the folders' in the fingerprints, which are of the names too."""
    shards = replace(
        tiny_options,
        selection_images=as_tar_shards(Path(tiny_options.selection_images), tmp_path / "tar"),
        threshold_images=str(
            as_parquet_files(Path(tiny_options.threshold_images), tmp_path / "parquet")
        ),
    )

    def bundle(options: CalibrationOptions, store: str) -> dict[str, Any]:
        made = calibrate(options, Store(tmp_path / store), progress=silent).bundle
        assert made.data.selection.count == 24
        return made.model_dump(exclude={"created", "data"})

    assert bundle(shards, "a") == bundle(tiny_options, "b")


@pytest.mark.parametrize("pack", [as_tar_shards, as_parquet_files])
@pytest.mark.parametrize("max_images", [3, 12])
def test_a_draw_of_shards(folder: Path, tmp_path: Path, pack: Pack, max_images: int) -> None:
    """The images that are drawn are those of the folder, with their bytes."""
    plain = find_images(folder, max_images=max_images, seed=4)
    packed = find_images(pack(folder, tmp_path / "shards"), max_images=max_images, seed=4)

    assert len(plain) == max_images
    assert [name.split("/", 1)[1] for name in named(packed)] == named(plain)
    assert contents(packed) == contents(plain)


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"image": [b"x", b"y"]}, ["0", "1"]),
        (
            {"image": [{"bytes": b"x", "path": "a.jpg"}, {"bytes": b"y", "path": None}]},
            ["a.jpg", "1"],
        ),
        ({"bytes": [b"x", b"y"], "file_name": ["a", "b"], "label": [1, 2]}, ["a", "b"]),
        ({"bytes": [b"x", b"y"], "name": [7, 8]}, ["0", "1"]),
    ],
)
def test_columns(tmp_path: Path, columns: dict[str, Any], names: list[str]) -> None:
    """Plain bytes or Hugging Face's pairs; a row without a name has its number."""
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")

    source = find_images(tmp_path)

    assert named(source) == [f"a.parquet/{name}" for name in names]
    assert contents(source) == [b"x", b"y"]


def test_a_row_without_bytes_is_one_unreadable_image(tmp_path: Path) -> None:
    """It is told as a file that cannot be opened is."""
    parquet.write_table(pyarrow.table({"bytes": [None, b"x"]}), tmp_path / "a.parquet")

    read = find_images(tmp_path).reader()

    with pytest.raises(OSError, match="the row has no bytes"):
        read(0)
    assert read(1) == b"x"


def _no_tar(root: Path) -> None:
    (root / "a.tar").write_bytes(b"x" * 2000)


def _cut_tar(root: Path) -> None:
    file = write_tar(root / "a.tar", [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1) * 20)])
    file.write_bytes(file.read_bytes()[:2500])


def _tar_without_images(root: Path) -> None:
    write_tar(root / "a.tar", [("0.cls", b"3")])


def _no_parquet(root: Path) -> None:
    (root / "a.parquet").write_bytes(b"x" * 2000)


def _damaged_pages(root: Path, **columns: Any) -> None:
    file = root / "a.parquet"
    parquet.write_table(pyarrow.table({"bytes": [b"x" * 99]} | columns), file, compression="none")
    content = file.read_bytes()
    # The footer, which tells of the pages, is whole.
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    file.write_bytes(content[:4] + bytes(footer - 4) + content[footer:])


def _damaged_names(root: Path) -> None:
    _damaged_pages(root, name=["0.jpg"])


def _other_columns(root: Path) -> None:
    parquet.write_table(pyarrow.table({"image": ["text"], "label": [1]}), root / "a.parquet")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_tar, "a.tar cannot be read as a tar file: "),
        (_cut_tar, "a.tar cannot be read as a tar file: unexpected end of data"),
        (_tar_without_images, "holds no image with a suffix of .* nor in .tar or .parquet files"),
        (_no_parquet, "a.parquet cannot be read as Parquet: "),
        (_damaged_names, "a.parquet cannot be read as Parquet: "),
        (_other_columns, "no column of encoded images called image or bytes; its columns are ima"),
    ],
)
def test_bad_shards(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    """What is wrong with a shard is one line that names it, before any image is read."""
    spoil(tmp_path)

    for find in (find_images, find_source):
        with pytest.raises(NormGateError, match=message) as caught:
            find(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_damaged_pages(tmp_path: Path) -> None:
    """Images that are damaged all together end the work in one line."""
    _damaged_pages(tmp_path)

    with pytest.raises(NormGateError, match=r"a\.parquet cannot be read as Parquet: "):
        find_images(tmp_path).reader()(0)


def test_the_same_images_in_a_bucket(bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    """Files, tar shards and Parquet files at a URL are those of the folder."""
    files = bucket.files()
    plain = find_images(folder)
    for name, local in (
        ("files", folder),
        ("tar", as_tar_shards(folder, tmp_path / "tar")),
        ("parquet", as_parquet_files(folder, tmp_path / "parquet")),
    ):
        url = f"s3://{bucket.name}/{name}"
        files.put(f"{local}/", f"{bucket.name}/{name}/", recursive=True)

        source = find_images(f"{url}/")

        assert named(source) == named(find_images(local))
        assert contents(source) == contents(plain)
        assert source.where(0) == f"{url}/{source.name(0)}"
        assert source.absolute() == source
        if name != "files":
            one = find_source(f"{url}/part-0.{name}")
            assert named(one) == named(source)[: len(one)]


def test_an_object_that_is_gone_is_one_unreadable_image(bucket: Bucket, folder: Path) -> None:
    """A store that cannot answer at all ends the work instead."""
    files = bucket.files()
    files.put(f"{folder}/a/", f"{bucket.name}/a/", recursive=True)
    source = find_images(f"s3://{bucket.name}/a")
    read = source.reader()
    files.rm_file(f"{bucket.name}/a/0006.jpg")

    with pytest.raises(FileNotFoundError):
        read(0)
    assert read(1) == jpeg(7)
    bucket.on_request = lambda method, path: ("403 Forbidden", "AccessDenied")
    with pytest.raises(NormGateError, match=r"s3://.*/a/0007.jpg cannot be read: "):
        read(1)
    bucket.on_request = lambda method, path: ("400 Bad Request", "InvalidRequest")
    with pytest.raises(NormGateError, match=r"s3://.*/a/0007.jpg cannot be read: "):
        read(1)


def test_a_bucket_that_is_not_there(bucket: Bucket) -> None:
    """Nothing below a URL, and no bucket at all, are told in one line."""
    with pytest.raises(CalibrationError, match="holds no image"):
        find_images(f"s3://{bucket.name}/absent")
    with pytest.raises(NormGateError, match="absent"):
        find_images("s3://normgate-absent/images")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message names the extra to install."""
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)

    with pytest.raises(NormGateError, match=r"pip install 'normgate\[parquet\]'"):
        find_images(tmp_path)
    with pytest.raises(NormGateError, match=r"pip install 'normgate\[s3\]'"):
        find_images("s3://bucket/images")
    with pytest.raises(NormGateError, match="nonsense://x cannot be read: "):
        find_images("nonsense://x")


def test_names_keep_every_character() -> None:
    """Names are what they were, those that are no UTF-8 included."""
    names = ["a", "", "é/ü.jpg", "\udcff.jpg"]

    assert list(Names(names)) == names


def test_digests_count_repeats() -> None:
    """Digests stay in order, empty ones in their places, and shared ones are counted each time."""
    rows = [np.random.default_rng(seed).bytes(31) + b"\0" for seed in range(4)]
    some, others = Digests(), Digests()
    some.extend([rows[0], b"", rows[1], rows[1], b""])
    others.extend([b"", rows[1], rows[2]])

    assert list(some) == [rows[0], b"", rows[1], rows[1], b""]
    assert len(some) == 5
    assert some.shared_with(others) == 2
    assert others.shared_with(some) == 1
    assert Digests().shared_with(some) == 0
