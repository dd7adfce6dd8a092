"""The image and the compose files, as far as they can be checked without a Docker engine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Final

import pytest
from compose_spec import PyCompose, parse_duration

from app.core import allocator
from app.settings import Settings
from tests.test_server import ROOT

DOCKERFILE: Final = (ROOT / "Dockerfile").read_text()
SERVICES: Final = ("normgate", "prometheus", "grafana")


def services(file: str = "docker-compose.yml") -> Mapping[str, Any]:
    """The services of a compose file that keeps to the specification."""
    parsed = PyCompose.from_yaml((ROOT / file).read_text())
    parsed.validate()
    found: Mapping[str, Any] = parsed.to_dict()["services"]
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_services_may_do_little(name: str) -> None:
    """No service is root, gains rights, writes outside its volumes or listens to the network."""
    service = services()[name]

    user, _, group = service["user"].partition(":")
    assert int(user) > 0
    assert group.isdecimal()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(str(port).startswith("127.0.0.1:") for port in service["ports"])
    assert "healthcheck" in service or name == "normgate"


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_is_there(name: str) -> None:
    """Each folder of this repository that a service reads exists, and is mounted read-only."""
    for volume in services()[name].get("volumes", []):
        source, _, rest = str(volume).partition(":")
        if source.startswith("."):
            assert (ROOT / source).is_dir()
            assert rest.endswith(":ro")


def test_versions_are_pinned() -> None:
    """Each image has a version, to the patch."""
    images = [service["image"] for service in services().values()]
    found = re.search(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert found is not None

    for tag in [image.partition(":")[2] for image in images] + [found[1]]:
        assert re.match(r"v?\d+\.\d+\.\d+", tag)


def test_grafana_has_no_default_password() -> None:
    """Without a password of the operator's, ``docker compose up`` says so and starts nothing."""
    password = services()["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"]

    assert password.startswith("${GRAFANA_ADMIN_PASSWORD:?")


def test_the_end_is_given_time() -> None:
    """Before it is killed NormGate may serve on, and answer a request with the longest deadline."""
    settings = Settings()
    needed_s = settings.shutdown_grace_s + settings.max_deadline_ms / 1000

    assert parse_duration(services()["normgate"]["stop_grace_period"]) > needed_s


def test_gpu_override() -> None:
    """It changes the devices of a service that is there, and reserves the GPUs."""
    override = services("docker-compose.gpu.yml")

    assert set(override) <= set(services())
    assert override["normgate"]["environment"] == {"NORMGATE_DEVICES": "auto"}
    [gpus] = override["normgate"]["deploy"]["resources"]["reservations"]["devices"]
    assert (gpus["driver"], gpus["capabilities"]) == ("nvidia", ["gpu"])


def test_allocator() -> None:
    """Glibc's variables hold what the server sets itself where it may."""
    environment = dict(re.findall(r"(MALLOC_\w+)=(\d+)", DOCKERFILE))

    assert environment == {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "MALLOC_TRIM_THRESHOLD_": str(2 * allocator._GIBIBYTE - 1),
        "MALLOC_TOP_PAD_": str(allocator._GIBIBYTE // 8),
    }


def test_the_context_holds_what_is_copied() -> None:
    """The Dockerfile copies nothing that .dockerignore leaves out."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {source for line in lines for source in line.split()}
    let_in = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))

    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)


class _Probe(BaseHTTPRequestHandler):
    """Says of ``/readyz`` what the server that it belongs to is told to."""

    def do_GET(self) -> None:
        assert isinstance(self.server, _Ready)
        self.send_response(self.server.status if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is for failures."""


class _Ready(HTTPServer):
    status: int = 200


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_health_check(status: int, code: int) -> None:
    """The image is healthy exactly while ``/readyz`` is 200."""
    found = re.search(r"HEALTHCHECK .*\\\n +CMD (\[.*\])", DOCKERFILE)
    assert found is not None
    with _Ready(("127.0.0.1", 0), _Probe) as server, ThreadPoolExecutor(1) as pool:
        server.status = status
        answered = pool.submit(server.handle_request)
        ended = subprocess.run(
            [sys.executable, *json.loads(found[1])[1:]],
            env=os.environ | {"NORMGATE_PORT": str(server.server_port)},
            timeout=60,
            check=False,
        )
        answered.result(60)

    assert ended.returncode == code
