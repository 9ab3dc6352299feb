"""Findings: of one run and of all, what became of each, and what people say of them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from sqlalchemy import select

from gradwatch.wire.api import FindingHistory, FindingPage, FindingPatch, FindingView
from gradwatch_server import lives
from gradwatch_server.access import (
    MAX_NUMBER,
    Administering,
    Reading,
    RunKey,
    reachable_run,
)
from gradwatch_server.answers import answer
from gradwatch_server.context import Shared
from gradwatch_server.database import reading, writing
from gradwatch_server.documents import answered, taken
from gradwatch_server.models import FindingRow
from gradwatch_server.routes.records import body_of
from gradwatch_server.views import finding_views

router = APIRouter(prefix="/api/v1", tags=["findings"])

FindingId = Annotated[int, Path(ge=1, le=MAX_NUMBER)]


@router.get(
    "/runs/{run}/findings",
    summary="A run's findings, open ones first",
    responses=answered(list[FindingView], "All of them, the gravest first"),
)
def get_findings(run: RunKey, request: Request, shared: Shared, grant: Reading) -> Response:
    with reading(shared.engine) as session:
        found = reachable_run(session, grant, run)
        rows = session.scalars(select(FindingRow).where(FindingRow.run_id == found.id))
        return answer(request, finding_views(rows, found.key))


@router.get(
    "/findings",
    summary="Findings of all runs, newest first",
    responses=answered(FindingPage, "One page"),
)
def list_findings(
    request: Request,
    shared: Shared,
    grant: Reading,
    project: str | None = None,
    state: Literal["open", "resolved"] | None = None,
    severity: Literal["critical", "warning", "info"] | None = None,
    kind: Annotated[str | None, Query(max_length=50)] = None,
    muted: bool | None = None,
    after: Annotated[
        int | None, Query(ge=0, le=MAX_NUMBER, description="`next` of the page before")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
) -> Response:
    wanted = lives.Wanted(
        project=project,
        state=state,
        severity=severity,
        kind=kind,
        muted=muted,
        reach=grant.project,
    )
    with reading(shared.engine) as session:
        return answer(request, lives.page(session, wanted, after, limit))


@router.get(
    "/findings/{finding}",
    summary="One finding with all that became of it",
    responses=answered(FindingHistory, "The finding, and its changes, the oldest first"),
)
def get_finding(finding: FindingId, request: Request, shared: Shared, grant: Reading) -> Response:
    with reading(shared.engine) as session:
        return answer(request, lives.history(session, finding, grant.project))


@router.patch(
    "/findings/{finding}",
    summary="Mute or acknowledge a finding",
    description=(
        "A muted finding counts for no verdict, and no message is sent of it, even when it "
        "resolves and comes back. An acknowledged one was seen by somebody; when it comes back, "
        "it was not. Needs the scope admin."
    ),
    responses=answered(FindingHistory, "The finding as it is now"),
    openapi_extra=taken(FindingPatch),
)
async def patch_finding(
    finding: FindingId, request: Request, shared: Shared, grant: Administering
) -> Response:
    patch = msgspec.json.decode(await body_of(request), type=FindingPatch)

    def change() -> FindingHistory:
        with writing(shared.engine) as session:
            lives.change(session, finding, patch, grant.project)
            return lives.history(session, finding, grant.project)

    return answer(request, await asyncio.to_thread(change))
