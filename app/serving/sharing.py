"""How a batch is shared with a spare thread, which gives way to the others."""

from typing import Final

_LEAST: Final = 2
"""Items of a part that is worth a pass of its own."""
_SHARE: Final = 0.4
"""Of a batch, while others need the cores as well; half of it where they do not."""
_LATEST_WEIGHT: Final = 0.25
"""Of a part in the moving average of what the spare thread has of a core."""


class Sharing:
    """The part of a batch that is left to a spare thread.

    What it has of a core changes with all that runs there, so that it is measured at every part.
    """

    def __init__(self) -> None:
        self._of_a_core = 0.0

    def part_of(self, size: int) -> int:
        """How many of ``size`` items are for a spare thread that is free; 0 for so few."""
        share = max(_SHARE, self._of_a_core / (1 + self._of_a_core))
        part = min(round(share * size), size // 2)
        return part if part >= _LEAST else 0

    def observe(self, seconds: float, *, computed_s: float) -> None:
        """A part took so long, of which the spare thread had a core for so long."""
        of_a_core = min(1.0, computed_s / seconds) if seconds > 0 else 1.0
        self._of_a_core += _LATEST_WEIGHT * (of_a_core - self._of_a_core)
