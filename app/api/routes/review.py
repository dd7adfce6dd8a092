"""``/v1/review``: the images kept for review, for people to look at, label and remove.

They are other people's images, so that only the admin token opens these routes.
"""

from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BeforeValidator

from app.api.auth import AdminRequired
from app.api.deadline import in_time, request_deadline
from app.api.dependencies import ServiceOf, SettingsOf
from app.api.problems import responses
from app.api.schemas import ReviewLabel, ReviewList
from app.api.tensors import read_json
from app.api.upload import read_bytes
from app.api.v2_schemas import inlined
from app.serving.review import ReviewQueue
from app.serving.review_folder import ReviewImage

NOT_STORED: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
"""No cache on the way keeps what is removed here."""
_MAX_BODY_BYTES: Final = 1024
_BINARY: Final = {"schema": {"type": "string", "format": "binary"}}
_EXAMPLE_ID: Final = {"some": {"value": "0123456789abcdef0123456789abcdef"}}


async def _not_stored(response: Response) -> None:
    response.headers.update(NOT_STORED)


async def _queue(service: ServiceOf) -> ReviewQueue:
    assert service.review is not None, "without a queue there are no routes"
    return service.review


router = APIRouter(
    prefix="/v1/review",
    tags=["review"],
    dependencies=[*AdminRequired, Depends(_not_stored)],
    responses=responses(401, 403, 503),
)
"""Only there where a review folder is set."""

QueueOf = Annotated[ReviewQueue, Depends(_queue)]
Id = Annotated[UUID, Path(openapi_examples=_EXAMPLE_ID)]
"""Any other text is no route: no text of a client's becomes part of a path on the disk."""


def _with_a_time(text: str) -> str:
    if "T" not in text:  # else a number would be taken for seconds since 1970
        raise ValueError("not a date and time as in 2026-01-31T12:00:00Z")
    return text


Moment = Annotated[datetime, BeforeValidator(_with_a_time)]


@router.get("", summary="The images kept for review", responses=responses(400))
async def list_images(
    queue: QueueOf,
    before: Annotated[
        Moment | None, Query(description="Only images older than this: the next page.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Images at once.")] = 200,
) -> ReviewList:
    """Newest first; the `time` of the last one asks for the next page."""
    return ReviewList.of(await queue.images(), before=before, limit=limit)


@router.get(
    "/labels.csv",
    summary="The labels as a table",
    response_class=Response,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)
async def labels_csv(queue: QueueOf) -> Response:
    """Every labelled image: what was found, and what a person says."""
    return Response(
        await queue.labels_csv(),
        media_type="text/csv",
        headers={**NOT_STORED, "Content-Disposition": 'attachment; filename="labels.csv"'},
    )


@router.get(
    "/{id:uuid}/thumbnail",
    summary="What it looks like",
    response_class=Response,
    responses=responses(400, 404, 422, 429) | {200: {"content": {"image/jpeg": _BINARY}}},
)
async def thumbnail(queue: QueueOf, id: Id) -> Response:
    """A JPEG of at most 256 pixels a side."""
    return Response(await queue.thumbnail(id.hex), media_type="image/jpeg", headers=NOT_STORED)


_LABEL_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": inlined(ReviewLabel)}},
    }
}


@router.put(
    "/{id:uuid}/label",
    summary="What a person says of it",
    responses=responses(400, 404, 413, 429, 504),
    openapi_extra=_LABEL_BODY,
)
async def put_label(request: Request, queue: QueueOf, settings: SettingsOf, id: Id) -> ReviewImage:
    """`really_ood`, `was_fine`, or null for no label; the same again changes nothing."""
    async with in_time(request, request_deadline(request, settings)):
        body = await read_bytes(request, max_bytes=_MAX_BODY_BYTES)
    return await queue.label(id.hex, read_json(ReviewLabel, body).label)


@router.delete(
    "/{id:uuid}",
    summary="Remove an image",
    status_code=204,
    response_class=Response,
    responses=responses(400, 404),
)
async def delete(queue: QueueOf, id: Id) -> Response:
    """The image, its scores and its label are removed from the disk."""
    await queue.remove(id.hex)
    return Response(status_code=204, headers=NOT_STORED)
