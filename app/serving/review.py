"""The review queue: images found out-of-distribution, kept for people to look at and label.

A thread of its own writes them. What it cannot keep up with is dropped and counted, so that no
request waits for the disk or fails because of it.
"""

import asyncio
import csv
import io
import random
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Final, TypeVar, get_args

import numpy as np
import simplejpeg
import structlog
from PIL import Image

from app.core.images import decode_accepted, read_header
from app.errors import NotReadyError, SettingsError
from app.serving.budget import MemoryBudget
from app.serving.decoding import decoded_bytes
from app.serving.metrics import Metrics, ReviewDropReason
from app.serving.review_folder import SUFFIXES, Label, Limits, ReviewFolder, ReviewImage
from app.serving.worker import Detection
from app.settings import Settings
from app.store import Bundle

logger: Final = structlog.get_logger(__name__)

T = TypeVar("T")

THUMBNAIL_SIDE: Final = 256
LABELS_HEADER: Final = (
    *("id", "time", "model", "version", "score", "threshold", "p_value"),
    *("verdict", "label", "labelled_at"),
)
_DROP_REASONS: Final[tuple[ReviewDropReason, ...]] = get_args(ReviewDropReason)
_PENDING_IMAGES: Final = 64
_PENDING_BYTES: Final = 2**26
"""Most that waits to be written; images that are not of the sample may take up half of it."""
_WRITES_A_SECOND: Final = 100
"""Images that are not of the sample: a flood of them, all writing, would slow requests down."""
_LONGEST_LABEL: Final = 200
_EXPIRY_S: Final = 60.0
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


