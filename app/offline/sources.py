"""Where images lie: a folder of files, tar shards or Parquet files, on this machine or at a URL.

A source is a list of images in a fixed order, of which any can be read by its position. It is a
few arrays, so that many processes can have it, and share it.
"""

import importlib
import os
import tarfile
import threading
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from errno import ENODATA
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from app.errors import CalibrationError, NormGateError

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
SHARD_SUFFIX: Final = ".tar"
PARQUET_SUFFIX: Final = ".parquet"

_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_IMAGE_COLUMNS: Final = ("image", "bytes")
_NAME_COLUMNS: Final = ("name", "file", "file_name", "filename", "path", "key", "__key__")
_GROUPS_KEPT: Final = 2
"""Row groups in memory: threads that read ahead stand in two where one ends."""

Reader = Callable[[int], bytes]
"""The encoded bytes of the image at a position; for many threads at once.

Raises OSError where that image cannot be read, NormGateError where none could.
"""

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Spread(Protocol):
    """``map``, or something that does it elsewhere."""

    def __call__(
        self, function: Callable[[ItemT], ResultT], items: Iterable[ItemT], /
    ) -> Iterable[ResultT]:
        """The results, in order."""


class Names:
    """Many names in two arrays: their bytes, and 8 more each."""

    def __init__(self, names: Iterable[str]) -> None:
        content, ends = bytearray(), array("q")
        for name in names:
            content += os.fsencode(name)
            ends.append(len(content))
        self._content = np.frombuffer(content, dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = 0 if index == 0 else self._ends[index - 1]
        return os.fsdecode(self._content[start : self._ends[index]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


class ImageSource(ABC):
    """Images in a fixed order.

    Args:
        root: a folder or a URL; names are relative to it.
    """

    root: str

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def name(self, position: int) -> str:
        """What an image is called, below the root; of a shard's the shard is the folder."""

    @abstractmethod
    def reader(self) -> Reader:
        """Reads them, with caches of its own."""

    def where(self, position: int) -> str:
        """The path or URL of an image."""
        return _joined(self.root, self.name(position))

    def absolute(self) -> "ImageSource":
        """The same images, for a process that runs in another folder."""
        changed: ImageSource = replace(self, root=_absolute(self.root))  # type: ignore[type-var]
        return changed

    @property
    def is_remote(self) -> bool:
        """Whether reading is waiting for another machine, so that many should wait at once."""
        return _is_url(self.root)


@dataclass(frozen=True)
class Files(ImageSource):
    """One image a file."""

    root: str
    names: Names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, position: int) -> str:
        """The path below the root."""
        return self.names[position]

    def reader(self) -> Reader:
        """Reads whole files."""
        read = _range_reader(self.root)
        return lambda position: read(self.where(position), None, None)


@dataclass(frozen=True)
class Shards(ImageSource):
    """The images in tar files, such as WebDataset's.

    Args:
        root: the folder or URL of the shards.
        shards: their paths below it.
        members: the images' names in their shards.
        shard_of: ``[N]`` int32, which shard an image is in.
        starts: ``[N]`` int64, where its bytes begin there.
        sizes: ``[N]`` int64.
    """

    root: str
    shards: tuple[str, ...]
    members: Names
    shard_of: NDArray[np.int32]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.members)

    def name(self, position: int) -> str:
        """The shard's path and the name in it."""
        return f"{self.shards[self.shard_of[position]]}/{self.members[position]}"

    def reader(self) -> Reader:
        """Reads the images' bytes out of the shards."""
        read = _range_reader(self.root)

        def read_member(position: int) -> bytes:
            shard = _joined(self.root, self.shards[self.shard_of[position]])
            start = int(self.starts[position])
            return read(shard, start, start + int(self.sizes[position]))

        return read_member


@dataclass(frozen=True)
class ParquetFiles(ImageSource):
    """The images in a column of Parquet files.

    Args:
        root: the folder or URL of the files.
        files: their paths below it.
        columns: of the encoded bytes, in each file.
        rows: the images' names, or else the numbers of their rows.
        file_of: ``[groups]`` int32, the file of each row group.
        group_of: ``[groups]`` int32, its number in the file.
        ends: ``[groups]`` int64, how many images there are up to its end.
    """

    root: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    rows: Names
    file_of: NDArray[np.int32]
    group_of: NDArray[np.int32]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, position: int) -> str:
        """The file's path, and the row's name or number."""
        return f"{self.files[self.file_of[self.group(position)]]}/{self.rows[position]}"

    def group(self, position: int) -> int:
        """The row group of an image."""
        return int(np.searchsorted(self.ends, position, side="right"))

    def reader(self) -> Reader:
        """Reads row groups whole and keeps the last ones."""
        groups = _RowGroups(self)

        def read_row(position: int) -> bytes:
            group = self.group(position)
            start = 0 if group == 0 else int(self.ends[group - 1])
            content = groups.column(group)[position - start].as_py()
            if content is None:
                raise OSError(ENODATA, "the row has no bytes")
            return bytes(content)

        return read_row


