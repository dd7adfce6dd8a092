"""Decoding beside the event loop: bounded threads, and a lane of their own for large images.

Tiny JPEGs are decoded in the loop: handing them over would cost several times as much.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypedDict

from torch import Tensor

from app.core.cores import compute_patiently
from app.core.images import (
    ImageHeader,
    Preprocessing,
    load_accepted,
    read_header,
    read_plain_header,
)
from app.errors import DeadlineExceededError, ImageError, ServingError
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


class Decoding:
    """One image on its way through the threads."""

    def __init__(self) -> None:
        self._step: Callable[[], None] | None = None
        self._is_cancelled = False

    def cancel(self) -> None:
        """Let the image go, where it still waits for a thread."""
        self._is_cancelled = True
        self._step = None

    def go_on(self, threads: ThreadPoolExecutor, step: Callable[[], None]) -> None:
        """Have its next step run in one of ``threads``."""
        if not self._is_cancelled:
            # Not in the threads' own queue: what is cancelled there stays until its turn.
            self._step = step
            threads.submit(self._run)

    def _run(self) -> None:
        step, self._step = self._step, None
        if step is not None and not self._is_cancelled:
            step()


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
        decoded: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        decoding = self.start(
            data,
            preprocessing,
            deadline=deadline,
            then=partial(_settle, decoded, decoded.set_result),
            otherwise=partial(_settle, decoded, decoded.set_exception),
        )
        try:
            return await decoded
        finally:
            decoding.cancel()
            del decoded  # an error in it leads back to this frame

    def start(
        self,
        data: bytes,
        preprocessing: Preprocessing,
        *,
        deadline: float,
        then: Callable[[Tensor], None],
        otherwise: Callable[[Exception], None],
        then_here: Callable[[Tensor], None] | None = None,
    ) -> Decoding:
        """Decode an image and hand it on where that happens, past the event loop.

        Args:
            data: an image file.
            preprocessing: of the model.
            deadline: on the clock of ``time.monotonic``; what is late is not decoded.
            then: takes the image, in the thread that decoded it.
            then_here: takes a tiny one, before this returns; ``then`` by default.
            otherwise: takes what :meth:`decode` or ``then`` raises, likewise.
        """
        try:
            _check_deadline(deadline)
            if tiny := self._tiny(data, preprocessing):
                (then_here or then)(load_accepted(data, tiny, preprocessing))
                return Decoding()
        except Exception as error:
            otherwise(_bare(error))
            return Decoding()
        decoding = Decoding()

        def begin() -> Tensor | None:
            _check_deadline(deadline)
            header = read_header(data, **self._limits)
            scaled = preprocessing.scaled_pixels(header.width, header.height)
            finish = partial(self._finish, data, header, preprocessing, deadline)
            if max(header.pixels, scaled) <= LARGE_PIXELS:
                return finish()
            decoding.go_on(self._large, partial(_hand_on, finish, then, otherwise))
            return None

        decoding.go_on(self._small, partial(_hand_on, begin, then, otherwise))
        return decoding

    def shutdown(self) -> None:
        """End the threads, once what they do is done."""
        self._small.shutdown()
        self._large.shutdown()

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


def _hand_on(
    make: Callable[[], Tensor | None],
    then: Callable[[Tensor], None],
    otherwise: Callable[[Exception], None],
) -> None:
    """Hand on what was made, if this was the step that makes it, or why it was not."""
    try:
        if (image := make()) is not None:
            then(image)
    except Exception as error:
        otherwise(_bare(error))


def _bare(error: Exception) -> Exception:
    """An error that clients are told of without its frames: they hold the upload and lead to it."""
    if isinstance(error, ImageError | ServingError):
        error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def _settle(future: asyncio.Future[Any], settle: Callable[[Any], None], value: Any) -> None:
    """Settle a future from another thread, unless somebody has by then."""

    def settle_now() -> None:
        if not future.done():
            settle(value)

    future.get_loop().call_soon_threadsafe(settle_now)


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
