"""What of a GPU's copies needs none: the turns of the threads that use it."""

import threading
import time

import pytest

from app.core.cuda import Turns

DEADLINE_S = 10


def test_who_waits_goes_before_who_had_a_turn() -> None:
    """Though the first asks again at once, without letting anybody run in between."""
    turns, had = Turns(), list[str]()

    def wait() -> None:
        with turns.turn():
            had.append("second")

    second = threading.Thread(target=wait, daemon=True)
    with turns.turn():
        second.start()
        end = time.monotonic() + DEADLINE_S
        while not turns._next.locked():
            assert time.monotonic() < end
    with turns.turn():
        had.append("first again")
    second.join(DEADLINE_S)

    assert had == ["second", "first again"]


def test_an_error_ends_a_turn() -> None:
    """The next thread may have its own."""
    turns = Turns()

    with pytest.raises(ValueError, match="no images"), turns.turn():
        raise ValueError("no images")

    assert not turns._current.locked()
