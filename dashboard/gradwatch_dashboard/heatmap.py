"""The heatmap: one statistic of every layer over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from gradwatch.wire.api import FindingView, Heatmap
from gradwatch.wire.statistics import BY_NAME
from gradwatch_dashboard.axes import (
    decade_ticks,
    layer_axis,
    log_range,
    plotly_steps,
    rows_height,
    steps_axis,
)
from gradwatch_dashboard.layer_health import EDGE_GAP_PX, EDGE_PX, edges
from gradwatch_dashboard.marks import Mark, finding_marks, marks_height

# Viridis (perceptually uniform, readable with any colour vision) from its 12 % on, so that its
# dark end cannot be taken for the black of an exact zero.
VALUES = (
    *("#482475", "#414487", "#355f8d", "#2a788e", "#21918c"),
    *("#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725"),
)
ZERO = "#000000"
NONFINITE = "#e5202b"
NOT_MEASURED = "rgba(128,128,128,0.22)"
CLEAR = "rgba(0,0,0,0)"

BAND = 0.05  # of the scale's span: the height of a special value's band on the colour bar
MAX_CROSSES = 600
CROSSES_A_ROW = 16
BOTTOM_PX, TOP_PX = 60, 30


class Scale(NamedTuple):
    """Where values lie on the colour axis: log10 of them, or themselves for shares.

    low, high: ends of the ordinary values. zero, nonfinite: whether those have a band of their
    own, below `low` and above `high`.
    """

    low: float
    high: float
    zero: bool
    nonfinite: bool

    @property
    def band(self) -> float:
        return (self.high - self.low) * BAND

    @property
    def bottom(self) -> float:
        return self.low - 2 * self.band if self.zero else self.low

    @property
    def top(self) -> float:
        return self.high + 2 * self.band if self.nonfinite else self.high

    @property
    def zero_place(self) -> float:
        return self.bottom + self.band / 2

    @property
    def nonfinite_place(self) -> float:
        return self.top - self.band / 2

    def colours(self) -> list[tuple[float, str]]:
        """The colour scale: bands of special values apart from the ordinary ones by a gap."""
        span = self.top - self.bottom

        def place(value: float) -> float:
            return min(max((value - self.bottom) / span, 0.0), 1.0)

        stops: list[tuple[float, str]] = []
        if self.zero:
            edge = place(self.bottom + self.band)
            stops += [(0.0, ZERO), (edge, ZERO), (edge, CLEAR), (place(self.low), CLEAR)]
        for index, colour in enumerate(VALUES):
            value = self.low + (self.high - self.low) * index / (len(VALUES) - 1)
            stops.append((place(value), colour))
        if self.nonfinite:
            edge = place(self.top - self.band)
            stops += [(place(self.high), CLEAR), (edge, CLEAR), (edge, NONFINITE)]
            stops.append((1.0, NONFINITE))
        return stops


class Cells(NamedTuple):
    """Cells ready to be coloured.

    colour: float32[layers, columns], the place on the scale, NaN where nothing was measured.
    value: float32[layers, columns], what hovering tells, NaN for non-finite ones.
    nonfinite: bool[layers, columns].
    """

    colour: NDArray[np.float32]
    value: NDArray[np.float32]
    nonfinite: NDArray[np.bool_]
    scale: Scale


def is_share(statistic: str) -> bool:
    """Whether a statistic is a share of one, shown on a linear scale."""
    known = BY_NAME.get(statistic)
    return known is not None and known.unit == "1"


def cells_of(heatmap: Heatmap) -> Cells:
    """Colour the largest value of each column's steps; a non-finite gradient outranks it."""
    counts = heatmap.statistic == "nonfinite"
    value = heatmap.high.astype(np.float32)
    # A map of the counts shows the numbers themselves, so nothing may cover them.
    nonfinite = np.zeros(value.shape, dtype=np.bool_) if counts else heatmap.nonfinite
    if is_share(heatmap.statistic):
        scale = Scale(0.0, 1.0, zero=False, nonfinite=bool(nonfinite.any()))
        colour = value.copy()
    else:
        zero = value == 0
        # No NaN is the ordinary case: a count of 0 stays uncoloured.
        scale = Scale(
            *log_range(value[~nonfinite]),
            zero=bool((zero & ~nonfinite).any()) and not counts,
            nonfinite=bool(nonfinite.any()),
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            # Rounding must not push a value over the scale's end, into the gap beside its band.
            colour = np.clip(np.log10(value), scale.low, scale.high)
        colour[zero] = np.nan if counts else scale.zero_place
    colour[nonfinite] = scale.nonfinite_place
    value[nonfinite] = np.nan
    return Cells(colour.astype(np.float32), value, nonfinite, scale)


def crosses(nonfinite: NDArray[np.bool_]) -> tuple[NDArray[np.intp], ...]:
    """Rows and columns of the crosses over non-finite cells.

    The first of each layer and then one at even distances, so that they read as a texture; layers
    are skipped when there are too many for a browser.
    """
    layers, columns = nonfinite.shape
    if not nonfinite.any():
        return np.nonzero(nonfinite)
    affected = np.flatnonzero(nonfinite.any(axis=1))
    stride = max(columns // CROSSES_A_ROW, 1)
    per_row = max(columns // stride, 1)
    kept = affected[:: max(-(-affected.size * per_row // MAX_CROSSES), 1)]
    first = nonfinite.argmax(axis=1)
    place = np.arange(columns)[None, :] - first[:, None]
    chosen = nonfinite & (place % stride == 0)
    chosen &= np.isin(np.arange(layers), kept)[:, None]
    return np.nonzero(chosen)


def heatmap_figure(
    heatmap: Heatmap,
    findings: Sequence[FindingView] = (),
    ill: Mapping[str, float] = MappingProxyType({}),
) -> go.Figure:
    """Layers (input at the top) x steps; a dashed line at the first step of each finding.

    ill: health of the layers that get a coloured edge.
    """
    cells = cells_of(heatmap)
    steps = plotly_steps(heatmap.steps)
    layers = heatmap.layers
    figure = go.Figure()
    figure.add_trace(
        go.Heatmap(
            x=steps,
            y=layers,
            z=cells.colour,
            customdata=cells.value,
            zmin=cells.scale.bottom,
            zmax=cells.scale.top,
            colorscale=cells.scale.colours(),
            colorbar=_colour_bar(heatmap.statistic, cells.scale),
            hoverongaps=False,
            hovertemplate=_hover(heatmap.statistic),
        )
    )
    _add_crosses(figure, steps, layers, cells.nonfinite)
    _add_legend(figure, cells)
    marks = finding_marks(findings, heatmap.steps)
    _add_marks(figure, marks)
    beside = edges(layers, ill)
    for shape in beside:
        figure.add_shape(shape)
    top = TOP_PX + marks_height(marks)
    figure.update_layout(
        height=rows_height(len(layers)) + BOTTOM_PX + top,
        margin={"l": 8, "r": 8, "t": top, "b": BOTTOM_PX, "pad": 0},
        plot_bgcolor=NOT_MEASURED,
        xaxis=steps_axis(heatmap.steps, cells=True),
        yaxis=layer_axis(layers, EDGE_PX + 2 * EDGE_GAP_PX if beside else 0),
        legend={
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "itemclick": False,
            "itemdoubleclick": False,
        },
        # Zoom outlives a refresh and another statistic, but not other layers.
        uirevision=f"{layers[0]}:{len(layers)}",
        hoverlabel={"namelength": -1},
    )
    return figure


def _colour_bar(statistic: str, scale: Scale) -> dict[str, Any]:
    known = BY_NAME.get(statistic)
    title = known.label if known else statistic
    if is_share(statistic):
        shares = [0.0, 0.25, 0.5, 0.75, 1.0]
        ticks: dict[str, Any] = {
            "tickmode": "array",
            "tickvals": shares,
            "ticktext": [f"{share:.0%}" for share in shares],
        }
    else:
        ticks = decade_ticks(scale.low, scale.high)
    if scale.zero:
        ticks["tickvals"] = [scale.zero_place, *ticks["tickvals"]]
        ticks["ticktext"] = ["0", *ticks["ticktext"]]
    if scale.nonfinite:
        ticks["tickvals"] = [*ticks["tickvals"], scale.nonfinite_place]
        ticks["ticktext"] = [*ticks["ticktext"], "NaN/Inf"]
    return {
        "title": {"text": title, "side": "right"},
        "thickness": 14,
        "outlinewidth": 0,
        **ticks,
    }


def _hover(statistic: str) -> str:
    known = BY_NAME.get(statistic)
    label = known.label if known else statistic
    form = ".1%" if is_share(statistic) else ",.4~g"
    return f"<b>%{{y}}</b><br>step %{{x:,d}}<br>{label} %{{customdata:{form}}}<extra></extra>"


def _add_crosses(
    figure: go.Figure,
    steps: NDArray[Any],
    layers: Sequence[str],
    nonfinite: NDArray[np.bool_],
) -> None:
    rows, columns = crosses(nonfinite)
    if not rows.size:
        return
    figure.add_trace(
        go.Scatter(
            x=steps[columns],
            y=[layers[row] for row in rows],
            mode="markers",
            marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.5, "color": "white"}},
            hoverinfo="skip",
            showlegend=False,
        )
    )


def _add_legend(figure: go.Figure, cells: Cells) -> None:
    entries: list[tuple[str, str, str]] = []
    if cells.scale.zero:
        entries.append(("exactly 0", ZERO, "square"))
    if cells.scale.nonfinite:
        entries.append(("NaN or Inf", NONFINITE, "x"))
    if np.isnan(cells.colour).any():
        entries.append(("not measured", NOT_MEASURED, "square"))
    for name, colour, symbol in entries:
        figure.add_trace(
            go.Scatter(
                x=[None],
                y=[None],
                name=name,
                mode="markers",
                marker={
                    "symbol": symbol,
                    "size": 11,
                    "color": colour,
                    "line": {"width": 1, "color": "rgba(128,128,128,0.8)"},
                },
                hoverinfo="skip",
            )
        )


def _add_marks(figure: go.Figure, marks: Sequence[Mark]) -> None:
    for mark in marks:
        # White dashes over a dark line are seen on every colour of the map.
        for line in (
            {"color": "rgba(0,0,0,0.7)", "width": 3},
            {"color": "#ffffff", "width": 1.5, "dash": "dash"},
        ):
            figure.add_shape(type="line", x0=mark.x, x1=mark.x, y0=0, y1=1, yref="paper", line=line)
        figure.add_annotation(
            x=mark.x,
            y=1,
            yref="paper",
            yshift=mark.lift_px,
            text=f"▼ {mark.text}" if mark.anchor == "left" else f"{mark.text} ▼",
            xanchor=mark.anchor,
            yanchor="bottom",
            showarrow=False,
            font={"size": 12},
        )
