"""What a forward pass takes of the processor."""

import pytest

from app.core.cores import images_a_pass, threads_a_pass, usable_cores


@pytest.mark.parametrize(("side", "images"), [(32, 196), (224, 4), (225, 3), (448, 1), (4096, 1)])
def test_images_a_pass(side: int, images: int) -> None:
    """As many as have the pixels of four photographs; one always."""
    assert images_a_pass(side) == images


def test_threads_a_pass() -> None:
    """Tiny images are not shared among threads; larger ones take every core."""
    assert [threads_a_pass(side) for side in (32, 64)] == [1, 1]
    assert threads_a_pass(224) == usable_cores() >= 1
