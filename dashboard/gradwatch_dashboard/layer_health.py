"""Which layer is ill: coloured edges beside the heatmap, and a table with the worst at the top."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from gradwatch.health.kinds import KINDS
from gradwatch.wire.api import LayersView, LayerView
from gradwatch_dashboard.formats import count
from gradwatch_dashboard.verdicts import SEVERITIES

# A layer with one critical finding has 25, one with a warning 65, one with information 95.
COLOURS = ((25.0, "critical"), (65.0, "warning"), (100.0, "info"))
EDGE_PX, EDGE_GAP_PX = 6, 2  # width, and distance from the map
WELL = 100.0


def scores(told: LayersView) -> dict[str, float]:
    """Health of the layers that are not well."""
    return {
        layer.name: layer.score
        for layer in told.layers
        if layer.score is not None and layer.score < WELL
    }


def edges(layers: Sequence[str], ill: Mapping[str, float]) -> list[dict[str, Any]]:
    """Shapes at the left of a picture with one row a layer: one for neighbours of one colour."""
    colours = [_colour(ill[name]) if name in ill else None for name in layers]
    shapes: list[dict[str, Any]] = []
    for colour, rows in itertools.groupby(range(len(layers)), key=lambda row: colours[row]):
        if colour is None:
            continue
        among = list(rows)
        shapes.append(
            {
                "type": "rect",
                "xref": "paper",
                "xsizemode": "pixel",
                "xanchor": 0,
                "x0": -EDGE_PX - EDGE_GAP_PX,
                "x1": -EDGE_GAP_PX,
                "yref": "y",
                "y0": among[0] - 0.5,
                "y1": among[-1] + 0.5,
                "fillcolor": colour,
                "line": {"width": 0},
            }
        )
    return shapes


def _colour(score: float) -> str:
    severity = next(name for limit, name in COLOURS if score <= limit)
    return SEVERITIES[severity].colour


def summary(told: LayersView) -> str:
    """How many layers are ill, in words."""
    if all(layer.score is None for layer in told.layers):
        return "Health of each layer: nothing was judged yet"
    ill = len(scores(told))
    if not ill:
        return f"Health of each layer: {count(len(told.layers), 'layer')} at {WELL:g}"
    return f"Health of each layer: {ill:,} of {count(len(told.layers), 'layer')} below {WELL:g}"


def rows(told: LayersView) -> dict[str, list[Any]]:
    """The table's columns; the layers that do worst first, and of those the input's first."""
    ordered = sorted(told.layers, key=lambda layer: WELL if layer.score is None else layer.score)
    return {
        "layer": [layer.name for layer in ordered],
        "health": [layer.score for layer in ordered],
        "findings": [_titles(layer) for layer in ordered],
        "norm": [layer.norm for layer in ordered],
    }


def _titles(layer: LayerView) -> str:
    return ", ".join(KINDS[kind].title if kind in KINDS else kind for kind in layer.findings)
