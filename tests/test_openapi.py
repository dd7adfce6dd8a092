"""The OpenAPI description holds: what the real server answers, whatever it is asked, is in it."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.test_server import STORE, serving

ADMIN_TOKEN: Final = "the-admin-token"
API_KEY: Final = "an-api-key"
SEED: Final = "20251124"
WITHIN_S: Final = 280
CHECKS: Final = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
)
"""Those about credentials are left out: no key is set. So is the acceptance of valid data: no
schema can say which bytes are an image."""
METHODS: Final = ("get", "put", "post", "delete", "options", "head", "patch")
UNLOAD: Final = "/v2/repository/models/{name}/unload"
"""Would take away what the other operations are asked of."""


class _Classifier(BaseHTTPRequestHandler):
    """Whatever it is asked, the classifier behind the proxy has no complaint."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_PUT = do_POST = do_DELETE = do_OPTIONS = do_HEAD = do_PATCH = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


@pytest.fixture(scope="module")
def classifier() -> Iterator[str]:
    """Where a classifier listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Classifier) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(WITHIN_S)


@pytest.mark.slow
def test_every_answer_is_described(classifier: str, tmp_path: Path) -> None:
    """Schemathesis finds no 5xx and no answer that the description does not have."""
    review = ["--review-folder", str(tmp_path / "review"), "--review-sample-share", "1"]
    with serving(["--admin-token", ADMIN_TOKEN, "--upstream-url", classifier, *review]) as server:
        ended = subprocess.run(
            [
                *(str(Path(sys.executable).with_name("st")), "run", f"{server.url}/openapi.json"),
                *("--header", f"X-API-Key: {ADMIN_TOKEN}"),
                # Or else it asks for deadlines that nothing can keep, and 504 is the right answer.
                *("--header", f"X-Request-Deadline-Ms: {1000 * WITHIN_S}"),
                *("--checks", ",".join(CHECKS)),
                *("--phases", "examples,coverage,fuzzing"),
                *("--max-examples", "5", "--seed", SEED, "--mode", "all"),
                *("--exclude-path", UNLOAD),
                *("--request-timeout", "30", "--warnings", "off", "--no-color"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )

    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def guarded() -> Iterator[TestClient]:
    """The application with all its routes, an admin token and an API key; it loads no model."""
    settings = Settings(
        model_store=STORE,
        admin_token=ADMIN_TOKEN,
        api_keys=(API_KEY,),
        upstream_url="http://127.0.0.1:1",
        review_folder=Path("never-opened"),
    )
    client = TestClient(create_app(settings), raise_server_exceptions=False)
    yield client
    client.close()


def operations(client: TestClient) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, path with its parameters filled in, and description of every operation."""
    paths = client.get("/openapi.json").json()["paths"]
    return [
        (method, path.format(name="a", version=1, path="a", id="0" * 32), operation)
        for path, item in paths.items()
        for method, operation in item.items()
        if method in METHODS
    ]


def test_credentials_are_asked_for_where_the_description_says_so(guarded: TestClient) -> None:
    """Without a key: 401, as described, from every operation but the probes and metrics."""
    for method, path, operation in operations(guarded):
        status = guarded.request(method, path).status_code

        assert (status == 401) is ("security" in operation), f"{method} {path}"
        assert ("401" in operation["responses"]) is ("security" in operation), f"{method} {path}"


def test_an_api_key_is_no_admin_token(guarded: TestClient) -> None:
    """What changes the loaded models answers 403 to an API key, and its description has that."""
    asked = [
        (f"{method} {path}", guarded.request(method, path, headers={"X-API-Key": API_KEY}))
        for method, path, operation in operations(guarded)
        if "security" in operation and "403" in operation["responses"] and "/gate" not in path
    ]

    assert len(asked) >= 6
    assert {what: answer.status_code for what, answer in asked} == {what: 403 for what, _ in asked}


def test_the_deadline_is_described(guarded: TestClient) -> None:
    """Whatever scores images says that a request may have a deadline of its own."""
    says_so = {
        path
        for _, path, operation in operations(guarded)
        if "X-Request-Deadline-Ms" in [field["name"] for field in operation.get("parameters", [])]
    }

    assert says_so == {
        *("/v1/score", "/v1/gate", "/v1/gate/a", "/v1/proxy/a"),
        *("/v2/models/a/infer", "/v2/models/a/versions/1/infer"),
    }


def test_what_is_open(guarded: TestClient) -> None:
    """Probes and metrics ask for no credentials, nothing else does without."""
    is_open = {path for _, path, operation in operations(guarded) if "security" not in operation}

    assert is_open == {"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"}
