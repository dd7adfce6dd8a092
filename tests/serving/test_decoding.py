"""Decoding: large images have a lane of their own, late and unaffordable ones are not decoded."""

import asyncio
import queue
import threading
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any

import numpy as np
import pytest
import simplejpeg
from torch import Tensor

from app.core.images import Preprocessing, load
from app.core.networks import CIFAR_PREPROCESSING
from app.errors import (
    DeadlineExceededError,
    ImageTooLargeError,
    MemoryBudgetError,
    UndecodableImageError,
)
from app.serving.budget import MemoryBudget
from app.serving.decoding import Decoders
from app.settings import Settings
from tests.pictures import encoded, jpeg

NEVER = float("inf")
LINE = jpeg(1, height=1, width=5000)
HELD_WIDTH = 250
"""An eighth of the large image."""
LARGE = simplejpeg.encode_jpeg(np.zeros((2001, 2000, 3), dtype=np.uint8))
DEADLINE_S = 30


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario to its end, or fail."""
    asyncio.run(asyncio.wait_for(scenario, DEADLINE_S))


def decoders(*, budget: int = 2**30, **settings: Any) -> Decoders:
    """Decoders with a budget of their own."""
    return Decoders(Settings.read(settings), MemoryBudget(budget))


def test_what_is_decoded_is_what_is_loaded_offline() -> None:
    """Both lanes give the pixels that calibration saw."""

    async def scenario() -> None:
        pool = decoders()
        for data in (jpeg(1), LARGE):
            image = await pool.decode(data, CIFAR_PREPROCESSING, deadline=NEVER)
            assert image.equal(load(data, CIFAR_PREPROCESSING))
        pool.shutdown()

    run(scenario())


def test_tiny_images_need_no_thread() -> None:
    """An image as small as a network's input is decoded at once, in the loop."""

    async def scenario() -> None:
        pool = decoders()
        pool.shutdown()
        image = await pool.decode(jpeg(1), CIFAR_PREPROCESSING, deadline=NEVER)
        assert image.equal(load(jpeg(1), CIFAR_PREPROCESSING))
        with pytest.raises(RuntimeError, match="shutdown"):
            await pool.decode(jpeg(1, height=65, width=64), CIFAR_PREPROCESSING, deadline=NEVER)

    run(scenario())


@pytest.mark.parametrize(
    "data", [encoded(1, "PNG"), jpeg(1, height=1, width=64), jpeg(1, height=64, width=1)]
)
def test_tiny_files_that_may_cost_much(data: bytes) -> None:
    """A PNG may hold megabytes of compressed text, a line is scaled to many: not in the loop."""

    async def scenario() -> None:
        pool = decoders()
        image = await pool.decode(data, CIFAR_PREPROCESSING, deadline=NEVER)
        assert image.equal(load(data, CIFAR_PREPROCESSING))
        pool.shutdown()
        with pytest.raises(RuntimeError, match="shutdown"):
            await pool.decode(data, CIFAR_PREPROCESSING, deadline=NEVER)

    run(scenario())


def test_scaling_counts_against_the_budget() -> None:
    """What a long thin image is scaled to needs room too; one that is too long is no image."""

    async def scenario() -> None:
        budget = MemoryBudget(2**20)
        pool = Decoders(Settings(), budget)
        await pool.decode(jpeg(1, height=1, width=100), CIFAR_PREPROCESSING, deadline=NEVER)
        with pytest.raises(MemoryBudgetError):
            await pool.decode(jpeg(1, height=1, width=200), CIFAR_PREPROCESSING, deadline=NEVER)
        with pytest.raises(ImageTooLargeError):
            await pool.decode(jpeg(1, height=1, width=50_000), CIFAR_PREPROCESSING, deadline=NEVER)
        assert budget.used == 0
        pool.shutdown()

    run(scenario())


def test_a_scaled_decode_needs_less_of_the_budget() -> None:
    """Six bytes of coefficients a pixel of the file, and three of RGB a pixel that is decoded.

    Its pixels are those of calibration.
    """
    scaled = CIFAR_PREPROCESSING.model_copy(update={"scaled_decode": True})
    data = jpeg(1, height=600, width=801)
    needed = 6 * 600 * 801 + 3 * 75 * 101

    async def scenario() -> None:
        pool, short = decoders(budget=needed), decoders(budget=needed - 1)
        image = await pool.decode(data, scaled, deadline=NEVER)
        assert image.equal(load(data, scaled))
        for one, whole in ((short, scaled), (pool, CIFAR_PREPROCESSING)):
            with pytest.raises(MemoryBudgetError):
                await one.decode(data, whole, deadline=NEVER)
        pool.shutdown()
        short.shutdown()

    run(scenario())


