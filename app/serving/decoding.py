"""Decoding beside the event loop: bounded threads, and a lane of their own for large images.

Tiny JPEGs are decoded in the loop: handing them over would cost several times as much.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypedDict

from torch import Tensor

from app.core.cores import compute_patiently
from app.core.images import (
    ImageHeader,
    Preprocessing,
    load_accepted,
    read_header,
    read_plain_header,
)
from app.errors import DeadlineExceededError
from app.serving.budget import MemoryBudget
from app.settings import DECODED_BYTES_PER_PIXEL, Settings

LARGE_PIXELS: Final = 4_000_000
"""An image with more, or scaled to more, waits for the lane of the large ones; one frame of 4K has
8.3 million."""
TINY_BYTES: Final = 2**14
TINY_PIXELS: Final = 64 * 64
"""A plain JPEG in so few bytes that has so few pixels, scaled too, is ready in about a tenth of a
millisecond."""
_USUAL_BYTES_PER_PIXEL: Final = 9
"""A progressive JPEG's coefficients, then RGB."""
_COEFFICIENTS_BYTES: Final = 6
"""Of each pixel of the file, at whatever scale it is decoded."""
_RGB_BYTES: Final = 3
_SCALED_BYTES_PER_PIXEL: Final = 6
"""Of the scaled image, beside the decoded one: itself and a copy."""


class _Limits(TypedDict):
    max_pixels: int
    max_scans: int


class Decoders:
    """Two pools of threads: however many large images come, small ones go on being decoded.

    Half as many threads take the large images, at least one; so few of them are in memory as
    pixels at a time.

    Args:
        settings: threads and limits.
        budget: decoded pixels are held in it while they are resized, but for tiny images'.
    """

    def __init__(self, settings: Settings, budget: MemoryBudget) -> None:
        self._limits = _Limits(max_pixels=settings.max_pixels, max_scans=settings.max_jpeg_scans)
        self._budget = budget
        threads = settings.decode_threads
        self._small = _threads(threads, "decode")
        self._large = _threads(max(1, threads // 2), "decode-large")

    async def decode(self, data: bytes, preprocessing: Preprocessing, *, deadline: float) -> Tensor:
        """The network's field of view ``[3, crop, crop]`` uint8.

        Cancelling takes an image that still waits for a thread out of the queue.

        Args:
            data: an image file.
            preprocessing: of the model.
            deadline: on the clock of ``time.monotonic``; what is late is not decoded.

        Raises:
            ImageError: the bytes are not an image that can be scored.
            MemoryBudgetError: there is no memory for its pixels.
            DeadlineExceededError: its turn came after the deadline.
        """
        _check_deadline(deadline)
        if tiny := self._tiny(data, preprocessing):
            # Not held in the budget: it is one at a time, of some kilobytes.
            return load_accepted(data, tiny, preprocessing)
        loop = asyncio.get_running_loop()
        step = await loop.run_in_executor(self._small, self._begin, data, preprocessing, deadline)
        if isinstance(step, Tensor):
            return step
        return await loop.run_in_executor(
            self._large, self._finish, data, step, preprocessing, deadline
        )

    def shutdown(self) -> None:
        """End the threads, once what they do is done."""
        self._small.shutdown()
        self._large.shutdown()

    def _begin(
        self, data: bytes, preprocessing: Preprocessing, deadline: float
    ) -> Tensor | ImageHeader:
        """A small image decoded, or the header of a large one."""
        _check_deadline(deadline)
        header = read_header(data, **self._limits)
        scaled = preprocessing.scaled_pixels(header.width, header.height)
        if max(header.pixels, scaled) > LARGE_PIXELS:
            return header
        return self._finish(data, header, preprocessing, deadline)

    def _tiny(self, data: bytes, preprocessing: Preprocessing) -> ImageHeader | None:
        """The header of a tiny image."""
        if len(data) > TINY_BYTES:
            return None
        header = read_plain_header(data, **self._limits)
        if header is None or header.pixels > TINY_PIXELS:
            return None
        scaled = preprocessing.scaled_pixels(header.width, header.height)
        return header if scaled <= TINY_PIXELS else None

    def _finish(
        self, data: bytes, header: ImageHeader, preprocessing: Preprocessing, deadline: float
    ) -> Tensor:
        _check_deadline(deadline)
        with self._budget.held(_working_bytes(header, preprocessing)):
            return load_accepted(data, header, preprocessing)


def _threads(count: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=compute_patiently)


def decoded_bytes(header: ImageHeader) -> int:
    """What decoding may hold at its peak, as measured."""
    is_usual = header.format != "WEBP" and header.mode != "CMYK"
    return (_USUAL_BYTES_PER_PIXEL if is_usual else DECODED_BYTES_PER_PIXEL) * header.pixels


def _working_bytes(header: ImageHeader, preprocessing: Preprocessing) -> int:
    """What decoding and then scaling may hold at their peak."""
    reduction = preprocessing.reduction(header)
    decoded = _RGB_BYTES * header.reduced(reduction).pixels
    scaled = preprocessing.scaled_pixels(header.width, header.height)
    decoding = decoded_bytes(header)
    if reduction > 1:
        decoding = _COEFFICIENTS_BYTES * header.pixels + decoded
    return max(decoding, decoded + _SCALED_BYTES_PER_PIXEL * scaled)


def _check_deadline(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise DeadlineExceededError("the deadline passed before the image was decoded")
