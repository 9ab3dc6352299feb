"""Audits: a run's gradients compared with a reference, taken and listed."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from gradwatch.wire.audit import Audit, AuditPage, AuditView
from gradwatch_server import audits
from gradwatch_server.access import (
    MAX_NUMBER,
    Ingesting,
    Reading,
    RunKey,
    locked_run,
    reachable_run,
)
from gradwatch_server.answers import answer
from gradwatch_server.context import Shared
from gradwatch_server.database import reading, writing
from gradwatch_server.documents import answered, taken
from gradwatch_server.problems import problem
from gradwatch_server.routes.records import body_of

router = APIRouter(prefix="/api/v1/runs/{run}/audits", tags=["audits"])


@router.post(
    "",
    summary="Store an audit",
    description=(
        "A comparison of gradients with a reference, at one step of one rank. Its key is (run, "
        "optimizer, rank, step, method): the same one again is answered with 200 and changes "
        "nothing, another one of the key with 409. Layers without a tolerance are held to that "
        "of the method and type. A layer beyond it opens the finding reference_mismatch, which "
        "resolves when the same comparison of a later step passes. Needs the scope ingest."
    ),
    responses={
        **answered(AuditView, "Stored", status=201),
        **answered(AuditView, "Known already"),
    },
    openapi_extra=taken(Audit),
)
async def post_audit(run: RunKey, request: Request, shared: Shared, grant: Ingesting) -> Response:
    audit = msgspec.json.decode(await body_of(request), type=Audit)

    def write() -> audits.Kept:
        with writing(shared.engine) as session:
            row = locked_run(session, grant, run)
            settings = shared.rules.settings(row.project, row.key)
            return audits.keep(session, row, audit, settings, shared.settings.channels)

    kept = await asyncio.to_thread(write)
    if kept.alerted:
        await asyncio.to_thread(shared.writer.wake)
    if kept.conflict:
        return problem(
            409,
            f"step: another audit of {audit.optimizer!r}, rank {audit.rank}, step {audit.step} "
            f"and method {audit.method!r} is stored already",
        )
    return answer(request, kept.view, status=201 if kept.new else 200)


@router.get(
    "",
    summary="A run's audits, the last received first",
    responses=answered(AuditPage, "One page"),
)
def list_audits(
    run: RunKey,
    request: Request,
    shared: Shared,
    grant: Reading,
    optimizer: Annotated[str | None, Query(max_length=200)] = None,
    layer: Annotated[
        str | None, Query(max_length=500, description="those that compared this one")
    ] = None,
    passed: Annotated[
        bool | None, Query(description="whether all layers did, or the one asked for")
    ] = None,
    after: Annotated[
        int | None, Query(ge=0, le=MAX_NUMBER, description="`next` of the page before")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="at most so many a page")] = 100,
) -> Response:
    wanted = audits.Wanted(optimizer, layer, passed, after)
    with reading(shared.engine) as session:
        found = reachable_run(session, grant, run)
        return answer(request, audits.page(session, found, wanted, limit))
