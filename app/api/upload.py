"""Request bodies, read under a size cap: raw images and multipart forms."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from fastapi import Request
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from app.api.admission import holding_of
from app.errors import MalformedRequestError, RequestTooLargeError, UnsupportedImageError

FIELD: Final = "file"
_RAW_TYPES: Final = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""Beside ``image/*``; the last is what curl sends for ``--data-binary`` on its own."""
_MAX_FILES: Final = 10_000


@dataclass(frozen=True)
class Upload:
    """One image file as it came."""

    filename: str | None
    data: bytes


async def read_uploads(request: Request, *, max_bytes: int) -> list[Upload]:
    """The images of a request: every ``file`` part of a form, or the raw body.

    Raises:
        MalformedRequestError: no image, or a body that is not the form it says it is.
        RequestTooLargeError: more than ``max_bytes``, announced or counted while reading.
        UnsupportedImageError: a content type that is neither a form nor an image.
    """
    if _is_form(request.headers):
        return await _read_form(request, max_bytes=max_bytes)
    return [Upload(None, await read_body(request, max_bytes=max_bytes))]


async def files_in(headers: Headers, body: bytes) -> list[bytes]:
    """The image files of a body that has been read, which may be meant for another service.

    Every file of a form counts, whatever its part is called: nobody knows which of them the other
    service reads. Inputs that a browser submitted without a file do not.

    Raises:
        MalformedRequestError: the body is not the form it says it is, or says it is two things.
        UnsupportedImageError: a content type that is neither a form nor an image, a content
            coding, or a form without files.
    """
    if len(headers.getlist("content-type")) > 1:
        # An image can be a form's preamble: the other service might read the other header.
        raise MalformedRequestError("the request has several Content-Type headers")
    coding = ", ".join(headers.getlist("content-encoding")) or "identity"
    if coding.lower() != "identity":
        raise UnsupportedImageError(f"content encoding is {coding!r}; send the image as it is")
    if not _is_form(headers):
        return [body]
    async with _form(headers, _once(body), max_bytes=len(body)) as form:
        files = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
        contents = [await file.read() for file in files if file.filename or file.size]
    if not contents:
        raise UnsupportedImageError("the form has no file")
    return contents


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        MalformedRequestError: the body is empty.
        RequestTooLargeError: more than ``max_bytes``, announced or counted while reading.
    """
    body = await read_bytes(request, max_bytes=max_bytes)
    if not body:
        raise MalformedRequestError("the body is empty; send an image")
    return body


async def read_bytes(request: Request, *, max_bytes: int) -> bytes:
    """The whole body, which may be empty; to be read once, and not by the request itself after.

    Raises:
        RequestTooLargeError: more than ``max_bytes``, announced or counted while reading.
    """
    return b"".join([chunk async for chunk in _capped(request, max_bytes=max_bytes)])


def _is_form(headers: Headers) -> bool:
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return True
    if content_type in _RAW_TYPES or content_type.startswith("image/"):
        return False
    raise UnsupportedImageError(
        f"content type is {content_type!r}; send multipart/form-data, image/* or "
        "application/octet-stream"
    )


async def _read_form(request: Request, *, max_bytes: int) -> list[Upload]:
    chunks = _capped(request, max_bytes=max_bytes)
    async with _form(request.headers, chunks, max_bytes=max_bytes) as form:
        files = [value for name, value in form.multi_items() if name == FIELD]
        uploads = [
            Upload(value.filename, await value.read())
            for value in files
            if isinstance(value, UploadFile)
        ]
    if not uploads or len(uploads) < len(files):
        raise MalformedRequestError(
            f"the form has {len(files)} parts named {FIELD!r}, {len(uploads)} of them files; "
            "each must be a file and there must be one at least"
        )
    if len(uploads) == 1 and not uploads[0].data:
        raise MalformedRequestError(f"the part named {FIELD!r} is empty; send an image")
    return uploads


@asynccontextmanager
async def _form(
    headers: Headers, chunks: AsyncGenerator[bytes, None], *, max_bytes: int
) -> AsyncIterator[FormData]:
    parser = MultiPartParser(headers, chunks, max_files=_MAX_FILES, max_part_size=max_bytes)
    # Small enough to be kept in memory whole: the cap has counted every byte.
    parser.spool_max_size = max_bytes
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        reason = getattr(error, "message", "no boundary in the content type")
        raise MalformedRequestError(f"the multipart form cannot be read: {reason}") from error
    try:
        yield form
    finally:
        await form.close()


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


async def _capped(request: Request, *, max_bytes: int) -> AsyncGenerator[bytes, None]:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise RequestTooLargeError(f"the body has {announced} bytes; the limit is {max_bytes}")
    holding, count, is_whole = holding_of(request), 0, False
    while not is_whole:
        # Not by the request's stream, which is another generator.
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        is_whole = not message.get("more_body", False)
        chunk = message.get("body", b"")
        count += len(chunk)
        if count > max_bytes:
            raise RequestTooLargeError(f"the body has more than {max_bytes} bytes, the limit")
        holding.grow_to(count)
        yield chunk
