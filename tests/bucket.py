"""A bucket behind a real S3 API on loopback, moto's, whose requests can be seen and held up."""

import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

import s3fs
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

SECRET: Final = "a-s3cret-for-tests"
_NUMBERS: Final = itertools.count()

Answer = tuple[str, str]
"""An HTTP status line and an S3 error code."""


class _QuietHandler(MotoRequestHandler):
    def log_request(self, *_: object) -> None:
        pass


class Bucket:
    """One empty bucket of its own; ``on_request`` may wait, or answer in S3's stead."""

    def __init__(self) -> None:
        self.name = f"normgate-{next(_NUMBERS)}"
        self.url = f"s3://{self.name}/models"
        self.requests: list[tuple[str, str]] = []
        self.on_request: Callable[[str, str], Answer | None] = lambda method, path: None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._port = 0
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a client of the bucket needs to know."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._server = make_server(
            "127.0.0.1", self._port, self._answer, threaded=True, request_handler=_QuietHandler
        )
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """Be gone, with what the bucket holds kept."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def files(self) -> Any:
        """A client that shares nothing with the code under test."""
        return s3fs.S3FileSystem(
            key="tests",
            secret=SECRET,
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def sent(self, method: str, suffix: str) -> int:
        """How many requests there were for what ends so."""
        return sum(verb == method and path.endswith(suffix) for verb, path in self.requests)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        answer = self.on_request(method, path)
        if answer is None:
            found: Iterable[bytes] = self._moto(environ, start_response)
            return found
        status, code = answer
        start_response(status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>{code} it says</Message></Error>".encode()]
