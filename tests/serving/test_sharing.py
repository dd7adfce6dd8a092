"""Parts of batches for a spare thread: by what it has of a core, none where it starves."""

import pytest

from app.serving.sharing import Sharing


class Clock:
    """A clock that stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        """The time it shows."""
        return self.now


def test_the_first_part_is_small() -> None:
    """Nothing is known yet of what is left of the cores."""
    assert Sharing().part_of(100) == 2


@pytest.mark.parametrize(
    ("of_a_core", "size", "part"),
    [(1.0, 16, 8), (1.0, 17, 8), (0.9, 16, 8), (0.5, 20, 8), (0.15, 20, 8), (0.15, 5, 2)],
)
def test_the_part_grows_with_the_share_of_a_core(of_a_core: float, size: int, part: int) -> None:
    """Half of the batch where the spare thread has a core for itself, two fifths where not."""
    sharing = Sharing(clock=Clock())
    sharing.observe(1, computed_s=of_a_core)
    assert sharing.part_of(size) == part


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_few_items_are_not_shared(size: int) -> None:
    """One alone is not worth a pass, and more than half is not left."""
    assert Sharing().part_of(size) == 0


def test_a_starved_thread_is_left_nothing_for_a_while() -> None:
    """Then a small part again; once it has the core, as much as any."""
    clock = Clock()
    sharing = Sharing(clock=clock)
    sharing.observe(1, computed_s=0.05)
    assert sharing.part_of(100) == 0
    clock.now = 0.99
    assert sharing.part_of(100) == 0
    clock.now = 1
    assert sharing.part_of(100) == 2
    for _ in range(20):
        sharing.observe(0.001, computed_s=0.001)
    assert sharing.part_of(100) == 50


def test_one_slow_part_does_not_stop_the_sharing() -> None:
    """The thread may have been put aside once; only what lasts counts."""
    sharing = Sharing(clock=Clock())
    sharing.observe(1, computed_s=0.8)
    sharing.observe(1, computed_s=0.0)
    assert sharing.part_of(100) == 40


def test_a_part_that_took_no_time_had_the_core() -> None:
    """Clocks have ticks."""
    sharing = Sharing(clock=Clock())
    sharing.observe(0, computed_s=0)
    assert sharing.part_of(100) == 50
