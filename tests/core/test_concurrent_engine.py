"""Passes beside each other: each takes its share of the cores, and all give the same scores."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from app.core.concurrent_engine import ConcurrentEngine
from app.core.engines import EngineName, Outputs

DEADLINE_S = 10
IMAGES = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)


class Gate:
    """An engine that tells how many passes it runs, and ends them when it is let go."""

    name: EngineName = "onnxruntime"

    def __init__(self, *, held: bool = False, fails: bool = False) -> None:
        self.passes = 0
        self.has_begun = threading.Event()
        self.may_end = threading.Event()
        self._fails = fails
        if not held:
            self.may_end.set()

    def run(self, images: Tensor) -> Outputs:
        """Nothing, in the end."""
        self.passes += 1
        self.has_begun.set()
        assert self.may_end.wait(DEADLINE_S)
        if self._fails:
            raise RuntimeError("out of memory")
        return Outputs(torch.zeros(len(images)), torch.zeros(len(images), 2))

    def run_to_block(self, images: Tensor) -> Tensor:
        """Nothing, in the end."""
        return self.run(images).feature_norms


def test_one_after_the_other() -> None:
    """A pass that begins when no other runs has all the cores, also after one that failed."""
    alone, beside = Gate(fails=True), Gate()
    engine = ConcurrentEngine(alone=alone, beside=beside)

    for call in (engine.run, engine.run_to_block):
        with pytest.raises(RuntimeError, match="out of memory"):
            call(IMAGES)

    assert (alone.passes, beside.passes, engine.name) == (2, 0, "onnxruntime")


@pytest.mark.parametrize("name", ["run", "run_to_block"])
def test_beside_another(name: str) -> None:
    """While a pass runs, all that begin take the smaller share."""
    alone, beside = Gate(held=True), Gate()
    engine = ConcurrentEngine(alone=alone, beside=beside)
    call: Any = getattr(engine, name)

    with ThreadPoolExecutor() as threads:
        first = threads.submit(engine.run, IMAGES)
        assert alone.has_begun.wait(DEADLINE_S)
        call(IMAGES)
        call(IMAGES)
        alone.may_end.set()
        first.result(DEADLINE_S)
    call(IMAGES)

    assert (alone.passes, beside.passes) == (2, 2)
