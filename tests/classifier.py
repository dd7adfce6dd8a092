"""A classifier as a process of its own: it answers with what it received.

Run with ``python -m tests.classifier``; it prints its port.
"""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Classifier(BaseHTTPRequestHandler):
    """Echoes requests as JSON."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        answer = json.dumps(
            {
                "method": self.command,
                "target": self.path,
                "headers": [[name.lower(), value] for name, value in self.headers.items()],
                "sha256": hashlib.sha256(body).hexdigest(),
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), Classifier) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
