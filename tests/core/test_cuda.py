"""What of a GPU's copies needs none: the turns of the threads that use it."""

import threading

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
        while not turns._next.locked():
            assert second.is_alive()
    with turns.turn():
        had.append("first again")
    second.join(DEADLINE_S)

    assert had == ["second", "first again"]


def test_an_error_ends_a_turn() -> None:
    """The next one has its turn."""
    turns = Turns()

    for _ in range(2):
        try:
            with turns.turn():
                raise ValueError
        except ValueError:
            pass

    assert not turns._current.locked()
