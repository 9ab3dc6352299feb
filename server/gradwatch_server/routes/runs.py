"""Runs: listed, shown, described, ended and deleted; and what was stored of each."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from gradwatch.wire.api import (
    Comparison,
    EventPage,
    FramePage,
    ManifestView,
    RunFinish,
    RunPage,
    RunPatch,
    RunView,
)
from gradwatch_server import recorded, runs
from gradwatch_server.access import (
    MAX_NUMBER,
    Administering,
    Ingesting,
    Reading,
    RunKey,
    Step,
    reachable_run,
)
from gradwatch_server.answers import answer
from gradwatch_server.asked import Asked
from gradwatch_server.compare import MAX_RUNS, compare
from gradwatch_server.context import Shared
from gradwatch_server.database import reading, writing
from gradwatch_server.documents import answered, taken
from gradwatch_server.queries import MAX_COLUMNS
from gradwatch_server.routes.records import body_of

router = APIRouter(prefix="/api/v1", tags=["runs"])

Limit = Annotated[int, Query(ge=1, le=100, description="at most so many a page")]
After = Annotated[str | None, Query(max_length=300, description="`next` of the page before")]


@router.get(
    "/runs",
    summary="Runs with their verdicts, newest first",
    responses=answered(RunPage, "One page"),
)
def list_runs(
    request: Request,
    shared: Shared,
    grant: Reading,
    project: str | None = None,
    status: Literal["running", "silent", "finished", "failed"] | None = None,
    verdict: Literal["critical", "warning", "healthy", "waiting"] | None = None,
    name: Annotated[str | None, Query(description="part of the name, in any case")] = None,
    tag: str | None = None,
    after: Annotated[
        int | None, Query(ge=0, le=MAX_NUMBER, description="`next` of the page before")
    ] = None,
    limit: Limit = 100,
) -> Response:
    wanted = runs.Wanted(
        project=project, status=status, verdict=verdict, name=name, tag=tag, reach=grant.project
    )
    with reading(shared.engine) as session:
        found = runs.page(session, wanted, after, limit, shared.settings.silent_after_s)
    return answer(request, found)


@router.get(
    "/runs/{run}", summary="One run with its findings", responses=answered(RunView, "The run")
)
def get_run(run: RunKey, request: Request, shared: Shared, grant: Reading) -> Response:
    with reading(shared.engine) as session:
        row = reachable_run(session, grant, run)
        return answer(request, runs.shown(session, [row], shared.settings.silent_after_s)[0])


@router.patch(
    "/runs/{run}",
    summary="Change a run's name, tags or notes",
    description="Fields that are left out stay as they are. Needs the scope admin.",
    responses=answered(RunView, "The run as it is now"),
    openapi_extra=taken(RunPatch),
)
async def patch_run(
    run: RunKey, request: Request, shared: Shared, grant: Administering
) -> Response:
    patch = msgspec.json.decode(await body_of(request), type=RunPatch)

    def change() -> RunView:
        with writing(shared.engine) as session:
            row = reachable_run(session, grant, run)
            runs.change(row, patch)
            return runs.shown(session, [row], shared.settings.silent_after_s)[0]

    return answer(request, await asyncio.to_thread(change))


@router.post(
    "/runs/{run}/finish",
    summary="Say how a run ended whose job did not",
    description="One that has ended stays as it ended. Needs the scope ingest.",
    responses=answered(RunView, "The run as it is now"),
    openapi_extra=taken(RunFinish),
)
async def finish_run(run: RunKey, request: Request, shared: Shared, grant: Ingesting) -> Response:
    said = msgspec.json.decode(await body_of(request), type=RunFinish)

    def finish() -> RunView:
        with writing(shared.engine) as session:
            row = reachable_run(session, grant, run)
            runs.finish(row, said)
            return runs.shown(session, [row], shared.settings.silent_after_s)[0]

    return answer(request, await asyncio.to_thread(finish))


@router.delete(
    "/runs/{run}",
    summary="Delete a run with all that was stored of it",
    description="A job that still runs introduces it anew. Needs the scope admin.",
    status_code=204,
    response_class=Response,
)
def delete_run(run: RunKey, shared: Shared, grant: Administering) -> Response:
    with writing(shared.engine) as session:
        session.delete(reachable_run(session, grant, run))
    return Response(status_code=204)


@router.get(
    "/runs/{run}/manifests",
    summary="The layers of each optimizer, by version",
    description="rank -1 stands for all ranks together.",
    responses=answered(list[ManifestView], "All versions, the oldest first"),
)
def get_manifests(
    run: RunKey, request: Request, shared: Shared, grant: Reading, optimizer: str | None = None
) -> Response:
    with reading(shared.engine) as session:
        row = reachable_run(session, grant, run)
        return answer(request, recorded.manifests(session, row, optimizer))


@router.get(
    "/runs/{run}/frames",
    summary="Frames with all their numbers, in the order of steps",
    description=(
        "Values stand in the order of the manifest's layers, null where they were not measured "
        "or are not finite. A page also ends where it grows large, whatever its limit."
    ),
    responses=answered(FramePage, "One page"),
)
def get_frames(
    asked: Asked,
    rank: Annotated[
        int | None,
        Query(ge=-1, le=1_000_000, description="-1 for all together, the default where merged"),
    ] = None,
    first: Step = None,
    last: Step = None,
    after: Annotated[
        int | None, Query(ge=0, le=MAX_NUMBER, description="`next` of the page before")
    ] = None,
    limit: Limit = 100,
) -> Response:
    chosen = recorded.Chosen(rank, first if after is None else after + 1, last)
    return asked.answer(
        lambda session, optimizer: recorded.frames(session, optimizer, chosen, limit)
    )


@router.get(
    "/runs/{run}/events",
    summary="What ranks said happened, in the order of steps",
    responses=answered(EventPage, "One page"),
)
def get_events(
    run: RunKey,
    request: Request,
    shared: Shared,
    grant: Reading,
    optimizer: str | None = None,
    first: Step = None,
    last: Step = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> Response:
    with reading(shared.engine) as session:
        row = reachable_run(session, grant, run)
        chosen = recorded.Happened(optimizer, first, last, after)
        return answer(request, recorded.events(session, row, chosen, limit))


@router.get(
    "/comparison",
    summary="Runs side by side",
    description=(
        "How each went, in what their configurations differ, and one scalar of each over steps: "
        "the last value at or before the step, null before the run's first and after its last."
    ),
    responses=answered(Comparison, "The runs, in the order asked for"),
)
def get_comparison(
    request: Request,
    shared: Shared,
    grant: Reading,
    run: Annotated[list[RunKey], Query(min_length=1, max_length=MAX_RUNS)],
    scalar: Annotated[str, Query(max_length=200)] = "loss",
    columns: Annotated[int, Query(ge=1, le=MAX_COLUMNS)] = 1000,
) -> Response:
    with reading(shared.engine) as session:
        rows = [reachable_run(session, grant, key) for key in dict.fromkeys(run)]
        found = compare(session, rows, scalar, columns, shared.settings.silent_after_s)
        return answer(request, found)
