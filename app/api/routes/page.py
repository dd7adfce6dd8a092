"""The pages for people, ``/`` and ``/review``, and the files under ``/static`` that they load."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Self, cast

from fastapi import APIRouter, Depends, HTTPException, Request, Response

from app.settings import Settings

FOLDER: Final = Path(__file__).resolve().parents[1] / "static"
MEDIA_TYPES: Final[Mapping[str, str]] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ]
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A copy is asked for with its ETag: after an update no old script meets a new page.
    "Cache-Control": "no-cache",
}
_LINKS: Final = b"<!-- links -->"
_MAX_NAME: Final = 50

router = APIRouter(include_in_schema=False)
review_router = APIRouter(include_in_schema=False)
"""Only there where a review folder is set."""


@dataclass(frozen=True)
class StaticFile:
    """A file as it is answered."""

    body: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, name: str, body: bytes) -> Self:
        """The file ``name`` with the content ``body``."""
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        return cls(body, MEDIA_TYPES[Path(name).suffix], etag)


class Pages:
    """The files of the pages, read once.

    Args:
        links: to the pages of the service, by path; they stand at the top of each.
    """

    def __init__(self, links: Mapping[str, str]) -> None:
        self._files = dict(_read(links))

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """With links to what these settings serve."""
        # Relative: a proxy may serve all this under a path of its own.
        links = {"./": "Live"}
        if settings.review_folder is not None:
            links["review"] = "Review"
        if settings.docs:
            links["docs"] = "API"
        return cls(links)

    def answer(self, request: Request, name: str) -> Response:
        """The file of that name; 304 where the client has it already.

        Raises:
            HTTPException: there is none; 404.
        """
        file = self._files.get(name)
        if file is None:
            raise HTTPException(404, f"there is no file {name[:_MAX_NAME]!r}")
        headers = {**HEADERS, "ETag": file.etag}
        if _has(request, file.etag):
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers=headers, media_type=file.media_type)


async def _pages(request: Request) -> Pages:
    return cast(Pages, request.app.state.pages)


PagesOf = Annotated[Pages, Depends(_pages)]


@router.head("/")
@router.get("/")
async def live_page(request: Request, pages: PagesOf) -> Response:
    """Images in, verdicts out, and what the service sees."""
    return pages.answer(request, "index.html")


@router.head("/static/{name}")
@router.get("/static/{name}")
async def static_file(request: Request, pages: PagesOf, name: str) -> Response:
    """A script, a style sheet or a picture."""
    return pages.answer(request, name)


@review_router.head("/review")
@review_router.get("/review")
async def review_page(request: Request, pages: PagesOf) -> Response:
    """The images kept for review; it asks for the admin token itself."""
    return pages.answer(request, "review.html")


def _read(links: Mapping[str, str]) -> Iterator[tuple[str, StaticFile]]:
    anchors = " ".join(f'<a href="{path}">{text}</a>' for path, text in links.items())
    for file in FOLDER.iterdir():
        body = file.read_bytes()
        if file.suffix == ".html":
            body = body.replace(_LINKS, anchors.encode())
        yield file.name, StaticFile.of(file.name, body)


def _has(request: Request, etag: str) -> bool:
    known = request.headers.get("if-none-match", "").split(",")
    # Caches and proxies may have made a weak one of it.
    return any(one.strip().removeprefix("W/") in (etag, "*") for one in known)