class Intake:
    """How much may wait to be written, and how fast it may come. Safe in any thread.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._images = 0
        self._bytes = 0
        self._paced_until = clock()

    def take(self, size_bytes: int, *, is_sampled: bool) -> bool:
        """Whether an image may be written; if so, it waits until it is released."""
        with self._lock:
            if not self._has_room(size_bytes, share=1 if is_sampled else 2):
                return False
            if not (is_sampled or self._is_paced()):
                return False
            self._images += 1
            self._bytes += size_bytes
            return True

    def release(self, size_bytes: int) -> None:
        """An image waits no more."""
        with self._lock:
            self._images -= 1
            self._bytes -= size_bytes

    def _has_room(self, size_bytes: int, *, share: int) -> bool:
        if not self._images:
            return True
        has_bytes = self._bytes + size_bytes <= _PENDING_BYTES // share
        return has_bytes and self._images < _PENDING_IMAGES // share

    def _is_paced(self) -> bool:
        now = self._clock()
        ahead = self._paced_until - now
        if ahead * _WRITES_A_SECOND >= _PENDING_IMAGES:
            return False
        self._paced_until = max(now, self._paced_until) + 1 / _WRITES_A_SECOND
        return True


class ReviewQueue:
    """Takes in what was scored, and lets people see, label and remove what is kept of it.

    Args:
        settings: which folder, how much, which shares.
        metrics: told of labels and of what was dropped.
        budget: thumbnails hold their pixels in it while they are drawn.
        draw: uniform in [0, 1); decides which images are kept.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        budget: MemoryBudget,
        *,
        draw: Callable[[], float] = random.random,
    ) -> None:
        assert settings.review_folder is not None
        self._settings = settings
        self._metrics = metrics
        self._budget = budget
        self._draw = draw
        limits = Limits(
            images=settings.review_images,
            max_bytes=settings.review_max_bytes,
            retention_s=settings.review_retention_s,
        )
        self._folder = ReviewFolder(settings.review_folder, limits)
        self._intake = Intake()
        # One thread: whoever wants something of the folder waits its turn.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="review")
        self._thumbnails = ThreadPoolExecutor(1, thread_name_prefix="thumbnail")
        self._opening = threading.Lock()
        self._is_open = False
        self._is_failing = False
        self._dropped = {reason: metrics.review_dropped.labels(reason) for reason in _DROP_REASONS}
        metrics.review_images.set_function(lambda: len(self._folder))
        metrics.review_bytes.set_function(lambda: self._folder.size_bytes)

    def open(self) -> None:
        """Find again what the folder holds. Blocks.

        Raises:
            SettingsError: the folder cannot be used.
        """
        try:
            self._disk.submit(self._folder.open).result()
        except OSError as error:
            raise SettingsError(
                f"NORMGATE_REVIEW_FOLDER is {str(self._settings.review_folder)!r}: "
                f"{error.strerror or error}"
            ) from error
        self._is_open = True

    def close(self) -> None:
        """Write what still waits, and let the folder go. Blocks."""
        with self._opening:
            self._is_open = False
        self._disk.submit(self._folder.close)
        self._disk.shutdown()
        self._thumbnails.shutdown()

    async def watch(self) -> None:
        """Let images go when their time is over, for ever."""
        while True:
            await asyncio.sleep(min(_EXPIRY_S, self._settings.review_retention_s))
            if self._is_open:
                await self._in_turn(lambda: None)

    def offer(self, bundle: Bundle, data: bytes, detection: Detection) -> None:
        """Keep an image if it is odd, or drawn for the sample, and there is room. Never blocks.

        Args:
            bundle: of the model that scored it.
            data: the file as it was uploaded.
            detection: what was found.
        """
        is_sampled = self._draw() < self._settings.review_sample_share
        is_picked = detection.is_ood and self._draw() < self._settings.review_share
        if not (is_sampled or is_picked):
            return
        if len(data) > self._folder.limits.max_image_bytes:
            self._drop("too_large")
        elif not self._intake.take(len(data), is_sampled=is_sampled):
            self._drop("busy")
        else:
            now = datetime.now(UTC)
            with self._opening:
                if self._is_open:
                    self._disk.submit(self._keep, bundle, data, detection, is_sampled, now)

    async def images(self) -> list[ReviewImage]:
        """All that are kept, newest first."""
        return await self._in_turn(self._folder.images)

    async def label(self, image_id: str, label: Label | None) -> ReviewImage:
        """The image with its label; see :meth:`ReviewFolder.label`."""
        return await self._in_turn(lambda: self._label(image_id, label))

    async def remove(self, image_id: str) -> None:
        """Let one image go; see :meth:`ReviewFolder.remove`."""
        await self._in_turn(lambda: self._folder.remove(image_id))

    async def thumbnail(self, image_id: str) -> bytes:
        """A JPEG of at most ``THUMBNAIL_SIDE`` pixels a side.

        Raises:
            ReviewNotFoundError: there is no such image.
            MemoryBudgetError: there is no memory for its pixels.
        """
        data = await self._in_turn(lambda: self._folder.read(image_id))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thumbnails, self._shrink, data)

    async def labels_csv(self) -> str:
        """The labelled images as CSV, newest first; ``LABELS_HEADER`` names the columns."""
        return await self._in_turn(lambda: _as_csv(self._folder.images()))

    async def _in_turn(self, work: Callable[[], T]) -> T:
        if not self._is_open:
            raise NotReadyError("the review queue is not open yet, or the service is shutting down")

        def expire_and_work() -> T:
            self._expire()
            return work()

        return await asyncio.get_running_loop().run_in_executor(self._disk, expire_and_work)

    def _keep(
        self, bundle: Bundle, data: bytes, detection: Detection, is_sampled: bool, now: datetime
    ) -> None:
        try:
            self._folder.add(
                self._describe(bundle, data, detection, is_sampled=is_sampled, now=now), data
            )
        except Exception as error:  # the queue must outlive every image
            self._drop("failed")
            self._tell(error)
        else:
            self._is_failing = False
        finally:
            self._intake.release(len(data))

    def _describe(
        self, bundle: Bundle, data: bytes, detection: Detection, *, is_sampled: bool, now: datetime
    ) -> ReviewImage:
        header = read_header(
            data,
            max_pixels=self._settings.max_pixels,
            max_scans=self._settings.max_jpeg_scans,
        )
        return ReviewImage.model_validate(
            {
                "id": secrets.token_hex(16),
                "time": now,
                "model": bundle.name,
                "version": bundle.version,
                "score": detection.score,
                "threshold": detection.threshold,
                "p_value": detection.p_value,
                "verdict": detection.verdict,
                "prediction": _prediction(bundle, detection),
                "is_sampled": is_sampled,
                "suffix": SUFFIXES[header.format],
                "width": header.width,
                "height": header.height,
                "file_bytes": len(data),
            }
        )

    def _label(self, image_id: str, label: Label | None) -> ReviewImage:
        before = self._folder.get(image_id).label
        image = self._folder.label(image_id, label)
        if label is not None and label != before:
            self._metrics.review_labels.labels(image.model, str(image.version), label).inc()
        return image

    def _expire(self) -> None:
        try:
            self._folder.expire()
        except OSError as error:
            self._tell(error)

    def _shrink(self, data: bytes) -> bytes:
        header = read_header(
            data,
            max_pixels=self._settings.max_pixels,
            max_scans=self._settings.max_jpeg_scans,
        )
        with self._budget.held(decoded_bytes(header)):
            image = Image.fromarray(decode_accepted(data, header))
            image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        thumbnail: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=85)
        return thumbnail

    def _drop(self, reason: ReviewDropReason) -> None:
        self._dropped[reason].inc()

    def _tell(self, error: Exception) -> None:
        """Log a failure, once until a write succeeds: a full disk stays full."""
        if not self._is_failing:
            self._is_failing = True
            folder = str(self._settings.review_folder)
            logger.warning("review queue cannot write; scoring goes on", folder=folder, error=error)


def _prediction(bundle: Bundle, detection: Detection) -> str | None:
    if detection.logits is None:
        return None
    return bundle.labels[int(detection.logits.argmax())][:_LONGEST_LABEL]


def _as_csv(images: list[ReviewImage]) -> str:
    file = io.StringIO()
    rows = csv.writer(file)
    rows.writerow(LABELS_HEADER)
    for image in images:
        if image.label is not None:
            fields = image.model_dump(mode="json")
            rows.writerow([_cell(fields[name]) for name in LABELS_HEADER])
    return file.getvalue()


def _cell(value: object) -> object:
    """The value, made plain text where a spreadsheet would take it for a formula."""
    is_formula = isinstance(value, str) and value.startswith(_FORMULA)
    return f"'{value}" if is_formula else value