class Held(Preprocessing):
    """A preprocessing that holds every large image until it is let go."""

    def resize_and_crop(self, pixels: Any, **options: Any) -> Any:
        """As usual, once large images may pass."""
        if pixels.shape[1] >= HELD_WIDTH:
            assert _may_pass.wait(DEADLINE_S)
        return super().resize_and_crop(pixels, **options)


_may_pass = threading.Event()


@pytest.mark.parametrize(
    ("large", "is_scaled"),
    [(LARGE, False), (LINE, False), (LARGE, True)],
    ids=["large", "line", "decoded at a scale"],
)
def test_large_images_do_not_starve_small_ones(large: bytes, is_scaled: bool) -> None:
    """However many images, large or large when scaled, are stuck, a small one is decoded."""
    _may_pass.clear()
    held = Held(**(CIFAR_PREPROCESSING.model_dump() | {"scaled_decode": is_scaled}))

    async def scenario() -> None:
        pool = decoders(decode_threads=1)
        stuck = [asyncio.ensure_future(pool.decode(large, held, deadline=NEVER)) for _ in range(10)]
        for seed in range(5):
            await pool.decode(jpeg(seed), held, deadline=NEVER)
        assert not any(task.done() for task in stuck)
        _may_pass.set()
        await asyncio.gather(*stuck)
        pool.shutdown()

    run(scenario())


@pytest.mark.parametrize("data", [jpeg(1), jpeg(1, height=72, width=72), LARGE])
def test_an_image_is_handed_on_where_it_was_decoded(data: bytes) -> None:
    """Small and large in their threads, a tiny one in the caller's; whatever goes wrong is told."""
    taken: queue.Queue[tuple[str, Any]] = queue.Queue()

    def take(image: Tensor) -> None:
        taken.put((threading.current_thread().name, image))

    def refuse(image: Tensor) -> None:
        raise RuntimeError("no room")

    def told(error: Exception) -> None:
        taken.put((threading.current_thread().name, error))

    pool = decoders()
    for file, then in ((data, take), (data[:-20], take), (data, refuse)):
        pool.start(file, CIFAR_PREPROCESSING, deadline=NEVER, then=then, otherwise=told)
        thread, found = taken.get(timeout=DEADLINE_S)
        expected = {len(LARGE): "decode-large_", len(jpeg(1)): threading.current_thread().name}
        assert thread.startswith(expected.get(len(data), "decode_"))
        if file != data:
            assert isinstance(found, UndecodableImageError)
        elif then is take:
            assert found.equal(load(data, CIFAR_PREPROCESSING))
        else:
            assert str(found) == "no room"
    pool.shutdown()


def test_what_nobody_waits_for_is_not_decoded() -> None:
    """A cancelled image leaves the queue of either lane."""
    _may_pass.clear()
    held = Held(**CIFAR_PREPROCESSING.model_dump())
    pool, taken = decoders(decode_threads=1), queue.SimpleQueue[int]()

    def note(number: int, image: Tensor) -> None:
        taken.put(number)

    jobs = [
        pool.start(
            data,
            held,
            deadline=NEVER,
            then=partial(note, number),
            otherwise=lambda error: taken.put(-1),
        )
        for number, data in enumerate([LARGE, LARGE, jpeg(1, height=72, width=72)])
    ]

    assert taken.get(timeout=DEADLINE_S) == 2
    jobs[1].cancel()
    _may_pass.set()
    assert taken.get(timeout=DEADLINE_S) == 0
    pool.shutdown()
    assert taken.empty()


def test_late_images_are_not_decoded() -> None:
    """An image whose turn comes after its deadline costs nothing more."""

    async def scenario() -> None:
        pool = decoders()
        with pytest.raises(DeadlineExceededError):
            await pool.decode(b"not even looked at", CIFAR_PREPROCESSING, deadline=time.monotonic())
        pool.shutdown()

    run(scenario())


def test_pixels_count_against_the_budget() -> None:
    """An image whose pixels do not fit is refused; the budget is as before, also after errors.

    Tiny images do not count: they are decoded one at a time, in the event loop.
    """

    async def scenario() -> None:
        budget = MemoryBudget(9 * 72 * 72)
        pool = Decoders(Settings(), budget)
        fitting = jpeg(1, height=72, width=72)
        await pool.decode(fitting, CIFAR_PREPROCESSING, deadline=NEVER)
        with pytest.raises(MemoryBudgetError):
            await pool.decode(jpeg(1, height=73, width=72), CIFAR_PREPROCESSING, deadline=NEVER)
        with pytest.raises(UndecodableImageError):
            await pool.decode(fitting[:-50], CIFAR_PREPROCESSING, deadline=NEVER)
        with budget.held(9 * 72 * 72):
            await pool.decode(jpeg(1), CIFAR_PREPROCESSING, deadline=NEVER)
        assert budget.used == 0
        pool.shutdown()

    run(scenario())
