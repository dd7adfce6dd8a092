"""Several images in one binary body: each preceded by its length, four bytes, big-endian."""

from collections.abc import Sequence
from typing import Final

_LENGTH: Final = 4


def pack(images: Sequence[bytes]) -> bytes:
    """The body."""
    return b"".join(len(image).to_bytes(_LENGTH) + image for image in images)


def unpack(body: bytes) -> list[bytes]:
    """The images of a body."""
    images, place = [], 0
    while place < len(body):
        start = place + _LENGTH
        place = start + int.from_bytes(body[start - _LENGTH : start])
        images.append(body[start:place])
    return images