@dataclass(frozen=True)
class Drawn(ImageSource):
    """Some images of a source.

    Args:
        source: all of them.
        positions: ``[N]`` int64, ascending.
    """

    source: ImageSource
    positions: NDArray[np.int64]

    @property
    def root(self) -> str:  # type: ignore[override] # it is the source's
        """The folder or URL."""
        return self.source.root

    def absolute(self) -> ImageSource:
        """Some images of the source's own."""
        return replace(self, source=self.source.absolute())

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, position: int) -> str:
        """As the source calls it."""
        return self.source.name(int(self.positions[position]))

    def reader(self) -> Reader:
        """The source's."""
        read = self.source.reader()
        return lambda position: read(int(self.positions[position]))


def find_images(
    location: Path | str,
    *,
    max_images: int | None = None,
    seed: int = 0,
    spread: Spread = map,
) -> ImageSource:
    """The images below a folder or a URL, or a seeded random draw of them.

    Image files are sorted by their path. Where there are none, those in its ``.tar`` files are
    taken, else those in its ``.parquet`` files: file by file, as they lie in each.

    Args:
        location: a folder, a URL that fsspec knows, or one ``.tar`` or ``.parquet`` file.
        max_images: how many to draw; all by default.
        seed: of the draw.
        spread: looks into the shards.

    Raises:
        CalibrationError: it does not exist, or holds no image.
        NormGateError: what is there cannot be read, or a package that reads it is missing.
    """
    root, names = _listed(os.fspath(location))
    source = _source(root, names, spread)
    if not source:
        raise CalibrationError(
            f"{location} holds no image with a suffix of {', '.join(sorted(SUFFIXES))}, neither "
            f"in files of its own nor in {SHARD_SUFFIX} or {PARQUET_SUFFIX} files"
        )
    if max_images is None or max_images >= len(source):
        return source
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(source), generator=generator)[:max_images]
    return Drawn(source, np.sort(chosen.numpy()))


def shards_of(root: str, shards: Sequence[str], *, spread: Spread = map) -> Shards:
    """The images in tar files, in their order there.

    Raises:
        NormGateError: one cannot be read.
    """
    parts: list[int] = []
    starts, sizes = array("q"), array("q")

    def members() -> Iterator[str]:
        for found in spread(_find_members, [_absolute(_joined(root, shard)) for shard in shards]):
            parts.append(len(found.names))
            starts.extend(found.starts)
            sizes.extend(found.sizes)
            yield from found.names

    names = Names(members())
    return Shards(
        root=root,
        shards=tuple(shards),
        members=names,
        shard_of=np.repeat(np.arange(len(shards), dtype=np.int32), parts),
        starts=np.frombuffer(starts, dtype=np.int64),
        sizes=np.frombuffer(sizes, dtype=np.int64),
    )


def parquet_files_of(root: str, files: Sequence[str], *, spread: Spread = map) -> ParquetFiles:
    """The images in Parquet files, row by row.

    Raises:
        NormGateError: one cannot be read, has no column of encoded images, or pyarrow is missing.
    """
    pyarrow()
    columns: list[str] = []
    counts: list[Sequence[int]] = []

    def rows() -> Iterator[str]:
        for found in spread(_find_rows, [_absolute(_joined(root, file)) for file in files]):
            columns.append(found.column)
            counts.append(found.rows)
            yield from found.names

    names = Names(rows())
    groups = [len(of_file) for of_file in counts]
    return ParquetFiles(
        root=root,
        files=tuple(files),
        columns=tuple(columns),
        rows=names,
        file_of=np.repeat(np.arange(len(files), dtype=np.int32), groups),
        group_of=np.concatenate([np.arange(size, dtype=np.int32) for size in groups]),
        ends=np.cumsum(np.concatenate(counts), dtype=np.int64),
    )


