"""The memory budget: never above its limit, and back at nothing when all is let go."""

import threading

import pytest

from app.errors import MemoryBudgetError
from app.serving.budget import MemoryBudget


def test_the_limit_is_reached_and_not_passed() -> None:
    """Exactly the limit fits; a byte more is refused with the numbers and a time to come back."""
    budget = MemoryBudget(100, retry_after_s=lambda: 7)

    with budget.held(60), budget.held(40):
        with pytest.raises(MemoryBudgetError, match="100 bytes are in flight and 1 more") as caught:
            budget.take(1)
        assert caught.value.retry_after_s == 7
        assert budget.used == 100

    assert budget.used == 0


def test_a_holding_grows_and_is_let_go_at_once() -> None:
    """A request that counts its body never holds less than before, and nothing in the end."""
    budget = MemoryBudget(100)
    holding = budget.holding()

    holding.grow_to(30)
    holding.grow_to(80)
    holding.grow_to(50)
    assert budget.used == 80
    with pytest.raises(MemoryBudgetError):
        holding.grow_to(101)
    assert budget.used == 80

    holding.release()
    holding.release()
    assert budget.used == 0


def test_many_threads() -> None:
    """Threads that take and release at once leave nothing behind."""
    budget = MemoryBudget(10)

    def work() -> None:
        for _ in range(1000):
            try:
                with budget.held(3):
                    assert budget.used <= 10
            except MemoryBudgetError:
                continue

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert budget.used == 0
