"""What pages and scripts ask of a run's numbers, as msgpack, Arrow or JSON."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from gradwatch.client import MSGPACK
from gradwatch.wire.api import Flow, HeatmapJson, HistogramsJson, ScalarsJson
from gradwatch_server import queries
from gradwatch_server.access import Reading, RunKey, Step, reachable_run
from gradwatch_server.answers import ARROW, answer, unchanged
from gradwatch_server.context import Shared
from gradwatch_server.database import reading
from gradwatch_server.documents import answered

router = APIRouter(prefix="/api/v1/runs/{run}", tags=["queries"])

OptimizerName = Annotated[str, Query(max_length=200, description="as the run's view lists it")]
Columns = Annotated[int, Query(ge=1, le=queries.MAX_COLUMNS, description="at most so many steps")]
FORMS = (MSGPACK, ARROW)
BY_ACCEPT = (
    "JSON for people; msgpack (arrays as little-endian bytes) or an Arrow stream for programs "
    "that name it in the Accept header."
)


@router.get(
    "/heatmap",
    summary="One statistic over layers and steps",
    description=(
        "Folded to at most `columns` groups of steps: the smallest, mean (of norms, the root mean "
        f"square) and largest finite value of each. {BY_ACCEPT}"
    ),
    responses=answered(HeatmapJson, "The grid", media_types=FORMS),
)
def get_heatmap(
    run: RunKey,
    request: Request,
    shared: Shared,
    grant: Reading,
    optimizer: OptimizerName,
    statistic: str = "norm",
    layers: Annotated[
        str | None,
        Query(max_length=500, description="pattern of names, as blocks.0.*; all without it"),
    ] = None,
    first: Step = None,
    last: Step = None,
    columns: Columns = 400,
) -> Response:
    with reading(shared.engine) as session:
        found = reachable_run(session, grant, run)
        row = queries.find_optimizer(session, run, optimizer)
        tag, have = unchanged(request, found.id, found.changed)
        if have:
            return have
        span = queries.Span(first, last, columns)
        return answer(request, queries.heatmap(session, row, statistic, span, layers), tag)


@router.get(
    "/histograms",
    summary="One layer's histograms over steps",
    description=(
        "Counts over signed powers of two, of neighbouring detail frames added up to at most "
        f"`columns`. {BY_ACCEPT}"
    ),
    responses=answered(HistogramsJson, "The histograms", media_types=FORMS),
)
def get_histograms(
    run: RunKey,
    request: Request,
    shared: Shared,
    grant: Reading,
    optimizer: OptimizerName,
    layer: Annotated[str, Query(max_length=500)],
    first: Step = None,
    last: Step = None,
    columns: Columns = 100,
) -> Response:
    with reading(shared.engine) as session:
        found = reachable_run(session, grant, run)
        row = queries.find_optimizer(session, run, optimizer)
        tag, have = unchanged(request, found.id, found.changed)
        if have:
            return have
        span = queries.Span(first, last, columns)
        return answer(request, queries.histograms(session, row, layer, span), tag)


@router.get(
    "/flow",
    summary="Gradient flow at a step",
    description="Every statistic of every layer at the last detail frame at or before the step.",
    responses=answered(Flow, "The layers, the input's first", media_types=(MSGPACK,)),
)
def get_flow(
    run: RunKey,
    request: Request,
    shared: Shared,
    grant: Reading,
    optimizer: OptimizerName,
    step: Step = None,
) -> Response:
    with reading(shared.engine) as session:
        reachable_run(session, grant, run)
        row = queries.find_optimizer(session, run, optimizer)
        return answer(request, queries.flow(session, row, step))


@router.get(
    "/scalars",
    summary="Loss and other scalars over steps",
    description=f"At most `columns` steps, evenly chosen, the last one among them. {BY_ACCEPT}",
    responses=answered(ScalarsJson, "The curves", media_types=FORMS),
)
def get_scalars(
    run: RunKey,
    request: Request,
    shared: Shared,
    grant: Reading,
    optimizer: OptimizerName,
    first: Step = None,
    last: Step = None,
    columns: Columns = 1000,
) -> Response:
    with reading(shared.engine) as session:
        found = reachable_run(session, grant, run)
        row = queries.find_optimizer(session, run, optimizer)
        tag, have = unchanged(request, found.id, found.changed)
        if have:
            return have
        return answer(request, queries.scalars(session, row, columns, first, last), tag)