def pyarrow() -> Any:
    """The module, with ``pyarrow.parquet`` imported.

    Raises:
        NormGateError: it is not installed.
    """
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise NormGateError("Parquet needs pyarrow: pip install 'normgate[parquet]'") from error


@dataclass(frozen=True)
class _Members:
    """The images of one shard."""

    names: Sequence[str]
    starts: Sequence[int]
    sizes: Sequence[int]


@dataclass(frozen=True)
class _Rows:
    """The images of one Parquet file: their column, the rows of each group, their names."""

    column: str
    rows: Sequence[int]
    names: Sequence[str]


class _RowGroups:
    """The columns of encoded bytes, a row group at a time; for many threads."""

    def __init__(self, source: ParquetFiles) -> None:
        self._source = source
        self._columns: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def column(self, group: int) -> Any:
        """The row group's values, as an Arrow array."""
        with self._lock:
            if group not in self._columns:
                if len(self._columns) == _GROUPS_KEPT:
                    self._columns.popitem(last=False)
                self._columns[group] = self._read(group)
            self._columns.move_to_end(group)
            return self._columns[group]

    def _read(self, group: int) -> Any:
        source, file = self._source, int(self._source.file_of[group])
        path, column = _joined(source.root, source.files[file]), source.columns[file]
        with _opened(path) as opened, _reading(path, "Parquet"):
            table = (
                pyarrow()
                .parquet.ParquetFile(opened)
                .read_row_group(int(source.group_of[group]), columns=[column])
            )
        return table.flatten().column(column)


def _source(root: str, names: Iterable[str], spread: Spread) -> ImageSource:
    images: list[str] = []
    shards: list[str] = []
    tables: list[str] = []
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        if suffix in SUFFIXES:
            images.append(name)
        elif suffix == SHARD_SUFFIX:
            shards.append(name)
        elif suffix == PARQUET_SUFFIX:
            tables.append(name)
    if images or not (shards or tables):
        return Files(root, Names(_in_order(images)))
    if shards:
        return shards_of(root, _in_order(shards), spread=spread)
    return parquet_files_of(root, _in_order(tables), spread=spread)


def _in_order(names: list[str]) -> list[str]:
    """Sorted as paths are: by the names of the folders first."""
    names.sort(key=lambda name: name.replace("/", "\0"))
    return names


def _listed(location: str) -> tuple[str, Iterable[str]]:
    """The root, and every file below it that may count."""
    if _is_url(location):
        return _listed_at_url(location.rstrip("/"))
    if os.path.isfile(location) and location.lower().endswith((SHARD_SUFFIX, PARQUET_SUFFIX)):
        return os.path.dirname(location), [os.path.basename(location)]
    if not os.path.isdir(location):
        raise CalibrationError(f"{location} is not a folder")
    return location, (
        os.path.relpath(os.path.join(parent, name), location)
        for parent, _, names in os.walk(location, followlinks=True)
        for name in names
    )


def _listed_at_url(url: str) -> tuple[str, Iterable[str]]:
    files, base = _file_system(url)
    try:
        found = files.find(base)
    except Exception as error:  # each backend has the errors of its own libraries
        raise NormGateError(f"{url} cannot be listed: {_reason(error)}") from error
    if found == [base]:
        root, _, name = url.rpartition("/")
        return root, [name]
    return url, (path.removeprefix(base).lstrip("/") for path in found)


def _find_members(shard: str) -> _Members:
    names: list[str] = []
    starts, sizes = array("q"), array("q")
    with (
        _opened(shard) as opened,
        _reading(shard, "a tar file"),
        tarfile.open(fileobj=opened, mode="r:") as archive,
    ):
        for member in archive:
            # tarfile would keep every header.
            archive.members = []  # type: ignore[attr-defined] # typeshed leaves it out
            if member.isreg() and os.path.splitext(member.name)[1].lower() in SUFFIXES:
                names.append(member.name)
                starts.append(member.offset_data)
                sizes.append(member.size)
    return _Members(names, starts, sizes)


