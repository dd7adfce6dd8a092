"""Content codings of HTTP bodies, RFC 9110 section 8.4: gzip and deflate."""

import gzip
import zlib
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from app.errors import MalformedRequestError, RequestTooLargeError, UnsupportedImageError

Coding = Literal["gzip", "deflate"]

_CODINGS: Final[Sequence[Coding]] = ("gzip", "deflate")
_WINDOW_BITS: Final[Mapping[str, int]] = {
    "gzip": 16 + zlib.MAX_WBITS,
    "x-gzip": 16 + zlib.MAX_WBITS,
    "deflate": zlib.MAX_WBITS,
}
"""What zlib calls the formats; ``deflate`` is a zlib stream, not a bare one."""
_LEVEL: Final = 6


def decode_body(body: bytes, content_encoding: str, *, max_bytes: int) -> bytes:
    """A request's body without its content coding; never more than ``max_bytes`` are held.

    Args:
        body: as it was received.
        content_encoding: the header's value, empty when there is none.
        max_bytes: most bytes of the decoded body.

    Raises:
        MalformedRequestError: the body is not what the header says, or not whole.
        RequestTooLargeError: the decoded body has more than ``max_bytes``.
        UnsupportedImageError: the coding is unknown, or there are several.
    """
    coding = content_encoding.strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in _WINDOW_BITS:
        raise UnsupportedImageError(
            f"content encoding is {content_encoding[:50]!r}; accepted: {', '.join(_CODINGS)}"
        )
    try:
        return _inflate(body, _WINDOW_BITS[coding], max_bytes=max_bytes)
    except zlib.error as error:
        raise MalformedRequestError(f"the body is not {coding}: {error}") from error


def accepted_coding(accept_encoding: str) -> Coding | None:
    """The coding that an ``Accept-Encoding`` header asks for by name; None for no coding."""
    weights: dict[str, float] = {}
    for element in accept_encoding.lower().split(","):
        name, _, parameter = element.partition(";")
        weights[name.strip()] = _weight(parameter)
    best = max(_CODINGS, key=lambda coding: weights.get(coding, 0))
    is_wanted = weights.get(best, 0) > 0 and weights.get(best, 0) >= weights.get("identity", 0)
    return best if is_wanted else None


def encode_body(body: bytes, coding: Coding) -> bytes:
    """A response's body in a content coding."""
    if coding == "gzip":
        return gzip.compress(body, compresslevel=_LEVEL, mtime=0)
    return zlib.compress(body, level=_LEVEL)


def _inflate(body: bytes, window_bits: int, *, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(window_bits)
    # One byte more than the cap tells a body that just fits from one that does not.
    inflated = inflater.decompress(body, max_bytes + 1)
    if len(inflated) > max_bytes:
        raise RequestTooLargeError(
            f"the body decompresses to more than {max_bytes} bytes, the limit"
        )
    if not inflater.eof:
        raise MalformedRequestError("the compressed body ends early")
    if inflater.unused_data:
        raise MalformedRequestError(
            f"{len(inflater.unused_data)} bytes follow the end of the compressed body"
        )
    return inflated


def _weight(parameter: str) -> float:
    name, _, value = parameter.partition("=")
    if name.strip() != "q":
        return 1
    try:
        return float(value)
    except ValueError:
        return 0
