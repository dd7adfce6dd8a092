"""What long offline work tells of itself; the terminal shows it, tests ignore it."""

from typing import Protocol


class Progress(Protocol):
    """Told how many files of which pass are done."""

    def __call__(self, title: str, *, done: int, total: int) -> None:
        """``done`` of ``total`` files of the pass called ``title``."""
