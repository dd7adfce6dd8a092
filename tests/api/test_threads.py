"""How the service's threads are scheduled."""

import os
import re
import sys
import threading
from contextlib import suppress

import pytest
from fastapi.testclient import TestClient

from tests.pictures import jpeg


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such policy")
def test_computing_threads_are_patient(client: TestClient) -> None:
    """Decoders and workers put no thread aside when they have work; the event loop may.

    One worker, the spare one, gives way to every other thread as well.
    """
    client.post("/v1/score", content=jpeg(1, height=300, width=300)).raise_for_status()

    policies, priorities = {}, {}
    for thread in threading.enumerate():
        # Others may end meanwhile.
        with suppress(ProcessLookupError):
            policies[thread.name] = os.sched_getscheduler(thread.native_id or -1)
            priorities[thread.name] = os.getpriority(os.PRIO_PROCESS, thread.native_id or -1)
    computing = {name for name in policies if name.startswith(("worker-", "decode"))}
    assert {re.match("[a-z]+", name)[0] for name in computing} == {"worker", "decode"}  # type: ignore[index] # all match
    assert {policies[name] for name in computing} == {os.SCHED_BATCH}
    assert {policies[name] for name in policies.keys() - computing} == {os.SCHED_OTHER}
    assert [name for name in priorities if priorities[name] == max(priorities.values())] == [
        "worker-cpu.2"
    ]
