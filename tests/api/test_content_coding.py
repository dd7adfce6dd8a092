"""Content codings of request and response bodies."""

import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.content_coding import Coding, accepted_coding, decode_body, encode_body
from app.errors import MalformedRequestError, RequestTooLargeError, UnsupportedImageError

RAW_DEFLATE = zlib.compressobj(wbits=-zlib.MAX_WBITS)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@given(body=st.binary(max_size=500))
def test_round_trip(coding: Coding, body: bytes) -> None:
    """What was encoded is decoded again, by us and by the standard library."""
    encoded = encode_body(body, coding)

    assert decode_body(encoded, coding, max_bytes=len(body)) == body
    assert (gzip if coding == "gzip" else zlib).decompress(encoded) == body


@pytest.mark.parametrize("coding", ["", "identity", " Identity "])
def test_no_coding(coding: str) -> None:
    """Without a coding the body is left as it is."""
    assert decode_body(b"as it is", coding, max_bytes=1) == b"as it is"


@pytest.mark.parametrize("coding", ["GZIP", "x-gzip", " gzip "])
def test_names_of_gzip(coding: str) -> None:
    """The name's case does not matter, and an old name is still known."""
    assert decode_body(gzip.compress(b"x"), coding, max_bytes=1) == b"x"


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "x" * 1000])
def test_unknown_codings(coding: str) -> None:
    """A coding we cannot undo is refused, and the message says which we can."""
    with pytest.raises(UnsupportedImageError, match="accepted: gzip, deflate"):
        decode_body(b"", coding, max_bytes=1)


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        pytest.param(b"plain", "gzip", id="not gzip"),
        pytest.param(b"plain", "deflate", id="not deflate"),
        pytest.param(gzip.compress(b"x"), "deflate", id="gzip called deflate"),
        pytest.param(RAW_DEFLATE.compress(b"x") + RAW_DEFLATE.flush(), "deflate", id="bare"),
        pytest.param(gzip.compress(b"whole")[:-1], "gzip", id="without its end"),
        pytest.param(gzip.compress(b"whole")[:-4] + bytes(4), "gzip", id="wrong length"),
        pytest.param(b"", "gzip", id="nothing"),
        pytest.param(gzip.compress(b"x") + b"y", "gzip", id="more behind its end"),
        pytest.param(gzip.compress(b"x") * 2, "gzip", id="two members"),
    ],
)
def test_broken_bodies(body: bytes, coding: str) -> None:
    """A body that is not whole, or not what its header says, is malformed."""
    with pytest.raises(MalformedRequestError):
        decode_body(body, coding, max_bytes=100)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_the_cap(coding: Coding) -> None:
    """The cap is for the decoded body: what just fits is let in, one byte more is not."""
    body = encode_body(bytes(1000), coding)

    assert decode_body(body, coding, max_bytes=1000) == bytes(1000)
    with pytest.raises(RequestTooLargeError, match="999 bytes"):
        decode_body(body, coding, max_bytes=999)


def test_a_bomb_is_never_held() -> None:
    """Of 100 MB in 100 kB no more than the cap comes to be in memory."""
    bomb = gzip.compress(bytes(100_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(RequestTooLargeError):
            decode_body(bomb, "gzip", max_bytes=1_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    # zlib grows its buffer by doubling.
    assert peak < 3_000_000


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("deflate, gzip", "gzip"),
        ("gzip, deflate, br", "gzip"),
        ("GZIP;q=0.5 , deflate; q=0.8", "deflate"),
        ("gzip;q=0", None),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=0.5, identity", None),
        ("identity;q=0.5, gzip", "gzip"),
        ("gzip;q=wrong", None),
        ("br", None),
        ("*", None),
    ],
)
def test_accepted_coding(header: str, coding: Coding | None) -> None:
    """The one that the client weighs most, gzip where it weighs both alike."""
    assert accepted_coding(header) == coding
