"""What a forward pass takes of the processor."""

import errno
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.core.cores import (
    compute_behind_others,
    compute_patiently,
    current_core,
    images_a_pass,
    keep_off,
    patient_threads,
    threads_a_pass,
    usable_cores,
)

IS_LINUX = sys.platform == "linux"


@pytest.mark.parametrize(("side", "images"), [(32, 196), (224, 4), (225, 3), (448, 1), (4096, 1)])
def test_images_a_pass(side: int, images: int) -> None:
    """As many as have the pixels of four photographs; one always."""
    assert images_a_pass(side) == images


def test_threads_a_pass() -> None:
    """Tiny images are not shared among threads; larger ones take every core."""
    assert [threads_a_pass(side) for side in (32, 64)] == [1, 1]
    assert threads_a_pass(224) == usable_cores() >= 1


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
@pytest.mark.skipif(not IS_LINUX, reason="other systems have no such policy")
def test_a_policy_that_is_refused(monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    """A sandbox that refuses the policy, in whatever way, leaves all as it was."""

    def refuse(*arguments: object) -> None:
        raise OSError(refusal, "refused")

    before = os.sched_getscheduler(0)
    for call in ("sched_setscheduler", "sched_getscheduler"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, refuse)
            compute_patiently()
            with patient_threads():
                pass
        assert os.sched_getscheduler(0) == before


@pytest.mark.skipif(not IS_LINUX, reason="other systems have no such policy")
def test_patient_threads() -> None:
    """A patient thread and those it starts are scheduled in batches; others are as before."""
    with ThreadPoolExecutor(1, initializer=compute_patiently) as pool:
        assert pool.submit(os.sched_getscheduler, 0).result() == os.SCHED_BATCH
    with patient_threads(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(os.sched_getscheduler, 0).result() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def priority() -> int:
    """Of the calling thread, as Linux counts: more is lower."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(not IS_LINUX, reason="elsewhere threads have no priority of their own")
def test_threads_behind_others() -> None:
    """The thread has a lower priority, and no other has."""
    before = priority()
    with ThreadPoolExecutor(1, initializer=compute_behind_others) as pool:
        assert pool.submit(priority).result() == before + 5
    assert priority() == before


@pytest.mark.skipif(not IS_LINUX, reason="elsewhere threads have no priority of their own")
def test_a_priority_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread computes all the same."""

    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "refused")

    monkeypatch.setattr(os, "setpriority", refuse)
    with ThreadPoolExecutor(1, initializer=compute_behind_others) as pool:
        assert pool.submit(priority).result() == priority()


@pytest.mark.skipif(not IS_LINUX, reason="elsewhere a thread's cores are not to be chosen")
def test_a_thread_that_is_kept_off_a_core() -> None:
    """It has all other cores, and no other thread has fewer; of one core it has that."""
    cores = os.sched_getaffinity(0)
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(threading.get_native_id).result()
        core = pool.submit(current_core).result()
        assert core in cores

        for kept_off in (core, min(cores), max(cores)):
            assert kept_off is not None
            keep_off(kept_off, thread)
            assert os.sched_getaffinity(thread) == (cores - {kept_off} or cores)

    assert os.sched_getaffinity(0) == cores


@pytest.mark.skipif(not IS_LINUX, reason="elsewhere a thread's cores are not to be chosen")
def test_an_affinity_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread runs where it ran."""
    before = os.sched_getaffinity(0)

    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "refused")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    keep_off(min(before), threading.get_native_id())

    assert os.sched_getaffinity(0) == before
