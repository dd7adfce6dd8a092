"""How the service's threads are scheduled."""

import os
import sys
import threading

import pytest
from fastapi.testclient import TestClient

from tests.pictures import jpeg


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such policy")
def test_computing_threads_are_patient(client: TestClient) -> None:
    """Decoders and workers put no thread aside when they have work; the event loop may."""
    client.post("/v1/score", content=jpeg(1, height=300, width=300)).raise_for_status()

    policies = {
        thread.name: os.sched_getscheduler(thread.native_id or 0)
        for thread in threading.enumerate()
    }
    computing = {name: policies.pop(name) for name in list(policies) if _computes(name)}
    assert {name.partition("-")[0].partition("_")[0] for name in computing} == {"worker", "decode"}
    assert set(computing.values()) == {os.SCHED_BATCH}
    assert set(policies.values()) == {os.SCHED_OTHER}


def _computes(name: str) -> bool:
    return name.startswith(("worker-", "decode"))
