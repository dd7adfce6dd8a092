"""The folder of the review queue: images as they were uploaded, with a record beside each.

An image is ``<id>.<suffix>``, byte for byte what was scored; its record ``<id>.json`` is written
after it and removed before it, so that an image without a record is none. Each file is written
under another name and renamed. Files of other names are never touched.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from app.errors import ReviewError, ReviewNotFoundError

Label = Literal["really_ood", "was_fine"]
LABELS: Final[tuple[Label, ...]] = get_args(Label)

ID_PATTERN: Final = r"^[0-9a-f]{32}$"
SUFFIXES: Final[Mapping[str, str]] = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
}
"""What the files of a format of :mod:`app.core.images` end with."""
_PARTIAL: Final = ".partial"
_LOCK: Final = "review.lock"
_OURS: Final = re.compile(rf"[0-9a-f]{{32}}\.(json|{'|'.join(SUFFIXES.values())})({_PARTIAL})?")
_IMAGE_SHARE: Final = 16
_TICK: Final = timedelta(microseconds=1)
_STEP: Final = timedelta(seconds=1)
"""A clock that went back further was set, and is believed."""


class ReviewImage(BaseModel):
    """What is known of an image that is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=ID_PATTERN)
    time: AwareDatetime = Field(description="When it was scored.")
    model: str
    version: int
    score: float
    threshold: float
    p_value: float
    verdict: Literal["id", "uncertain", "ood"]
    prediction: str | None = Field(description="The most probable label, where it was computed.")
    is_sampled: bool = Field(description="Drawn from all images, whatever their verdict.")
    suffix: Literal["jpg", "png", "webp", "gif", "bmp"]
    width: int
    height: int
    file_bytes: int
    label: Label | None = None
    labelled_at: AwareDatetime | None = None

    @property
    def file(self) -> str:
        """The name of the image's file."""
        return f"{self.id}.{self.suffix}"

    @property
    def record(self) -> str:
        """The name of this record's file."""
        return f"{self.id}.json"


@dataclass(frozen=True)
class Limits:
    """How much is kept: of the images found ``ood`` and of the sample, so many each."""

    images: int
    max_bytes: int
    retention_s: float

    @property
    def max_image_bytes(self) -> int:
        """Largest image that is kept, so that a few cannot fill the folder."""
        return self.max_bytes // _IMAGE_SHARE


@dataclass(frozen=True)
class _Kept:
    image: ReviewImage
    size_bytes: int
    """Of both files."""


@dataclass
class _Ring:
    """Images by id, oldest first."""

    kept: dict[str, _Kept] = field(default_factory=dict)
    size_bytes: int = 0

    def put(self, kept: _Kept) -> None:
        """Take an image in as the newest, or change one where it stands."""
        before = self.kept.get(kept.image.id)
        self.size_bytes += kept.size_bytes - (before.size_bytes if before else 0)
        self.kept[kept.image.id] = kept

    def pop(self, image_id: str) -> None:
        self.size_bytes -= self.kept.pop(image_id).size_bytes

    def oldest(self) -> ReviewImage:
        return next(iter(self.kept.values())).image


def _utc_now() -> datetime:
    return datetime.now(UTC)


