"""A budget for the bytes that requests hold: uploads and decoded pixels."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.errors import MemoryBudgetError


class MemoryBudget:
    """Counts bytes in flight and refuses those beyond ``limit``. Safe in any thread.

    Args:
        limit: bytes.
        retry_after_s: when a refused client had better come back.
    """

    def __init__(self, limit: int, *, retry_after_s: Callable[[], int] = lambda: 1) -> None:
        self._limit = limit
        self._retry_after_s = retry_after_s
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes held now."""
        return self._used

    def holding(self) -> "Holding":
        """A share of the budget, empty at first, for one request."""
        return Holding(self)

    @contextmanager
    def held(self, count: int) -> Iterator[None]:
        """Hold ``count`` bytes inside the context.

        Raises:
            MemoryBudgetError: they are too many beside those held already.
        """
        self.take(count)
        try:
            yield
        finally:
            self.release(count)

    def take(self, count: int) -> None:
        """Hold ``count`` bytes until they are released.

        Raises:
            MemoryBudgetError: they are too many beside those held already.
        """
        with self._lock:
            if self._used + count > self._limit:
                raise MemoryBudgetError(
                    f"{self._used} bytes are in flight and {count} more do not fit; "
                    f"the limit is {self._limit}",
                    retry_after_s=self._retry_after_s(),
                )
            self._used += count

    def release(self, count: int) -> None:
        """Let ``count`` bytes go."""
        with self._lock:
            self._used -= count


class Holding:
    """What one request holds of a budget."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._count = 0

    def grow_to(self, count: int) -> None:
        """Hold ``count`` bytes in all; never fewer than before.

        Raises:
            MemoryBudgetError: they are too many beside those held already.
        """
        if count > self._count:
            self._budget.take(count - self._count)
            self._count = count

    def release(self) -> None:
        """Let everything go."""
        self._budget.release(self._count)
        self._count = 0
