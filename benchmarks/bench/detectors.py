"""Detectors for the offline loops, by every engine that NormGate can run here."""

from pathlib import Path

from app.core.detector import Detector
from app.store import Bundle, Store


def engines() -> list[str]:
    """The names of the engines that can be asked for."""
    return ["torch"]


class Loader:
    """Makes detectors of one bundle.

    Args:
        store: where the bundle lies.
        model: its name.
        device: that the detectors run on.
    """

    def __init__(self, store: Path, model: str, *, device: str = "cpu") -> None:
        self._device = device
        self._loaded = Store(store).load(model)

    @property
    def bundle(self) -> Bundle:
        """What the detectors are made of."""
        return self._loaded.bundle

    def detector(self, *, engine: str, threads: int) -> Detector:
        """A detector of its own network.

        Args:
            engine: one of :func:`engines`.
            threads: of a forward pass, where the engine keeps threads of its own.
        """
        return self._loaded.detector(device=self._device)