def _find_rows(file: str) -> _Rows:
    with _opened(file) as opened, _reading(file, "Parquet"):
        parquet = pyarrow().parquet.ParquetFile(opened)
        schema, metadata = parquet.schema_arrow, parquet.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        name = _name_column(schema)
        given: Iterable[Any] = iter(lambda: None, 0)
        if name is not None:
            given = parquet.read(columns=[name]).flatten().column(name).to_pylist()
    numbered = zip(range(sum(rows)), given, strict=False)
    names = [str(number if own is None else own) for number, own in numbered]
    return _Rows(_image_column(schema, file), rows, names)


def _image_column(schema: Any, file: str) -> str:
    arrow = pyarrow()
    binary = (arrow.binary(), arrow.large_binary())
    for name in _IMAGE_COLUMNS:
        kind = _kind(schema, name)
        if kind in binary:
            return name
        if arrow.types.is_struct(kind) and "bytes" in [field.name for field in kind]:
            return f"{name}.bytes"
    raise NormGateError(
        f"{file} has no column of encoded images called {' or '.join(_IMAGE_COLUMNS)}; its "
        f"columns are {', '.join(schema.names)}"
    )


def _name_column(schema: Any) -> str | None:
    arrow = pyarrow()
    for name in _NAME_COLUMNS:
        if _kind(schema, name) in (arrow.string(), arrow.large_string()):
            return name
    kind = _kind(schema, "image")
    if arrow.types.is_struct(kind) and "path" in [field.name for field in kind]:
        return "image.path"
    return None


def _kind(schema: Any, name: str) -> Any:
    """The type of a column; null's where there is none."""
    return schema.field(name).type if name in schema.names else pyarrow().null()


@contextmanager
def _reading(path: str, kind: str) -> Iterator[None]:
    """A context in which a file of that kind is read.

    Raises:
        NormGateError: it is damaged, or its store does not answer.
    """
    try:
        yield
    except NormGateError:
        raise
    except Exception as error:  # each backend has the errors of its own libraries
        raise NormGateError(f"{path} cannot be read as {kind}: {_reason(error)}") from error


def _opened(path: str) -> Any:
    """A file to seek in."""
    try:
        if _is_url(path):
            files, inside = _file_system(path)
            return files.open(inside, "rb")
        return open(path, "rb")
    except NormGateError:
        raise
    except Exception as error:  # each backend has the errors of its own libraries
        raise NormGateError(f"{path} cannot be read: {_reason(error)}") from error


def _range_reader(root: str) -> Callable[[str, int | None, int | None], bytes]:
    """Reads a file below the root, or the bytes of it from one place up to another."""
    if not _is_url(root):
        return _read_file
    files, _ = _file_system(root)

    def read(url: str, start: int | None, stop: int | None) -> bytes:
        try:
            return bytes(files.cat_file(url, start=start, end=stop))
        except FileNotFoundError:
            raise
        # Refused credentials too: they are no fault of the image.
        except Exception as error:  # each backend has the errors of its own libraries
            raise NormGateError(f"{url} cannot be read: {_reason(error)}") from error

    return read


def _read_file(path: str, start: int | None, stop: int | None) -> bytes:
    with open(path, "rb") as opened:
        if start is None or stop is None:
            return opened.read()
        opened.seek(start)
        return opened.read(stop - start)


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there."""
    # Not at the top: what lies on this machine needs none of it.
    from fsspec.core import url_to_fs

    try:
        files, base = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        remedy = f"pip install 'normgate[{extra}]'" if extra else str(error)
        raise NormGateError(f"{url} cannot be read: {remedy}") from error
    except ValueError as error:
        raise NormGateError(f"{url} cannot be read: {error}") from error
    return files, str(base)


def _is_url(location: str) -> bool:
    return "://" in location


def _joined(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}" if _is_url(root) else os.path.join(root, name)


def _absolute(location: str) -> str:
    return location if _is_url(location) else os.path.abspath(location)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
