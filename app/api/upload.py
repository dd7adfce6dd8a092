"""Request bodies, read under a size cap: raw images and multipart forms."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

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
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return await _read_form(request, max_bytes=max_bytes)
    if content_type in _RAW_TYPES or content_type.startswith("image/"):
        return [Upload(None, await read_body(request, max_bytes=max_bytes))]
    raise UnsupportedImageError(
        f"content type is {content_type!r}; send multipart/form-data, image/* or "
        "application/octet-stream"
    )


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        MalformedRequestError: the body is empty.
        RequestTooLargeError: more than ``max_bytes``, announced or counted while reading.
    """
    chunks = [chunk async for chunk in _capped(request, max_bytes=max_bytes)]
    body = b"".join(chunks)
    if not body:
        raise MalformedRequestError("the body is empty; send an image")
    return body


async def _read_form(request: Request, *, max_bytes: int) -> list[Upload]:
    parser = MultiPartParser(
        request.headers,
        _capped(request, max_bytes=max_bytes),
        max_files=_MAX_FILES,
        max_part_size=max_bytes,
    )
    # Small enough to be kept in memory whole: the cap has counted every byte.
    parser.spool_max_size = max_bytes
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        reason = getattr(error, "message", "no boundary in the content type")
        raise MalformedRequestError(f"the multipart form cannot be read: {reason}") from error
    try:
        files = [value for name, value in form.multi_items() if name == FIELD]
        uploads = [
            Upload(value.filename, await value.read())
            for value in files
            if isinstance(value, UploadFile)
        ]
    finally:
        await form.close()
    if not uploads or len(uploads) < len(files):
        raise MalformedRequestError(
            f"the form has {len(files)} parts named {FIELD!r}, {len(uploads)} of them files; "
            "each must be a file and there must be one at least"
        )
    return uploads


async def _capped(request: Request, *, max_bytes: int) -> AsyncGenerator[bytes, None]:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise RequestTooLargeError(f"the body has {announced} bytes; the limit is {max_bytes}")
    count = 0
    async for chunk in request.stream():
        count += len(chunk)
        if count > max_bytes:
            raise RequestTooLargeError(f"the body has more than {max_bytes} bytes, the limit")
        yield chunk
