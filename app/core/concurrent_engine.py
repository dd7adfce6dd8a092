"""An engine for several threads: passes beside each other share the cores."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from app.core.engines import Engine, EngineName, Outputs


class ConcurrentEngine:
    """One engine for a pass that begins when no other runs, one for all that begin beside others.

    Args:
        alone: takes all the cores.
        beside: takes its share of them; its passes may run at once.
    """

    def __init__(self, *, alone: Engine, beside: Engine) -> None:
        self.name: EngineName = alone.name
        self._alone = alone
        self._beside = beside
        self._lock = threading.Lock()
        self._running = 0

    def run(self, images: Tensor) -> Outputs:
        """As :meth:`app.core.engines.Engine.run`."""
        with self._turn() as engine:
            return engine.run(images)

    def run_to_block(self, images: Tensor) -> Tensor:
        """As :meth:`app.core.engines.Engine.run_to_block`."""
        with self._turn() as engine:
            return engine.run_to_block(images)

    @contextmanager
    def _turn(self) -> Iterator[Engine]:
        with self._lock:
            engine = self._beside if self._running else self._alone
            self._running += 1
        try:
            yield engine
        finally:
            with self._lock:
                self._running -= 1
