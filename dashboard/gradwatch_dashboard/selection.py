"""Answers cut down to some of their layers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gradwatch.wire.api import Flow, Heatmap, LayersView


def some_layers(layers: Sequence[str], text: str) -> list[int]:
    """Rows of the layers whose name holds each word of `text`; all of them for no word."""
    words = text.lower().split()
    return [row for row, name in enumerate(layers) if all(word in name.lower() for word in words)]


def heatmap_rows(heatmap: Heatmap, text: str) -> Heatmap:
    """The heatmap of the layers that `text` selects."""
    rows = some_layers(heatmap.layers, text)
    if len(rows) == len(heatmap.layers):
        return heatmap
    return msgspec.structs.replace(
        heatmap,
        layers=[heatmap.layers[row] for row in rows],
        low_bytes=heatmap.low[rows].tobytes(),
        high_bytes=heatmap.high[rows].tobytes(),
        nonfinite_bytes=heatmap.nonfinite[rows].tobytes(),
    )


def layers_rows(told: LayersView, text: str) -> LayersView:
    """Of the layers those that `text` selects."""
    chosen = some_layers([layer.name for layer in told.layers], text)
    return msgspec.structs.replace(told, layers=[told.layers[row] for row in chosen])


def flow_rows(flow: Flow, text: str) -> Flow:
    """The flow of the layers that `text` selects."""
    rows = some_layers(flow.layers, text)
    if len(rows) == len(flow.layers):
        return flow
    return msgspec.structs.replace(
        flow,
        layers=[flow.layers[row] for row in rows],
        roles=[flow.roles[row] for row in rows],
        statistics={
            name: [values[row] for row in rows] for name, values in flow.statistics.items()
        },
    )
