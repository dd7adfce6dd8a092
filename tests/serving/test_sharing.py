"""Parts of batches for a spare thread: by what it has of a core."""

import pytest

from app.serving.sharing import Sharing


def measured(of_a_core: float) -> Sharing:
    """After many parts in which the thread had so much of a core."""
    sharing = Sharing()
    for _ in range(50):
        sharing.observe(1, computed_s=of_a_core)
    return sharing


@pytest.mark.parametrize(
    ("of_a_core", "size", "part"),
    [(1, 16, 8), (1, 17, 8), (0.9, 16, 8), (0.8, 100, 44), (0.5, 100, 40), (0, 100, 40)],
)
def test_the_part_grows_with_the_share_of_a_core(of_a_core: float, size: int, part: int) -> None:
    """Half of the batch where the spare thread has a core for itself, two fifths where not."""
    assert measured(of_a_core).part_of(size) == part


@pytest.mark.parametrize(("size", "part"), [(0, 0), (1, 0), (3, 0), (4, 2), (5, 2), (100, 40)])
def test_the_first_part(size: int, part: int) -> None:
    """Nothing is known yet; one item alone is not worth a pass, and half is the most."""
    assert Sharing().part_of(size) == part


def test_one_slow_part_changes_little() -> None:
    """The thread may have been put aside once; only what lasts counts."""
    sharing = measured(1)
    sharing.observe(1, computed_s=0)
    assert sharing.part_of(100) == 43


def test_a_part_that_took_no_time_had_the_core() -> None:
    """Clocks have ticks."""
    sharing = Sharing()
    for _ in range(50):
        sharing.observe(0, computed_s=0)
    assert sharing.part_of(100) == 50
