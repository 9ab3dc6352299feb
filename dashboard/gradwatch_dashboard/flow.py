"""Gradient flow: mean |g|, std and max |g| of every layer at one step, as bars on a log scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from gradwatch.wire.api import Flow
from gradwatch.wire.statistics import BY_NAME
from gradwatch_dashboard.axes import layer_axis, log_axis, log_range, rows_height
from gradwatch_dashboard.formats import count
from gradwatch_dashboard.heatmap import NONFINITE


class Bar(NamedTuple):
    """One statistic's bars; `width` is of the row, so that narrower ones lie on wider ones."""

    statistic: str
    colour: str
    width: float


# The mean is never above the max, so the bars nest; each is told apart by width and lightness.
BARS = (
    Bar("absmax", "#a9c9e0", 0.84),
    Bar("std", "#4f8fbf", 0.52),
    Bar("mean_abs", "#f0a202", 0.24),
)
BOTTOM_PX, TOP_PX = 60, 40
THIN_ROW_PX = 9  # below it, bars of different widths blur into each other


def column(flow: Flow, statistic: str) -> NDArray[np.float32]:
    """One statistic of every layer, NaN where there is none. float32[layers]."""
    values = flow.statistics.get(statistic, [None] * len(flow.layers))
    return np.array([np.nan if v is None else v for v in values], dtype=np.float32)


def flow_figure(flow: Flow) -> go.Figure:
    """Bars of each layer, the input's layer at the top, on a log axis.

    A layer whose gradient is exactly 0 or not finite has no bar: a word says which it is.
    """
    columns = {bar.statistic: column(flow, bar.statistic) for bar in BARS}
    low, high = log_range(np.concatenate(list(columns.values())))
    # Room for a sliver of the smallest bar, whose value is the end of the axis otherwise.
    low -= 0.25
    thin = rows_height(len(flow.layers)) < THIN_ROW_PX * len(flow.layers)
    figure = go.Figure()
    for bar in BARS:
        values = columns[bar.statistic]
        drawn = np.where(values > 0, values, np.nan).astype(np.float32)
        figure.add_trace(
            go.Bar(
                orientation="h",
                x=drawn,
                y=flow.layers,
                width=1.0 if thin else bar.width,
                name=BY_NAME[bar.statistic].label,
                marker={"color": bar.colour, "line": {"width": 0}},
                customdata=np.stack(list(columns.values()), axis=1),
                hovertemplate=(
                    "<b>%{y}</b><br>max |g| %{customdata[0]:,.4~g}"
                    "<br>std %{customdata[1]:,.4~g}<br>mean |g| %{customdata[2]:,.4~g}"
                    "<extra></extra>"
                ),
            )
        )
    _add_words(figure, flow, columns["absmax"], 10.0**low)
    figure.update_layout(
        barmode="overlay",
        height=rows_height(len(flow.layers)) + BOTTOM_PX + TOP_PX,
        margin={"l": 8, "r": 12, "t": TOP_PX, "b": BOTTOM_PX, "pad": 0},
        xaxis=log_axis(low, high) | {"title": {"text": "|g|, log scale"}},
        yaxis=layer_axis(flow.layers),
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1,
            "yanchor": "bottom",
            "traceorder": "reversed",
        },
        uirevision=f"{flow.layers[0]}:{len(flow.layers)}",
        hoverlabel={"namelength": -1},
    )
    return figure


def _add_words(figure: go.Figure, flow: Flow, absmax: NDArray[np.float32], left: float) -> None:
    counts = np.nan_to_num(column(flow, "nonfinite"))
    bad = [int(row) for row in np.flatnonzero(counts > 0)]
    zero = [int(row) for row in np.flatnonzero((absmax == 0) & ~(counts > 0))]
    told = [f"\u2002✕ {count(int(counts[row]), 'NaN or Inf element')}" for row in bad]
    _add_word_trace(figure, [flow.layers[row] for row in bad], told, left, NONFINITE)
    told = ["\u2002exactly 0"] * len(zero)
    _add_word_trace(figure, [flow.layers[row] for row in zero], told, left, "rgb(128,128,128)")


def _add_word_trace(
    figure: go.Figure, layers: Sequence[str], words: Sequence[str], left: float, colour: str
) -> None:
    if not layers:
        return
    figure.add_trace(
        go.Scatter(
            x=np.full(len(layers), left),
            y=layers,
            mode="text",
            text=words,
            textposition="middle right",
            textfont={"color": colour, "size": 11},
            hoverinfo="skip",
            showlegend=False,
        )
    )
