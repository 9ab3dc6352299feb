"""Curves of a run's scalars over steps: loss, norms and learning rate, one panel a unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from gradwatch.wire.api import FindingView, Scalars
from gradwatch_dashboard.axes import GRID, kept_range, log_axis, log_range, plotly_steps, steps_axis
from gradwatch_dashboard.formats import number
from gradwatch_dashboard.heatmap import NONFINITE
from gradwatch_dashboard.marks import finding_marks

PANEL_PX, GAP_PX, TOP_PX, BOTTOM_PX = 140, 44, 30, 44
MAX_PANELS = 6
MAX_CURVES = 4  # of one panel
RATES = ("lr", "learning_rate")
TIMES = ("step_time_s", "rank_slowest_s", "rank_others_s", "rank_others_wait_s")
LOG_SPAN = 50.0  # a panel whose largest value is this many times its smallest has a log axis
CURVES = ("#3182bd", "#e6a100", "#7b4fb5", "#2a9d73")


def panels(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Title and names of each panel: losses and norms together, then each other scalar; last the
    times of a step, together, and what ranks are compared by."""
    found: dict[tuple[int, str], list[str]] = {}
    for name in sorted(names):
        found.setdefault(_panel(name), []).append(name)
    ordered = [(title, held[:MAX_CURVES]) for (_, title), held in sorted(found.items())]
    return ordered[:MAX_PANELS]


def _panel(name: str) -> tuple[int, str]:
    """Place and title of the panel that shows a scalar."""
    if "loss" in name:
        return 0, "loss"
    if "norm" in name:
        return 1, "gradient norm"
    if name in RATES:
        return 2, name
    if name in TIMES:
        return 4, "seconds a step"
    return (5 if name.startswith("rank_") else 3), name


def scalars_figure(scalars: Scalars, findings: Sequence[FindingView] = ()) -> go.Figure:
    """One panel a unit over a common axis of steps; a dashed line where each finding begins.

    A NaN or Inf is a cross on the panel's upper edge: a curve cannot show it.
    """
    steps = plotly_steps(scalars.steps)
    chosen = panels(scalars.series_bytes)
    rows = max(len(chosen), 1)
    height = rows * PANEL_PX + (rows - 1) * GAP_PX
    figure = make_subplots(
        rows=rows,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=GAP_PX / height if rows > 1 else 0,
        subplot_titles=[title for title, _ in chosen],
    )
    colour = iter(CURVES * rows)
    for row, (_, names) in enumerate(chosen, start=1):
        series = [scalars.series(name) for name in names]
        figure.update_yaxes(_value_axis(np.concatenate(series)), row=row, col=1)
        for name, values in zip(names, series, strict=True):
            _add_curve(figure, steps, name, values, next(colour), row, legend=len(names) > 1)
            _add_crosses(figure, steps, name, values, scalars.broken(name), row)
    for mark in finding_marks(findings, scalars.steps):
        figure.add_vline(x=mark.x, line={"color": "rgb(128,128,128)", "width": 1.5, "dash": "dash"})
    # Titles stand over the start of their panel, where the eye begins.
    figure.update_annotations(x=0, xanchor="left", font={"size": 13})
    figure.update_xaxes(steps_axis(scalars.steps) | {"title": None, "matches": "x"})
    figure.update_xaxes(title={"text": "step"}, row=rows, col=1)
    figure.update_layout(
        height=height + TOP_PX + BOTTOM_PX,
        margin={"l": 8, "r": 12, "t": TOP_PX, "b": BOTTOM_PX},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
        hovermode="x",
        uirevision="scalars",
    )
    return figure


def _value_axis(values: NDArray[np.float64]) -> dict[str, Any]:
    axis: dict[str, Any] = {"gridcolor": GRID, "zeroline": False, "automargin": True}
    finite = values[np.isfinite(values)]
    if finite.size and finite.min() > 0 and finite.max() > LOG_SPAN * finite.min():
        axis |= log_axis(*log_range(finite)) | {"range": None}
    else:
        axis["exponentformat"] = "power"
        if finite.size and finite.min() >= 0:
            # From 0, so that noise on a flat curve looks flat.
            axis |= {"rangemode": "tozero", **kept_range(0, float(finite.max()) * 1.1 or 1.0)}
    return axis


def _add_curve(
    figure: go.Figure,
    steps: NDArray[Any],
    name: str,
    values: NDArray[np.float64],
    colour: str,
    row: int,
    *,
    legend: bool,
) -> None:
    finite = np.isfinite(values)
    figure.add_trace(
        go.Scatter(
            x=steps[finite],
            y=values[finite].astype(np.float32),
            name=name,
            mode="lines" if finite.sum() > 1 else "markers",
            line={"color": colour, "width": 1.8},
            showlegend=legend,
            hovertemplate=f"{name} %{{y:,.4~g}}<extra></extra>",
        ),
        row=row,
        col=1,
    )


def _add_crosses(
    figure: go.Figure,
    steps: NDArray[Any],
    name: str,
    values: NDArray[np.float64],
    broken: NDArray[np.bool_],
    row: int,
) -> None:
    """Crosses where the scalar was logged as NaN or Inf. broken: bool[n]."""
    if not broken.any():
        return
    finite = np.isfinite(values)
    edge = values[finite].max() if finite.any() else 1.0
    figure.add_trace(
        go.Scatter(
            x=steps[broken],
            y=np.full(int(broken.sum()), edge, dtype=np.float32),
            name=f"{name} not finite",
            mode="markers",
            marker={"symbol": "x", "size": 8, "color": NONFINITE},
            showlegend=False,
            text=[number(float(value)) for value in values[broken]],
            hovertemplate=f"{name} %{{text}}<extra></extra>",
        ),
        row=row,
        col=1,
    )
