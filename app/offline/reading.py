"""Folders of images as a stream of batches, decoded in parallel with whatever consumes them."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from app.core.images import Preprocessing, load
from app.errors import CalibrationError, ImageError
from app.offline.progress import Progress
from app.store import Fingerprint

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
MAX_UNREADABLE_SHARE: Final = 0.01
_BATCHES_AHEAD: Final = 3
_NAMED: Final = 5


@dataclass(frozen=True)
class Batch:
    """Images of one batch that could be read.

    ``indices`` are their positions in the sorted list of files; ``files`` counts the images of
    the batch, the unreadable ones included.
    """

    images: Tensor
    indices: list[int]
    files: int


@dataclass
class ImageFolder:
    """The images below a folder, in a fixed order, and what was learned by reading them.

    Args:
        folder: searched recursively; class folders are allowed, not needed.
        files: the images in it, sorted by their path.
    """

    folder: Path
    files: Sequence[Path]
    digests: list[bytes] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def find(cls, folder: Path, *, max_images: int | None = None, seed: int = 0) -> "ImageFolder":
        """The images below ``folder``, or a seeded random draw of ``max_images`` of them.

        Raises:
            CalibrationError: the folder does not exist, or holds no image.
        """
        if not folder.is_dir():
            raise CalibrationError(f"{folder} is not a folder")
        files = sorted(
            Path(parent, name)
            for parent, _, names in os.walk(folder, followlinks=True)
            for name in names
            if Path(name).suffix.lower() in SUFFIXES
        )
        if not files:
            raise CalibrationError(
                f"{folder} holds no image with a suffix of {', '.join(sorted(SUFFIXES))}"
            )
        if max_images is not None and max_images < len(files):
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(files), generator=generator)[:max_images]
            files = [files[i] for i in sorted(chosen.tolist())]
        return cls(folder, files)

    def batches(
        self, preprocessing: Preprocessing, *, batch_size: int, max_pixels: int
    ) -> Iterator[Batch]:
        """Decoded batches in order, a few decoded ahead of the one in use.

        Unreadable files are left out and remembered in ``unreadable``. Memory is bounded by a
        few batches, and 32 bytes a file for its digest.

        Raises:
            CalibrationError: more than 1 % of the files are unreadable; the message names some.
        """
        self.digests, self.unreadable = [], []
        chunks = (
            range(start, min(start + batch_size, len(self.files)))
            for start in range(0, len(self.files), batch_size)
        )
        pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")
        try:
            pending: deque[tuple[range, list[Future[LoadedFile]]]] = deque()
            for chunk in chunks:
                jobs = [
                    pool.submit(load_file, self.files[i], preprocessing, max_pixels) for i in chunk
                ]
                pending.append((chunk, jobs))
                if len(pending) > _BATCHES_AHEAD:
                    yield self._collect(*pending.popleft())
            while pending:
                yield self._collect(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def fingerprint(self) -> Fingerprint:
        """What was read, once :meth:`batches` has run to its end."""
        summary = hashlib.sha256()
        for file, digest in zip(self.files, self.digests, strict=True):
            summary.update(self._name(file).encode() + b"\0" + digest)
        return Fingerprint(
            count=len(self.files) - len(self.unreadable),
            sha256=summary.hexdigest(),
            unreadable=tuple(self.unreadable),
        )

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def _collect(self, chunk: range, jobs: Sequence["Future[LoadedFile]"]) -> Batch:
        images, indices = [], []
        for index, job in zip(chunk, jobs, strict=True):
            loaded = job.result()
            self.digests.append(loaded.digest)
            if isinstance(loaded.image, Tensor):
                images.append(loaded.image)
                indices.append(index)
            else:
                self._refuse(self.files[index], loaded.image)
        size = (0, 3, 0, 0)
        stacked = torch.stack(images) if images else torch.empty(size, dtype=torch.uint8)
        return Batch(images=stacked, indices=indices, files=len(chunk))

    def _refuse(self, file: Path, reason: str) -> None:
        self.unreadable.append(f"{self._name(file)}: {reason}")
        if len(self.unreadable) > MAX_UNREADABLE_SHARE * len(self.files):
            named = "; ".join(self.unreadable[:_NAMED])
            raise CalibrationError(
                f"{len(self.unreadable)} of {len(self.files)} images in {self.folder} are "
                f"unreadable, more than {MAX_UNREADABLE_SHARE:.0%}: {named}"
            )


def tracked(
    batches: Iterator[Batch], *, title: str, total: int, progress: Progress
) -> Iterator[Batch]:
    """The batches that hold a readable image; ``progress`` is told of every batch."""
    done = 0
    progress(title, done=done, total=total)
    for batch in batches:
        if batch.indices:
            yield batch
        done += batch.files
        progress(title, done=done, total=total)


@dataclass(frozen=True)
class LoadedFile:
    """A file's digest, and its image or why there is none."""

    digest: bytes
    image: Tensor | str


def load_file(file: Path, preprocessing: Preprocessing, max_pixels: int) -> LoadedFile:
    """A file's image and digest; what is wrong with it becomes the reason, not an error."""
    try:
        data = file.read_bytes()
    except OSError as error:
        return LoadedFile(b"", error.strerror or type(error).__name__)
    digest = hashlib.sha256(data).digest()
    try:
        return LoadedFile(digest, load(data, preprocessing, max_pixels=max_pixels))
    except ImageError as error:
        return LoadedFile(digest, str(error))
