"""The cores that this process may use."""

import os


def usable_cores() -> int:
    """How many there are; at least 1."""
    # Those of the process, where the system tells.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
