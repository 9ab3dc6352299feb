"""Taking what agents send: runs, and batches of records."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from gradwatch.wire.codec import CONTENT_TYPE, MAX_BODY_BYTES, BatchTooLargeError
from gradwatch.wire.frame import Receipt, RunInfo
from gradwatch_server.access import Ingesting, RunKey, settled_project
from gradwatch_server.arrivals import Arrivals, arrive, arrive_json
from gradwatch_server.context import Shared
from gradwatch_server.database import writing
from gradwatch_server.documents import JSON, answered, taken
from gradwatch_server.examples import RECORDS
from gradwatch_server.ingest import introduce
from gradwatch_server.intake import Room
from gradwatch_server.problems import problem
from gradwatch_server.tokens import Grant

router = APIRouter(prefix="/api/v1", tags=["ingest"])

# Of what is decoded whole: JSON may become thirty times as large in memory.
MAX_JSON_BYTES = 4 << 20


@router.put(
    "/runs/{run}",
    summary="Introduce a run",
    description="Idempotent. The body is a RunInfo whose id is the one in the path.",
    responses=answered(Receipt, "Known"),
    openapi_extra=taken(RunInfo),
)
async def put_run(run: RunKey, request: Request, shared: Shared, grant: Ingesting) -> Response:
    info = msgspec.json.decode(await body_of(request), type=RunInfo)
    if info.id != run:
        return problem(422, f"id: {info.id!r} is not the run of the path, {run!r}")
    settled_project(grant, info.project)

    def write() -> None:
        with writing(shared.engine) as session:
            introduce(session, info)

    await asyncio.to_thread(write)
    return Response(msgspec.json.encode(Receipt(stored=1, repeated=0)), media_type=JSON)


@router.post(
    "/runs/{run}/records",
    summary="Store a batch of frames, manifests and other records",
    description=(
        "The body is a msgpack array of records, compressed with zstd; or, for people, a JSON "
        "array, in which a frame may give `statistics` (name to list of numbers) in place of "
        "`columns` and `values`. Answered after the commit. Records that cannot be stored are "
        "named with the reason: in a 409 when all of them repeat a key with other content, else "
        "in a 422; the good ones beside them are kept. Sending a batch again is safe."
    ),
    responses=answered(Receipt, "Stored"),
    openapi_extra={
        "requestBody": {
            "content": {
                CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}},
                JSON: {
                    "schema": {"type": "array", "items": {"type": "object"}},
                    "example": RECORDS,
                },
            },
            "required": True,
        }
    },
)
async def post_records(run: RunKey, request: Request, shared: Shared, grant: Ingesting) -> Response:
    with shared.intake.room() as room:
        is_json = request.headers.get("Content-Type", "").startswith(JSON)
        body = await body_of(request, room, MAX_JSON_BYTES if is_json else MAX_BODY_BYTES)
        arrivals = await asyncio.to_thread(arrive_json if is_json else arrive, body)
        # What waits for the writer may be a thousand times what came.
        room.take(arrivals.size)
        return await _store(run, arrivals, shared, grant)


async def _store(run: str, arrivals: Arrivals, shared: Shared, grant: Grant) -> Response:
    waiting = shared.writer.submit(run, arrivals.records, grant.project)
    receipt: Receipt = await asyncio.wrap_future(waiting)
    rejected = sorted([*arrivals.rejected, *receipt.rejected], key=lambda item: item.place)
    shared.telemetry.rejected(rejected)
    if rejected:
        stored = receipt.stored + receipt.repeated
        detail = f"{len(rejected)} records refused, {stored} frames kept: {rejected[0].reason}"
        status = 409 if all(item.conflict for item in rejected) else 422
        return problem(status, detail, rejected)
    return Response(msgspec.json.encode(receipt), media_type=JSON)


async def body_of(request: Request, room: Room | None = None, limit: int = MAX_JSON_BYTES) -> bytes:
    """The request's body, refused as soon as it is over the limit."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise BatchTooLargeError(f"the body is over {limit} bytes; send less at once")
        if room is not None:
            room.take(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)
