"""A cluster that cannot be joined: one line, and soon."""

import time

import pytest

from app.errors import NormGateError
from tests.test_proxy_server import free_port

pytest.importorskip("ray")

from app.distributed.failures import joining, last_line


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address where nobody listens is named at once; Ray itself tries for a minute and more."""
    port = free_port()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    began = time.monotonic()

    with (
        pytest.raises(NormGateError, match=rf"nobody answers at \S+:{port}: \w+") as caught,
        joining(),
    ):
        pytest.fail("it was joined")

    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("address", ["", "local", "ray://127.0.0.1:1"])
def test_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Where a cluster is to be started, or Ray's client has its own way, Ray is let go on."""
    monkeypatch.setenv("RAY_ADDRESS", address)

    with joining():
        pass


@pytest.mark.parametrize(
    ("message", "line"),
    [("a traceback\n  of many lines\nand why\n", "and why"), ("", "ValueError")],
)
def test_last_line(message: str, line: str) -> None:
    """Of a traceback the reason; of an error without words its name."""
    assert last_line(ValueError(message)) == line
