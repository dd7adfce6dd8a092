"""How a batch is shared with a spare thread, which gets what others leave of the cores."""

import time
from collections.abc import Callable
from typing import Final

_LEAST: Final = 2
"""Items of a part that is worth a pass of its own; of the first one, too."""
_SHARE: Final = 0.4
"""Of a batch, while others need the cores as well; half of it where they do not."""
_STARVED: Final = 0.1
"""The share of a core with which a part takes so long that it is better not left."""
_LATEST_WEIGHT: Final = 0.25
"""Of a part in the moving average of that share."""
_REMEMBERED_S: Final = 1.0
"""How long what a spare thread had tells what it would have."""


class Sharing:
    """The part of a batch that is left to a spare thread.

    What it has of a core changes with all that runs there, so that it is measured at every part.
    A spare thread that has next to nothing is left nothing, and tried again with a small part
    after a while.

    Args:
        clock: in seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of_a_core = 0.0
        self._tried_at: float | None = None

    def part_of(self, size: int) -> int:
        """How many of ``size`` items are for a spare thread that is free; 0 where none are."""
        part = _LEAST
        if self._tried_at is not None and self._clock() - self._tried_at < _REMEMBERED_S:
            if self._of_a_core < _STARVED:
                return 0
            part = round(size * max(_SHARE, self._of_a_core / (1 + self._of_a_core)))
        return part if _LEAST <= part <= size // 2 else 0

    def observe(self, seconds: float, *, computed_s: float) -> None:
        """A part took so long, of which the spare thread had a core for so long."""
        of_a_core = min(1.0, computed_s / seconds) if seconds > 0 else 1.0
        if self._tried_at is not None:
            of_a_core = self._of_a_core + _LATEST_WEIGHT * (of_a_core - self._of_a_core)
        self._of_a_core, self._tried_at = of_a_core, self._clock()
