"""What pages and scripts ask of a run's numbers, as msgpack, Arrow or JSON."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from gradwatch.client import MSGPACK
from gradwatch.health.score import LAYER_DEFINITION
from gradwatch.wire.api import Flow, HeatmapJson, HistogramsJson, LayersView, ScalarsJson
from gradwatch_server import queries
from gradwatch_server.access import Step
from gradwatch_server.answers import ARROW
from gradwatch_server.asked import Asked, span_of
from gradwatch_server.documents import answered

router = APIRouter(prefix="/api/v1/runs/{run}", tags=["queries"])

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
    asked: Asked,
    span: Annotated[queries.Span, span_of(400)],
    statistic: str = "norm",
    layers: Annotated[
        str | None,
        Query(max_length=500, description="pattern of names, as blocks.0.*; all without it"),
    ] = None,
) -> Response:
    return asked.answer(
        lambda session, optimizer: queries.heatmap(session, optimizer, statistic, span, layers)
    )


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
    asked: Asked,
    span: Annotated[queries.Span, span_of(100)],
    layer: Annotated[str, Query(max_length=500)],
) -> Response:
    return asked.answer(
        lambda session, optimizer: queries.histograms(session, optimizer, layer, span)
    )


@router.get(
    "/flow",
    summary="Gradient flow at a step",
    description="Every statistic of every layer at the last detail frame at or before the step.",
    responses=answered(Flow, "The layers, the input's first", media_types=(MSGPACK,)),
)
def get_flow(asked: Asked, step: Step = None) -> Response:
    return asked.answer(lambda session, optimizer: queries.flow(session, optimizer, step))


@router.get(
    "/layers",
    summary="How each layer does",
    description=(
        f"Its health, {LAYER_DEFINITION}; what is open and not muted of it; and its last gradient "
        "norm."
    ),
    responses=answered(LayersView, "The layers, the input's first", media_types=(MSGPACK,)),
)
def get_layers(asked: Asked) -> Response:
    return asked.answer_anew(queries.layers)


@router.get(
    "/scalars",
    summary="Loss and other scalars over steps",
    description=(
        "Folded to at most `columns` groups of steps, each told by its last step: what was logged "
        f"last, and the smallest, mean and largest finite value of all. {BY_ACCEPT}"
    ),
    responses=answered(ScalarsJson, "The curves", media_types=FORMS),
)
def get_scalars(asked: Asked, span: Annotated[queries.Span, span_of(1000)]) -> Response:
    return asked.answer(lambda session, optimizer: queries.scalars(session, optimizer, span))
