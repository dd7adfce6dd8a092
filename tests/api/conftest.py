"""The application with the bundled model, in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / "model_store"


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    """A ready application."""
    app = create_app(Settings(model_store=STORE, max_upload_bytes=1_000_000))
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_until_ready(client)
        yield client


def wait_until_ready(client: TestClient) -> None:
    """Ask until the models are loaded."""
    for _ in range(10_000):
        if client.get("/readyz").status_code == 200:
            return
    raise AssertionError("the application did not become ready")
