"""The cores that this process may use, and what forward passes make of them."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

_PASS_PIXELS: Final = 4 * 224 * 224
"""Images with more pixels in all have activations that leave the caches: MobileNetV3 then takes a
quarter more time an image, or more."""
MOST_PASSES: Final = 2
"""Forward passes under way at once on one device."""
_TINY_SIDE: Final = 64
_LOWER_BY: Final = 5
# Not by a CDLL, which lets the interpreter's lock go for every call.
_sched_getcpu: Final[Callable[[], int] | None] = (
    getattr(ctypes.PyDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None
)


def usable_cores() -> int:
    """How many there are; at least 1."""
    # Those of the process, where the system tells.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def images_a_pass(side: int) -> int:
    """The most square images of ``side`` pixels that one forward pass should take; at least 1."""
    return max(1, _PASS_PIXELS // side**2)


def threads_a_pass(side: int) -> int:
    """How many threads should share a forward pass of images of ``side`` pixels.

    For tiny images one: to part and meet again would cost more than it gives.
    """
    return 1 if are_tiny(side) else usable_cores()


def are_tiny(side: int) -> bool:
    """Whether square images of ``side`` pixels are so small that threads do not share a pass."""
    return side <= _TINY_SIDE


def passes_at_once(threads: int) -> int:
    """How many passes should share so many threads, while there is work for all.

    One at a time takes longer: the threads of a pass wait for each other in every layer.
    """
    return min(threads, MOST_PASSES)


def compute_patiently() -> None:
    """Let the calling thread, and those it starts, interrupt no other when it has work again.

    Linux's batch policy: the share of a core stays the same. The event loop and a pass that is
    under way are then not put aside for the next one, and keep their caches. Elsewhere, where it is
    refused, and where a policy was chosen already, this does nothing.
    """
    # Sandboxes refuse it in their own ways.
    with suppress(OSError):
        if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def compute_behind_others() -> None:
    """Let the calling thread give way to the others, as far as the system lets it.

    On Linux by a lower priority, with which it still has a quarter of a core that another thread
    wants. With the lowest it may be put aside for long while it holds the interpreter's lock, and
    then all wait.
    """
    compute_patiently()
    # Elsewhere threads have no priority of their own, or it has another scale.
    if sys.platform == "linux":
        with suppress(OSError):
            thread = threading.get_native_id()
            before = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, before + _LOWER_BY)


def current_core() -> int | None:
    """The one that the calling thread runs on at the moment, where the system tells."""
    return None if _sched_getcpu is None else _sched_getcpu()


def keep_off(core: int, thread: int) -> None:
    """Have a thread of this process run on the other cores that the process may use, if any.

    A waiting thread stays behind the one whose core it woke on: Linux moves none to a core that
    rests for short times alone, as the event loop's does. Where that is refused this does nothing.

    Args:
        core: of :func:`current_core`.
        thread: its number in the system.
    """
    with suppress(OSError):
        others = os.sched_getaffinity(os.getpid()) - {core}
        if others:
            os.sched_setaffinity(thread, others)


@contextmanager
def patient_threads() -> Iterator[None]:
    """A context whose new threads are as :func:`compute_patiently` makes them."""
    before = _policy()
    compute_patiently()
    try:
        yield
    finally:
        if before is not None and _policy() != before:
            os.sched_setscheduler(0, before, os.sched_param(0))


def _policy() -> int | None:
    with suppress(OSError):
        return os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    return None
