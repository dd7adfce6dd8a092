"""What memory costs in time: glibc's allocator and Python's collector, set for a server."""

import ctypes
import gc
import sys
from typing import Final

# <malloc.h>; the same as MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_ and MALLOC_MMAP_THRESHOLD_.
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_GIBIBYTE: Final = 2**30
_NEW_OBJECTS: Final = 20_000


def keep_memory() -> None:
    """Stop the page faults that activations of every forward pass cost otherwise.

    By default each large tensor is mapped and unmapped anew, and the kernel clears its pages
    each time. Elsewhere than on Linux with glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Older versions refuse more than 32 MiB.
        mallopt(_M_MMAP_THRESHOLD, _GIBIBYTE) or mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2 * _GIBIBYTE - 1)
        mallopt(_M_TOP_PAD, _GIBIBYTE // 8)
        # What one thread lets go another can use: kept memory is kept once.
        mallopt(_M_ARENA_MAX, 1)


def collect_rarely() -> None:
    """Leave what exists by now alone, and look for garbage after ``_NEW_OBJECTS`` more at a time.

    To be called when all is imported: a collection that went through that would hold up every
    request meanwhile. Requests leave no cycles behind, so that looking for them after every 700
    objects, as by default, takes the event loop's time and finds nothing.
    """
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)


def return_memory() -> None:
    """Give freed memory back to the system, once: after a whole network has been let go.

    Elsewhere than on Linux with glibc this only collects garbage.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
