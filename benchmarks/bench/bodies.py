"""Request bodies in every encoding that a server asks for, as files for wrk to rotate over."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from benchmarks.bench.cases import Load
from benchmarks.peers.framing import pack

Encoding = Literal["raw", "form", "frames", "json", "v2"]

_BOUNDARY: Final = "normgate-benchmark"
_MOST_BODIES: Final = 100


@dataclass(frozen=True)
class Body:
    """One request's body."""

    content_type: str
    data: bytes


def encode(images: Sequence[bytes], encoding: Encoding) -> Body:
    """The images of one request.

    Args:
        images: JPEG files.
        encoding: ``raw`` is the file itself, or a form where there are several; ``form`` has
            ``file`` parts; ``frames`` a length before each file; ``json`` and ``v2`` hold base64.
    """
    return _ENCODERS[encoding](images)


def write_bodies(
    folder: Path, images: Sequence[bytes], *, load: Load, encoding: Encoding
) -> tuple[Path, str]:
    """A folder of bodies ``0``, ``1`` ... and their content type.

    Each image is in at least one of them, as far as ``_MOST_BODIES`` bodies reach.
    """
    target = folder / f"{encoding}-{load.images}"
    target.mkdir(parents=True, exist_ok=True)
    count = min(_MOST_BODIES, max(1, len(images)))
    content_type = ""
    for number in range(count):
        chosen = [images[(number + step) % len(images)] for step in range(load.images)]
        body = encode(chosen, encoding)
        content_type = body.content_type
        (target / str(number)).write_bytes(body.data)
    return target, content_type


def _raw(images: Sequence[bytes]) -> Body:
    return Body("image/jpeg", images[0]) if len(images) == 1 else _form(images)


def _form(images: Sequence[bytes]) -> Body:
    head = (
        f"--{_BOUNDARY}\r\n"
        'Content-Disposition: form-data; name="file"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    ).encode()
    parts = b"".join(head + image + b"\r\n" for image in images)
    return Body(
        f"multipart/form-data; boundary={_BOUNDARY}", parts + f"--{_BOUNDARY}--\r\n".encode()
    )


def _frames(images: Sequence[bytes]) -> Body:
    return Body("application/octet-stream", pack(images))


def _json(images: Sequence[bytes]) -> Body:
    return Body("application/json", json.dumps({"images": _base64(images)}).encode())


def _v2(images: Sequence[bytes]) -> Body:
    tensor = {
        "name": "images",
        "shape": [len(images), 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": _base64(images),
    }
    return Body("application/json", json.dumps({"inputs": [tensor]}).encode())


def _base64(images: Sequence[bytes]) -> list[str]:
    return [base64.b64encode(image).decode("ascii") for image in images]


_ENCODERS: Final[dict[Encoding, Callable[[Sequence[bytes]], Body]]] = {
    "raw": _raw,
    "form": _form,
    "frames": _frames,
    "json": _json,
    "v2": _v2,
}
