"""The address and the headers that the proxy sends on."""

import pytest

from app.errors import MalformedRequestError, SettingsError
from app.serving.upstream import Upstream, end_to_end


def upstream(url: str) -> Upstream:
    """An upstream that is not called."""
    return Upstream(url, timeout_s=1, connections=1)


@pytest.mark.parametrize(
    ("url", "path", "query", "target"),
    [
        ("http://a.example", b"", b"", b"/"),
        ("http://a.example/", b"classify", b"", b"/classify"),
        ("http://a.example/base", b"x/y/", b"q=1", b"/base/x/y/?q=1"),
        ("http://a.example/base/", b"a%2Fb%20c", b"q=%2f..%2f&q", b"/base/a%2Fb%20c?q=%2f..%2f&q"),
        ("http://a.example", b"/evil.example/x", b"", b"/evil.example/x"),
        ("http://a.example", b"//evil.example", b"", b"/evil.example"),
        ("http://a.example", b"@evil.example", b"", b"/@evil.example"),
        ("http://a.example", b"http://evil.example/", b"", b"/http://evil.example/"),
        ("http://a.example", b":80/x", b"", b"/:80/x"),
        ("http://a.example", b"%2F%2Fevil.example", b"", b"/%2F%2Fevil.example"),
        ("http://a.example", b"a..b/...", b"", b"/a..b/..."),
    ],
)
def test_target(url: str, path: bytes, query: bytes, target: bytes) -> None:
    """A path stays a path below the upstream's own, as it was encoded."""
    assert upstream(url).target(path, query) == target


@pytest.mark.parametrize(
    "path",
    [
        b"..",
        b"a/../b",
        b"a/%2e%2E/b",
        b"a%2f..%2fb",
        b"a/..%5cb",
        b"..\\a",
        b"a b",
        b"a\r\nb",
        b"\xff",
    ],
)
def test_refused_paths(path: bytes) -> None:
    """A path that climbs, however encoded, or that no path can be, is refused."""
    with pytest.raises(MalformedRequestError):
        upstream("http://a.example/base").target(path, b"")


def test_refused_queries() -> None:
    """A query cannot end the request line."""
    with pytest.raises(MalformedRequestError):
        upstream("http://a.example").target(b"a", b"b HTTP/1.1\r\nX: y")


@pytest.mark.parametrize("url", ["http://a.example:port", "http://:80", "http://a.example:99999"])
def test_refused_urls(url: str) -> None:
    """An address that cannot be called ends the start with a line that names it."""
    with pytest.raises(SettingsError, match="NORMGATE_UPSTREAM_URL"):
        upstream(url)


def test_end_to_end() -> None:
    """RFC 9110, 7.6.1: what ``Connection`` names goes with it, from every such header."""
    headers = [
        (b"Connection", b"close, X-One"),
        (b"connection", b"x-two"),
        (b"X-One", b"1"),
        (b"x-two", b"2"),
        (b"x-three", b"3"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Content-Type", b"image/png"),
    ]

    assert end_to_end(headers) == [(b"x-three", b"3"), (b"Content-Type", b"image/png")]
