"""How a problem reads on the wire; light enough for a process that only passes requests on."""

import http
import json
from typing import Final

MEDIA_TYPE: Final = "application/problem+json"


def encode_problem(path: str, *, status: int, detail: str, request_id: str) -> tuple[bytes, str]:
    """The body of a problem, and its media type.

    Under ``/v2`` it is the only kind of error that the protocol's clients can read.
    """
    if path == "/v2" or path.startswith("/v2/"):
        return json.dumps({"error": detail}).encode(), "application/json"
    fields = {
        "type": f"https://www.rfc-editor.org/rfc/rfc9110#status.{status}",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }
    return json.dumps(fields).encode(), MEDIA_TYPE
