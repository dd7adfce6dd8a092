"""Images as a stream of batches, decoded in parallel with whatever consumes them."""

import hashlib
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.core.images import Preprocessing, load
from app.errors import CalibrationError, ImageError
from app.offline.progress import Progress
from app.offline.sources import ImageSource, Reader, Spread, find_images
from app.store import Fingerprint

MAX_UNREADABLE_SHARE: Final = 0.01
_BATCHES_AHEAD: Final = 3
_MOST_IMAGES_A_JOB: Final = 8
"""To hand over a tiny image takes as long as to decode it."""
_REMOTE_READERS: Final = 16
"""Threads that wait for another machine's answers."""
_DIGEST_SIZE: Final = hashlib.sha256().digest_size
_NAMED: Final = 5

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Findings:
    """What reading some images told beside the images.

    ``digests`` are empty where nothing could be read; ``reasons`` tell by position why there is no
    image.
    """

    digests: Sequence[bytes]
    reasons: Mapping[int, str]


@dataclass(frozen=True)
class Batch:
    """Images that are one forward pass, wherever it is made, or a part of them.

    Args:
        positions: in the source, the unreadable images' included.
        images: the readable ones, ``[B, 3, crop, crop]`` uint8.
        findings: what reading them told.
    """

    positions: range
    images: Tensor
    findings: Findings

    @property
    def files(self) -> int:
        """How many images there are, the unreadable ones included."""
        return len(self.positions)

    @property
    def indices(self) -> list[int]:
        """The positions of the readable images."""
        return [one for one in self.positions if one not in self.findings.reasons]


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Args:
        source: the images.
        preprocessing: what is done to each.
        batch_size: images in a batch.
        max_pixels: larger images count as unreadable.
        threads: that read and decode; all cores by default, more where another machine answers.
    """

    source: ImageSource
    preprocessing: Preprocessing
    batch_size: int
    max_pixels: int
    threads: int | None = None

    def batches(self, positions: range) -> Iterator[Batch]:
        """Decoded batches in order, a few decoded ahead of the one in use.

        What a batch holds depends on ``positions.start`` and the batch size, so on nothing else
        do the last digits of what a network makes of it.
        """
        read = self.source.reader()
        pool = ThreadPoolExecutor(self._threads(), thread_name_prefix="decode")
        try:
            pending: deque[tuple[range, list[Future[Batch]]]] = deque()
            for batch in in_batches(positions, self.batch_size):
                parts = in_batches(batch, self._images_a_job())
                pending.append((batch, [pool.submit(self._load_all, read, part) for part in parts]))
                if len(pending) > _BATCHES_AHEAD:
                    yield _collected(*pending.popleft())
            while pending:
                yield _collected(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _threads(self) -> int:
        threads = self.threads or os.cpu_count() or 1
        return max(threads, _REMOTE_READERS) if self.source.is_remote else threads

    def _images_a_job(self) -> int:
        return max(1, min(_MOST_IMAGES_A_JOB, self.batch_size // self._threads()))

    def _load_all(self, read: Reader, positions: range) -> Batch:
        # Joined here: each tensor that the network's thread lets go waits for the interpreter's
        # lock.
        images: list[Tensor] = []
        digests: list[bytes] = []
        reasons: dict[int, str] = {}
        for position in positions:
            digest, image = self._load(read, position)
            digests.append(digest)
            if isinstance(image, str):
                reasons[position] = image
            else:
                images.append(image)
        return Batch(positions, _stacked(images), Findings(digests, reasons))

    def _load(self, read: Reader, position: int) -> tuple[bytes, Tensor | str]:
        """A file's digest, and its image or what is wrong with it."""
        try:
            data = read(position)
        except OSError as error:
            return b"", error.strerror or type(error).__name__
        digest = hashlib.sha256(data).digest()
        try:
            return digest, load(data, self.preprocessing, max_pixels=self.max_pixels)
        except ImageError as error:
            return digest, str(error)


class Place(Protocol):
    """Where the work on many images is done."""

    def spread(self) -> Spread:
        """What does small jobs."""

    def device(self, wanted: str) -> str:
        """Where this process should keep its network, when batches run on ``wanted``."""

    def run(
        self, reading: Reading, work: Callable[[Batch], ResultT], positions: range
    ) -> Iterator[ResultT]:
        """The result of each batch, in order."""


class ThisMachine:
    """All of it here, one batch after the other."""

    def spread(self) -> Spread:
        """In turn."""
        return map

    def device(self, wanted: str) -> str:
        """The device itself."""
        return wanted

    def run(
        self, reading: Reading, work: Callable[[Batch], ResultT], positions: range
    ) -> Iterator[ResultT]:
        """The result of each batch, while the next ones are decoded."""
        for batch in reading.batches(positions):
            yield work(batch)


