"""Bundles in an object store, through fsspec, with verified copies in a folder of this machine.

An object store cannot rename. A version is there when its description is, which is uploaded
last and, where the store can refuse to overwrite, only once.
"""

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from app.errors import BundleError, StoreUnavailableError
from app.storage import (
    BUNDLE_FILE,
    GRAPHS_FOLDER,
    POINTER_FILE,
    WEIGHTS_FILE,
    FolderStorage,
    verified,
)

logger: Final = structlog.get_logger(__name__)

T = TypeVar("T")

KEPT_COPIES: Final = 5
"""Versions of each model that stay in the cache, those used last."""

_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# An outage is noticed within seconds; botocore itself tries again.
_S3_OPTIONS: Final = {
    "config_kwargs": {"connect_timeout": 3, "read_timeout": 10, "retries": {"max_attempts": 2}}
}
_REFUSALS: Final = frozenset({errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS})
_PARTIAL_LIFE_S: Final = 24 * 3600


class ObjectStorage:
    """Bundles below a URL that fsspec knows.

    Args:
        url: such as ``s3://bucket/models``.
        cache: holds a folder for each URL.

    Raises:
        BundleError: the URL is no such URL, or a package that reads it is not installed.
    """

    def __init__(self, url: str, *, cache: Path) -> None:
        self.title = re.sub(r"://[^/@]*@", "://", url.rstrip("/"))
        self._files, base = _open(url, title=self.title)
        self._base = base.rstrip("/")
        readable = re.sub(r"[^A-Za-z0-9.-]+", "-", self.title)[:60]
        digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()
        self.root = cache.expanduser() / f"{readable}-{digest[:12]}"
        self._copies = FolderStorage(self.root)
        self._pointers: dict[str, bytes] = {}

    def where(self, name: str, version: int, file: str = "") -> str:
        """The URL of a version, or of a file in it."""
        return "/".join([self.title, name, str(version), *([file] if file else [])])

    def names(self) -> list[str]:
        """What the folders are called, sorted. One request."""
        rows = self._ask(self.title, lambda: self._list(self._base))
        return sorted(row["name"].rstrip("/").rpartition("/")[2] for row in rows)

    def versions(self, name: str) -> list[int]:
        """The numbers whose description is there, ascending. One request a thousand files."""
        rows = self._rows(f"{self.title}/{name}", name)
        return sorted(
            int(version)
            for version, _, file in (row.partition("/") for row in rows)
            if version.isdecimal() and file == BUNDLE_FILE
        )

    def taken(self, name: str) -> list[int]:
        """The numbers below which there is anything, ascending."""
        rows = self._rows(f"{self.title}/{name}", name)
        folders = {row.partition("/")[0] for row in rows}
        return sorted({int(folder) for folder in folders if folder.isdecimal()})

    def signature(self, name: str, version: int) -> Hashable:
        """Names, sizes and entity tags of the version's files."""
        rows = self._rows(self.where(name, version), name, str(version))
        found = frozenset(
            (file, row["size"], str(row.get("ETag", row.get("mtime"))))
            for file, row in rows.items()
        )
        return found or None

    def files(self, name: str, version: int) -> list[str]:
        """Paths relative to the version, sorted."""
        return sorted(self._rows(self.where(name, version), name, str(version)))

    def read(self, name: str, version: int, file: str) -> bytes:
        """A file of a version."""
        path = self._path(name, str(version), file)
        where = self.where(name, version, file)
        return self._ask(where, lambda: bytes(self._files.cat_file(path)))

    def weights(self, name: str, version: int, *, sha256: str, description: bytes) -> bytes:
        """The weights file, from the copy where that is right, else from the store."""
        content = self._copy(name, version, sha256=sha256, description=description)
        if content is None:
            where = self.where(name, version, WEIGHTS_FILE)
            try:
                content = self.read(name, version, WEIGHTS_FILE)
            except OSError as error:
                raise BundleError(f"{where} cannot be read: it is not there") from error
            verified(content, sha256=sha256, where=where)
            kept = {WEIGHTS_FILE: content, BUNDLE_FILE: description}
            self._keep(name, version, kept | self._graphs(name, version))
        return content

    def add(self, name: str, version: int, files: Mapping[str, bytes]) -> None:
        """Upload the description last; it makes the version one."""
        if version in self.versions(name):
            raise FileExistsError(errno.EEXIST, "the version exists")
        for file, content in files.items():
            if file != BUNDLE_FILE:
                self._upload(name, version, file, content)
        self._upload(name, version, BUNDLE_FILE, files[BUNDLE_FILE])

    def pointer(self, name: str) -> bytes | None:
        """The content of a model's pointer, if there is one."""
        path = self._path(name, POINTER_FILE)
        where = f"{self.title}/{name}/{POINTER_FILE}"
        try:
            content = self._ask(where, lambda: bytes(self._files.cat_file(path)))
        except FileNotFoundError:
            content = None
        self._pointers.pop(name, None)
        if content is not None:
            self._pointers[name] = content
        with _told_of_the_cache():
            self._keep_pointer(name)
        return content

    def point(self, name: str, content: bytes) -> None:
        """One upload, which replaces the object in one step."""
        path = self._path(name, POINTER_FILE)
        self._ask(
            f"{self.title}/{name}/{POINTER_FILE}", lambda: self._files.pipe_file(path, content)
        )

    def _path(self, *parts: str) -> str:
        return "/".join([self._base, *parts])

    def _list(self, path: str) -> list[dict[str, Any]]:
        try:
            return [row for row in self._files.ls(path, detail=True) if row["name"] != path]
        except FileNotFoundError as error:
            self._check_bucket(error)
            return []

    def _rows(self, where: str, *parts: str) -> dict[str, dict[str, Any]]:
        """Every file below a folder, by its path from there."""
        folder = self._path(*parts)
        try:
            found = self._ask(where, lambda: self._files.find(folder, detail=True))
        except FileNotFoundError as error:
            self._check_bucket(error)
            return {}
        inside = f"{folder.lstrip('/')}/"
        rows = {path.lstrip("/").removeprefix(inside): row for path, row in found.items()}
        return {path: row for path, row in rows.items() if path}

    def _check_bucket(self, error: FileNotFoundError) -> None:
        # A prefix without an object is empty; of a bucket that is not there the store says so.
        if error.__cause__ is not None:
            raise BundleError(f"{self.title}: {error}") from error

    def _upload(self, name: str, version: int, file: str, content: bytes) -> None:
        path = self._path(name, str(version), file)
        self._ask(
            self.where(name, version, file),
            lambda: self._create(path, content, is_resumed=file != BUNDLE_FILE),
        )

    def _create(self, path: str, content: bytes, *, is_resumed: bool) -> None:
        """Write an object that is not there, where the store can be asked for just that."""
        try:
            self._files.pipe_file(path, content, mode="create")
        except (PermissionError, FileNotFoundError):
            raise
        except OSError as error:
            # A store that knows no conditions: whether it exists was asked before.
            if error.errno == errno.ENOSYS:
                self._files.pipe_file(path, content)
            elif not self._files.exists(path):
                raise
            # What an interrupted upload left is fine where it is the same.
            elif not is_resumed or self._files.cat_file(path) != content:
                raise FileExistsError(errno.EEXIST, "it exists, with another content") from error

    def _copy(self, name: str, version: int, *, sha256: str, description: bytes) -> bytes | None:
        """The weights file of the cache, where it belongs to the description."""
        try:
            if self._copies.read(name, version, BUNDLE_FILE) != description:
                return None
            content = self._copies.weights(name, version, sha256=sha256, description=description)
            os.utime(self._copies.folder(name, version))
        except (OSError, BundleError) as error:
            if not isinstance(error, FileNotFoundError):
                logger.warning("the cached copy is of no use", reason=str(error))
            return None
        return content

    def _keep(self, name: str, version: int, files: Mapping[str, bytes]) -> None:
        """Put a version in the cache, in the place of another copy; others may do so meanwhile."""
        folder = self._copies.folder(name, version)
        with _told_of_the_cache(), self._copies.staged(name, files) as staged:
            with suppress(FileNotFoundError):
                self._copies.retire(folder)
            # Another process that was faster put the same content there.
            with suppress(OSError):
                staged.rename(folder)
            self._keep_pointer(name)
            self._prune(name)

    def _keep_pointer(self, name: str) -> None:
        """Let the copy of the pointer follow, once what it points to is there too."""
        content = self._pointers.get(name)
        if content is None:
            self._copies.forget_pointer(name)
        elif content != self._copies.pointer(name) and self._has_copy(name, _pointed(content)):
            self._copies.point(name, content)

    def _graphs(self, name: str, version: int) -> dict[str, bytes]:
        """The files for another engine, which looks at them itself before it trusts them."""
        folder = f"{GRAPHS_FOLDER}/"
        files = [file for file in self.files(name, version) if file.startswith(folder)]
        return {file: self.read(name, version, file) for file in files}

    def _has_copy(self, name: str, version: object) -> bool:
        return version in self._copies.versions(name)

    def _prune(self, name: str) -> None:
        pointed = _pointed(self._copies.pointer(name))
        folders = [
            self._copies.folder(name, version)
            for version in self._copies.versions(name)
            if version != pointed
        ]
        old = sorted(folders, key=lambda folder: folder.stat().st_mtime_ns)[:-KEPT_COPIES]
        long_ago = time.time() - _PARTIAL_LIFE_S
        old += [
            path
            for path in (self.root / name).glob(".partial-*")
            if path.stat().st_mtime < long_ago
        ]
        for path in old:
            with suppress(FileNotFoundError):  # another process was faster
                self._copies.retire(path)

    def _ask(self, where: str, question: Callable[[], T]) -> T:
        """The answer of the store, or its failure as one of ours."""
        try:
            return question()
        except (BundleError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # each backend has the errors of its own libraries
            raise _told(error, where) from error


@contextmanager
def _told_of_the_cache() -> Iterator[None]:
    # What is served does not depend on the cache.
    try:
        yield
    except OSError as error:
        logger.warning("NORMGATE_MODEL_CACHE cannot be written", reason=str(error))


def _pointed(content: bytes | None) -> object:
    try:
        return json.loads(content or b"{}")["version"]
    except (ValueError, KeyError, TypeError):
        return None


def _told(error: Exception, where: str) -> BundleError:
    lines = str(error).splitlines()
    reason = lines[0] if lines else type(error).__name__
    if isinstance(error, PermissionError):
        return BundleError(f"{where}: the store refuses: {reason}")
    if "Credentials" in type(error).__name__:
        return BundleError(f"{where}: no credentials for the store: {reason}")
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return BundleError(f"{where}: the store refuses: {reason}")
    return StoreUnavailableError(f"{where}: the store cannot be reached: {reason}")


def _open(url: str, *, title: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there. Asks nothing of the network."""
    # Not at the top: a folder needs none of it.
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    is_s3 = _EXTRAS.get(protocol) == "s3"
    try:
        files, base = url_to_fs(url, use_listings_cache=False, **(_S3_OPTIONS if is_s3 else {}))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'normgate[{extra}]'" if extra else str(error)
        raise BundleError(f"NORMGATE_MODEL_STORE is {title}: {remedy}") from error
    except (ValueError, TypeError) as error:
        raise BundleError(f"NORMGATE_MODEL_STORE is {title}: {error}") from error
    if is_s3:
        if not base.strip("/"):
            raise BundleError(f"NORMGATE_MODEL_STORE is {url}: it names no bucket")
        files.retries = 1
    return files, str(base)