class ReviewFolder:
    """Images on disk, never more than the limits say. One thread at a time may use it.

    The sample and the other images are two rings: no flood of OOD images pushes the sample out.
    Within a ring the oldest go first, whatever they are labelled.

    Args:
        folder: made where it is missing.
        limits: enforced before anything is written.
        now: the time of day, in UTC.
    """

    def __init__(
        self, folder: Path, limits: Limits, *, now: Callable[[], datetime] = _utc_now
    ) -> None:
        self.limits = limits
        self._folder = folder
        self._now = now
        self._rings = {is_sampled: _Ring() for is_sampled in (False, True)}
        self._lock: int | None = None
        self._last = datetime.fromtimestamp(0, UTC)

    @property
    def size_bytes(self) -> int:
        """Of all files kept."""
        return sum(ring.size_bytes for ring in self._rings.values())

    def __len__(self) -> int:
        return sum(len(ring.kept) for ring in self._rings.values())

    def open(self) -> None:
        """Take the folder for this process, and find again what is in it.

        Raises:
            OSError: it cannot be read and written, or another process has it.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _locked(self._folder / _LOCK)
        try:
            self._write(f"{'f' * 32}.json", b"")  # fails now rather than at the first image
            self._find()
            self.expire()
            for ring in self._rings.values():
                self._make_room(0, ring, images=0)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def images(self) -> list[ReviewImage]:
        """All that are kept, newest first."""
        kept = [kept.image for ring in self._rings.values() for kept in ring.kept.values()]
        return sorted(kept, key=lambda image: image.time, reverse=True)

    def get(self, image_id: str) -> ReviewImage:
        """One image's record.

        Raises:
            ReviewNotFoundError: there is none.
        """
        for ring in self._rings.values():
            if image_id in ring.kept:
                return ring.kept[image_id].image
        raise ReviewNotFoundError(f"no image {image_id} is kept for review")

    def read(self, image_id: str) -> bytes:
        """One image's file.

        Raises:
            ReviewNotFoundError: there is none.
        """
        try:
            return (self._folder / self.get(image_id).file).read_bytes()
        except FileNotFoundError:
            raise ReviewNotFoundError(f"the file of image {image_id} is gone") from None

    def add(self, image: ReviewImage, data: bytes) -> ReviewImage:
        """Keep an image, and let go what it takes the place of.

        Args:
            image: its record.
            data: its file, of at most ``limits.max_image_bytes``.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        image = self._after_the_last(image)
        record, ring = _encoded(image), self._rings[image.is_sampled]
        self._make_room(len(data) + len(record), ring, images=1)
        self._write(image.file, data)
        try:
            self._write(image.record, record)
        except OSError:
            with suppress(OSError):
                (self._folder / image.file).unlink()
            raise
        ring.put(_Kept(image, len(data) + len(record)))
        self._last = image.time
        return image

    def label(self, image_id: str, label: Label | None) -> ReviewImage:
        """The image with its label, which None takes away; the same label again changes nothing.

        Raises:
            ReviewNotFoundError: there is no such image.
            OSError: it cannot be written; the label is what it was.
        """
        image = self.get(image_id)
        if image.label == label:
            return image
        labelled_at = None if label is None else self._now()
        changed = image.model_copy(update={"label": label, "labelled_at": labelled_at})
        record, ring = _encoded(changed), self._rings[image.is_sampled]
        # For as long as both records are there; the oldest image, which goes, may be this one.
        self._make_room(len(record), ring, images=0)
        self.get(image_id)
        self._write(image.record, record)
        ring.put(_Kept(changed, image.file_bytes + len(record)))
        return changed

    def remove(self, image_id: str) -> None:
        """Let one image go.

        Raises:
            ReviewNotFoundError: there is none.
            OSError: its files cannot be removed.
        """
        image = self.get(image_id)
        for name in (image.record, image.file):
            (self._folder / name).unlink(missing_ok=True)
        self._rings[image.is_sampled].pop(image_id)

    def expire(self) -> None:
        """Let all go that are older than the retention."""
        oldest = self._now() - timedelta(seconds=self.limits.retention_s)
        kept = [kept.image for ring in self._rings.values() for kept in ring.kept.values()]
        for image in kept:
            if image.time <= oldest:
                self.remove(image.id)

    def _after_the_last(self, image: ReviewImage) -> ReviewImage:
        """The image, by a moment later where times would be alike: pages of a list end at one."""
        is_too_early = self._last - _STEP < image.time <= self._last
        return image.model_copy(update={"time": self._last + _TICK}) if is_too_early else image

    def _make_room(self, needed: int, ring: _Ring, *, images: int) -> None:
        while ring.kept and len(ring.kept) + images > self.limits.images:
            self.remove(ring.oldest().id)
        while len(self) and self.size_bytes + needed > self.limits.max_bytes:
            largest = max(self._rings.values(), key=lambda ring: ring.size_bytes)
            self.remove(largest.oldest().id)

    def _find(self) -> None:
        found = list(_stored(self._folder))
        whole = {name for kept in found for name in (kept.image.record, kept.image.file)}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if _OURS.fullmatch(entry.name) and entry.name not in whole:
                    os.unlink(entry.path)
        for kept in sorted(found, key=lambda kept: kept.image.time):
            self._rings[kept.image.is_sampled].put(kept)
            self._last = kept.image.time

    def _write(self, name: str, data: bytes) -> None:
        path, partial = self._folder / name, self._folder / (name + _PARTIAL)
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise


