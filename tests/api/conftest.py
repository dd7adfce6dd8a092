"""The application with the bundled model, in this process."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / "model_store"
START_S = 60
PAUSE_S = 0.01


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    """A ready application."""
    app = create_app(Settings(model_store=STORE, max_upload_bytes=1_000_000))
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_until_ready(client)
        yield client


def wait_until_ready(client: TestClient) -> None:
    """Ask until the models are loaded."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if client.get("/readyz").status_code == 200:
            return
        # Asked without a pause, it would be busy with answering instead of loading.
        threading.Event().wait(PAUSE_S)
    raise AssertionError("the application did not become ready")
