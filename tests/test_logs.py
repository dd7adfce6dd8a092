"""What a process that has configured its logs writes to stderr."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.pictures import jpeg

ROOT = Path(__file__).resolve().parents[1]
START_S = 60


def logged(code: str, *, level: str = "info") -> list[dict[str, Any]]:
    """The lines of a process that configures its logs and runs ``code``."""
    before = f"from app import logs; logs.configure({level!r})\n"
    ended = subprocess.run(
        [sys.executable, "-c", before + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert ended.stdout == ""
    return [json.loads(line) for line in ended.stderr.splitlines()]


def test_a_line() -> None:
    """Time in UTC, severity and event come first, then the context's and the line's fields."""
    [line] = logged(
        "import structlog; structlog.contextvars.bind_contextvars(request_id='abc')\n"
        "structlog.get_logger().info('model activated', model='m', version=2)"
    )

    assert list(line)[:3] == ["timestamp", "level", "event"]
    age = datetime.now(UTC) - datetime.fromisoformat(line.pop("timestamp"))
    assert 0 <= age.total_seconds() < START_S
    assert line == {
        "level": "info",
        "event": "model activated",
        "model": "m",
        "version": 2,
        "request_id": "abc",
    }


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        pytest.param(
            "import logging; logging.getLogger('app.serving.worker').info('%d images', 3)",
            {"level": "info", "event": "3 images", "logger": "app.serving.worker"},
            id="our own logger of the standard library",
        ),
        pytest.param(
            "import logging; logging.getLogger('uvicorn.error').error('bad\\n')",
            {"level": "error", "event": "bad", "logger": "uvicorn.error"},
            id="uvicorn",
        ),
        pytest.param(
            "import warnings; warnings.warn_explicit('old', UserWarning, 'file.py', 7)",
            {"level": "warning", "event": "file.py:7: UserWarning: old", "logger": "py.warnings"},
            id="warning",
        ),
    ],
)
def test_others(code: str, expected: dict[str, Any]) -> None:
    """Whoever writes, a line is one JSON object."""
    [line] = logged(code)

    del line["timestamp"]
    assert line == expected


@pytest.mark.parametrize(
    ("code", "event"),
    [
        pytest.param(
            "import logging\n"
            "try: fail()\n"
            "except ValueError: logging.getLogger('app').exception('failed')",
            "failed",
            id="caught",
        ),
        pytest.param(
            "import threading; threading.Thread(target=fail).start()",
            "uncaught exception in a thread",
            id="thread",
        ),
        pytest.param("fail()", "uncaught exception", id="process"),
        pytest.param(
            "class A:\n    def __del__(self): fail()\nA()",
            "exception that nobody could catch",
            id="destructor",
        ),
        pytest.param(
            "import asyncio, gc\n"
            "async def run():\n"
            "    task = asyncio.create_task(asyncio.to_thread(fail))\n"
            "    await asyncio.wait([task])\n"
            "asyncio.run(run()); gc.collect()",
            "Task exception was never retrieved",
            id="task",
        ),
    ],
)
def test_exceptions(code: str, event: str) -> None:
    """A traceback is a field, without the values of variables."""
    [line] = logged(f"def fail(): image = 'pixels' * 2; raise ValueError('why')\n{code}")

    assert line["event"].startswith(event)
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: why")
    assert "pixelspixels" not in line["exception"]


def test_levels() -> None:
    """Our lines start at the level asked for, others' at warnings: some tell URLs."""
    code = (
        "import logging, structlog\n"
        "for name in ('app', 'httpx'):\n"
        "    logging.getLogger(name).debug(name)\n"
        "    logging.getLogger(name).warning(name)\n"
        "structlog.get_logger().debug('own')\n"
        "structlog.get_logger().error('own')"
    )

    told = {
        level: [(line["event"], line["level"]) for line in logged(code, level=level)]
        for level in ("debug", "info", "error")
    }

    loud = [("app", "warning"), ("httpx", "warning"), ("own", "error")]
    assert told["debug"] == [("app", "debug"), *loud[:2], ("own", "debug"), loud[2]]
    assert told["info"] == loud
    assert told["error"] == loud[2:]


def test_a_reader_that_goes_away() -> None:
    """A closed pipe costs the log and nothing else."""
    code = (
        "import logging, structlog; from app import logs; logs.configure('info')\n"
        "for _ in range(3):\n"
        "    structlog.get_logger().info('x'); logging.getLogger('app').info('x')\n"
        "print('alive', flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stderr.close()
    with process.stdout:
        assert process.stdout.read() == "alive\n"
    process.wait(START_S)


def test_a_bug_in_a_request() -> None:
    """The traceback that the server logs of a request carries the request's id."""
    code = """
import asyncio, socket, httpx, uvicorn
from app.api.request_id import RequestIdMiddleware

async def fail(scope, receive, send):
    raise ValueError('why')

async def run():
    listener = socket.create_server(('127.0.0.1', 0))
    app = RequestIdMiddleware(fail)
    config = uvicorn.Config(app, log_config=None, log_level='warning', lifespan='off')
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    async with httpx.AsyncClient(trust_env=False) as client:
        url = f'http://127.0.0.1:{listener.getsockname()[1]}'
        await client.get(url, headers={'x-request-id': 'abc'})
    server.should_exit = True
    await serving

asyncio.run(run())
"""

    [line] = logged(code)

    assert line["event"] == "Exception in ASGI application"
    assert line["request_id"] == "abc"
    assert line["exception"].endswith("ValueError: why")


def test_the_server() -> None:
    """A server says on stdout where it listens, and everything else on stderr, as JSON."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", "--port", "0", "--shutdown-grace-s", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        found = re.search(r"http://\S+", first)
        assert found is not None
        with httpx.Client(base_url=found[0], trust_env=False) as client:
            client.get("/readyz")
            files = {"file": ("private.jpg", jpeg(1))}
            client.post("/v1/score?x=secret", files=files, headers={"x-request-id": "abc"})
        process.terminate()
        rest, errors = process.communicate(timeout=START_S)
    finally:
        process.kill()
        process.communicate()

    assert rest == ""
    lines = [json.loads(line) for line in errors.splitlines()]
    assert [line["event"] for line in lines] == ["ready", "request", "shutting down", "drained"]
    assert lines[0]["models"] == {"cifar10-resnet18": 1}
    assert (lines[1]["request_id"], lines[1]["path"]) == ("abc", "/v1/score")
    assert "private" not in errors
    assert "secret" not in errors