@dataclass(frozen=True)
class Export:
    """What became of a sample: copied, not looked at by anybody, left out."""

    images: int
    unlabelled: int
    really_ood: int


def export_sample(folder: Path, out: Path, *, model: str | None = None) -> Export:
    """Copy the sample but for its ``really_ood`` images to a new folder, to calibrate on.

    Only the sample: images that were kept because they are OOD all score below the threshold,
    and a threshold set on them would stand far too low or, mixed in, at no known level.

    Args:
        folder: of the review queue; a service may be using it.
        out: made here, and must not exist.
        model: whose sample; None where there is one model's only.

    Raises:
        ReviewError: there is no sample, or it is not labelled where it has to be.
        OSError: the folder cannot be read, or ``out`` not be written.
    """
    if out.exists():
        raise ReviewError(f"{out} exists; name a new folder")
    sample = _sample_of([kept.image for kept in _stored(folder)], folder, model)
    unlabelled = Counter(image.verdict == "id" for image in sample if image.label is None)
    if unlabelled[False]:
        raise ReviewError(
            f"{unlabelled[False]} of {len(sample)} sampled images were not judged id and have no "
            "label; label them first: only a person knows whether they belong to the ID images"
        )
    taken = [image for image in sample if image.label != "really_ood"]
    partial = out.with_name(out.name + _PARTIAL)
    partial.mkdir(parents=True)
    try:
        copied = sum(_copy(folder / image.file, partial) for image in taken)
        partial.rename(out)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Export(copied, unlabelled[True], len(sample) - len(taken))


def _sample_of(images: Sequence[ReviewImage], folder: Path, model: str | None) -> list[ReviewImage]:
    sample = [image for image in images if image.is_sampled]
    models = sorted({image.model for image in sample})
    if not models or (model is not None and model not in models):
        of_model = "" if model is None else f" of model {model!r}"
        raise ReviewError(
            f"{folder} holds no sampled image{of_model}; NORMGATE_REVIEW_SAMPLE_SHARE is the share "
            "of all images that is sampled"
        )
    if model is None and len(models) > 1:
        raise ReviewError(f"{folder} holds images of several models: {', '.join(models)}; name one")
    return [image for image in sample if image.model == (model or models[0])]


def _copy(file: Path, folder: Path) -> bool:
    """Whether the file was still there; the service lets the oldest go."""
    try:
        shutil.copyfile(file, folder / file.name)
    except FileNotFoundError:
        return False
    return True


def _stored(folder: Path) -> Iterator[_Kept]:
    """The images that are whole, in no order."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _OURS.fullmatch(entry.name)]
    for name in names:
        if name.endswith(".json"):
            with suppress(ValidationError, OSError):
                content = (folder / name).read_bytes()
                image = ReviewImage.model_validate_json(content)
                is_whole = (folder / image.file).stat().st_size == image.file_bytes
                if is_whole and image.record == name:
                    yield _Kept(image, image.file_bytes + len(content))


def _encoded(image: ReviewImage) -> bytes:
    return image.model_dump_json().encode()


def _locked(file: Path) -> int:
    """The descriptor that holds the lock, until it is closed or the process ends."""
    # Not at the top: not every system has it, and only a review queue needs it.
    import fcntl

    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(0, "another process has it as its review folder") from None
    return descriptor