class Digests:
    """The sha256 of many images, 32 bytes each; none of those that could not be read."""

    def __init__(self) -> None:
        self._joined = bytearray()
        self._absent = array("q")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[bytes]:
        """Each digest, empty where there is none."""
        absent, start = iter([*self._absent, self._count]), 0
        next_absent = next(absent)
        for position in range(self._count):
            if position == next_absent:
                next_absent = next(absent)
                yield b""
                continue
            yield bytes(self._joined[start : start + _DIGEST_SIZE])
            start += _DIGEST_SIZE

    def extend(self, digests: Iterable[bytes]) -> None:
        """Add some, in order."""
        for digest in digests:
            if not digest:
                self._absent.append(self._count)
            self._joined += digest
            self._count += 1

    def shared_with(self, others: "Digests") -> int:
        """How many of these are also among the others; repeats count each time."""
        return int(np.isin(self._array(), others._array()).sum())

    def _array(self) -> NDArray[np.bytes_]:
        return np.frombuffer(bytes(self._joined), dtype=f"S{_DIGEST_SIZE}")


@dataclass
class ImageSet:
    """Images in a fixed order, and what was learned by reading them."""

    source: ImageSource
    digests: Digests = field(default_factory=Digests)
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.source)

    def batches(
        self, preprocessing: Preprocessing, *, batch_size: int, max_pixels: int
    ) -> Iterator[Batch]:
        """Decoded batches in order, a few decoded ahead of the one in use.

        Unreadable files are left out and remembered in ``unreadable``. Memory is bounded by a
        few batches, and 32 bytes a file for its digest.

        Raises:
            CalibrationError: more than 1 % of the files are unreadable; the message names some.
        """
        self.digests, self.unreadable = Digests(), []
        reading = Reading(self.source, preprocessing, batch_size, max_pixels)
        for batch in reading.batches(range(len(self))):
            self.learn(batch.findings)
            yield batch

    def learn(self, findings: Findings) -> None:
        """Remember what the next images told.

        Raises:
            CalibrationError: more than 1 % of all are unreadable; the message names some.
        """
        self.digests.extend(findings.digests)
        for position, reason in findings.reasons.items():
            self._refuse(position, reason)

    def fingerprint(self) -> Fingerprint:
        """What was read, once all of it was."""
        summary = hashlib.sha256()
        for position, digest in zip(range(len(self)), self.digests, strict=True):
            summary.update(os.fsencode(self.source.name(position)) + b"\0" + digest)
        return Fingerprint(
            count=len(self) - len(self.unreadable),
            sha256=summary.hexdigest(),
            unreadable=tuple(self.unreadable),
        )

    def _refuse(self, position: int, reason: str) -> None:
        self.unreadable.append(f"{self.source.name(position)}: {reason}")
        if len(self.unreadable) > MAX_UNREADABLE_SHARE * len(self):
            named = "; ".join(self.unreadable[:_NAMED])
            raise CalibrationError(
                f"{len(self.unreadable)} of {len(self)} images in {self.source.root} are "
                f"unreadable, more than {MAX_UNREADABLE_SHARE:.0%}: {named}"
            )


class ImageFolder(ImageSet):
    """The images below a folder of this machine."""

    @classmethod
    def find(cls, folder: Path, *, max_images: int | None = None, seed: int = 0) -> "ImageFolder":
        """The images below ``folder``, or a seeded random draw of ``max_images`` of them.

        Raises:
            CalibrationError: the folder does not exist, or holds no image.
        """
        return cls(find_images(folder, max_images=max_images, seed=seed))

    @property
    def folder(self) -> Path:
        """Searched recursively; class folders are allowed, not needed."""
        return Path(self.source.root)

    @cached_property
    def files(self) -> Sequence[Path]:
        """Of each image the path; in a shard, as if the shard were a folder."""
        return [Path(self.source.where(position)) for position in range(len(self))]


def in_batches(positions: range, batch_size: int) -> Iterator[range]:
    """Slices of the positions; the last one may be shorter."""
    for start in range(positions.start, positions.stop, batch_size):
        yield range(start, min(start + batch_size, positions.stop))


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


def _collected(positions: range, jobs: Sequence[Future[Batch]]) -> Batch:
    parts = [job.result() for job in jobs]
    images = [part.images for part in parts if len(part.images)]
    return Batch(
        positions,
        torch.cat(images) if images else _stacked([]),
        Findings(
            digests=[digest for part in parts for digest in part.findings.digests],
            reasons=dict(item for part in parts for item in part.findings.reasons.items()),
        ),
    )


def _stacked(images: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(images)) if images else torch.empty((0, 3, 0, 0), dtype=torch.uint8)
