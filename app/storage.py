"""Where bundles lie, as files by name: a folder, or what keeps the same promises elsewhere."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from app.errors import BundleError

BUNDLE_FILE: Final = "bundle.json"
WEIGHTS_FILE: Final = "weights.safetensors"
POINTER_FILE: Final = "active.json"
GRAPHS_FOLDER: Final = "onnx"


class Storage(Protocol):
    """Versions of models, each a set of files that appears whole and never changes."""

    title: str
    """The folder or the URL, fit for a message."""
    root: Path
    """The folder that weights are read from: of a URL, the one with its verified copies."""

    def where(self, name: str, version: int, file: str = "") -> str:
        """The path or URL of a version, or of a file in it, for a message."""

    def names(self) -> list[str]:
        """What may be a model, sorted."""

    def versions(self, name: str) -> list[int]:
        """The whole versions of a model, ascending; those without a description are none."""

    def taken(self, name: str) -> list[int]:
        """The versions of which there is anything at all."""

    def signature(self, name: str, version: int) -> Hashable:
        """Something that changes when a file of the version does; None when there is none."""

    def files(self, name: str, version: int) -> list[str]:
        """The names of a version's files."""

    def read(self, name: str, version: int, file: str) -> bytes:
        """A file of a version.

        Raises:
            OSError: it is not there.
            BundleError: it cannot be read.
        """

    def weights(self, name: str, version: int, *, sha256: str, description: bytes) -> bytes:
        """The weights file, verified; ``description`` is the ``bundle.json`` that gave the hash.

        Raises:
            BundleError: it cannot be read, or its hash is another.
        """

    def add(self, name: str, version: int, files: Mapping[str, bytes]) -> None:
        """Add a version whole, or nothing that a reader would take for one.

        Raises:
            OSError: the version exists, or the storage is full or refuses.
            BundleError: the storage cannot be written to.
        """

    def pointer(self, name: str) -> bytes | None:
        """The content of a model's pointer, if there is one."""

    def point(self, name: str, content: bytes) -> None:
        """Replace a model's pointer in one step.

        Raises:
            OSError: the storage is full or refuses.
            BundleError: the storage cannot be written to.
        """


class FolderStorage:
    """A folder of a file system that renames in one step.

    Args:
        root: holds one folder a model, which holds one folder a version.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.title = str(root)

    def folder(self, name: str, version: int) -> Path:
        """Where a version lies."""
        return self.root / name / str(version)

    def where(self, name: str, version: int, file: str = "") -> str:
        """The path of a version, or of a file in it."""
        return str(self.folder(name, version) / file)

    def names(self) -> list[str]:
        """The folders, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir())

    def versions(self, name: str) -> list[int]:
        """The folders whose names are numbers and that hold a description, ascending."""
        return [
            version
            for version in self.taken(name)
            if (self.folder(name, version) / BUNDLE_FILE).is_file()
        ]

    def taken(self, name: str) -> list[int]:
        """The folders whose names are numbers, ascending."""
        folder = self.root / name
        if not folder.is_dir():
            return []
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())

    def signature(self, name: str, version: int) -> Hashable:
        """Names, sizes and times of the version's files."""
        try:
            status = {path.name: path.stat() for path in self.folder(name, version).iterdir()}
        except OSError:
            return None
        return frozenset((file, one.st_size, one.st_mtime_ns) for file, one in status.items())

    def files(self, name: str, version: int) -> list[str]:
        """Paths relative to the version's folder, sorted."""
        folder = self.folder(name, version)
        return sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )

    def read(self, name: str, version: int, file: str) -> bytes:
        """A file of a version."""
        return (self.folder(name, version) / file).read_bytes()

    def weights(self, name: str, version: int, *, sha256: str, description: bytes) -> bytes:
        """The weights file, verified."""
        where = self.where(name, version, WEIGHTS_FILE)
        try:
            content = self.read(name, version, WEIGHTS_FILE)
        except OSError as error:
            raise BundleError(f"{where} cannot be read: {error}") from error
        return verified(content, sha256=sha256, where=where)

    def add(self, name: str, version: int, files: Mapping[str, bytes]) -> None:
        """Write to a folder beside it, sync, and rename."""
        with self.staged(name, files) as staged:
            staged.rename(self.folder(name, version))
            _sync_folder(self.root / name)

    @contextmanager
    def staged(self, name: str, files: Mapping[str, bytes]) -> Iterator[Path]:
        """A synced folder with the files, which no reader sees; gone at the exit unless renamed.

        Raises:
            OSError: a file's name leads out of the folder, or the disk is full or refuses.
        """
        parent = self.root / name
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as partial:
            staged = Path(partial, "bundle")
            staged.mkdir()
            for file, content in files.items():
                _check_inside(file)
                (staged / file).parent.mkdir(exist_ok=True)
                _write_synced(staged / file, content)
            _sync_folder(staged)
            yield staged

    def pointer(self, name: str) -> bytes | None:
        """The content of a model's pointer, if there is one."""
        try:
            return (self.root / name / POINTER_FILE).read_bytes()
        except FileNotFoundError:
            return None

    def point(self, name: str, content: bytes) -> None:
        """Write beside the pointer, sync, and rename over it."""
        with self.staged(name, {POINTER_FILE: content}) as staged:
            (staged / POINTER_FILE).replace(self.root / name / POINTER_FILE)
            _sync_folder(self.root / name)

    def forget_pointer(self, name: str) -> None:
        """Remove a model's pointer, if there is one."""
        (self.root / name / POINTER_FILE).unlink(missing_ok=True)

    def retire(self, path: Path) -> None:
        """Remove a folder in one step as far as readers see."""
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as partial:
            path.rename(Path(partial, "old"))
            shutil.rmtree(Path(partial, "old"), ignore_errors=True)


def verified(content: bytes, *, sha256: str, where: str) -> bytes:
    """The content, whose hash is the one given.

    Raises:
        BundleError: it is another.
    """
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise BundleError(f"{where} has sha256 {actual}, but its bundle.json says {sha256}")
    return content


def _check_inside(file: str) -> None:
    # The names in a bucket are whatever its writers chose; to a file system ".." is a way out.
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise OSError(errno.EINVAL, "no name of a file in a bundle", file)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
