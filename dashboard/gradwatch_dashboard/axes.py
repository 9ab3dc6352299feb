"""Axes that figures share: rows of layers with their names, and ticks at powers of ten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch_dashboard.formats import elide, power_of_ten

NAME_WIDTH = 34  # characters of a layer's name beside its row
ROW_PX = 24
MIN_ROWS_PX = 200
MAX_ROWS_PX = 900
LABEL_PX = 13  # height of one label with its gap
MAX_TICKS = 8
GRID = "rgba(128,128,128,0.25)"


def rows_height(layers: int) -> int:
    """Height in pixels of a plot with one row a layer; it stops growing at a page's height."""
    return min(max(layers * ROW_PX, MIN_ROWS_PX), MAX_ROWS_PX)


def layer_axis(layers: Sequence[str], standoff_px: int = 0) -> dict[str, Any]:
    """A y axis with one row a layer, the input's at the top, long names elided.

    When not every row has room for its name, each so-many-th has. standoff_px: between names and
    rows.
    """
    count = len(layers)
    stride = max(math.ceil(count * LABEL_PX / rows_height(count)), 1)
    shown = range(0, count, stride)
    # plotly hovers with a tick's text where it finds one at the row's exact place, and with the
    # full name otherwise: so a tick stands a five-thousandth of the axis beside its row.
    beside = count * 0.0002
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": list(layers),
        "range": [count - 0.5, -0.5],
        "tickmode": "array",
        "tickvals": [row + beside for row in shown],
        "ticktext": [elide(layers[row], NAME_WIDTH) for row in shown],
        "ticks": "",
        "ticklabelstandoff": standoff_px,
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
        "title": None,
        "tickfont": {"size": 11},
    }


def decades(low: float, high: float) -> list[int]:
    """At most MAX_TICKS + 1 evenly spaced exponents that cover [low, high]."""
    first, last = math.floor(low), math.ceil(high)
    stride = max(math.ceil((last - first) / MAX_TICKS), 1)
    return list(range(first, last + 1, stride))


def decade_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks at powers of ten for an axis or colour bar that shows log10 values."""
    exponents = decades(low, high)
    return {
        "tickmode": "array",
        "tickvals": exponents,
        "ticktext": [power_of_ten(exponent) for exponent in exponents],
    }


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A log axis over [10^low, 10^high] with ticks at powers of ten."""
    ticks = decade_ticks(low, high)
    ticks["tickvals"] = [10.0**exponent for exponent in ticks["tickvals"]]
    return {"type": "log", "range": [low, high], "gridcolor": GRID, "zeroline": False, **ticks}


def log_range(values: NDArray[Any]) -> tuple[float, float]:
    """Whole decades that hold every positive finite value, at least one; (-1, 0) for none."""
    values = np.asarray(values, dtype=np.float64)
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return -1.0, 0.0
    # float32 puts 1e-6 a hair below 10^-6; that must not open another decade.
    low = math.floor(math.log10(positive.min()) + 1e-6)
    high = math.ceil(math.log10(positive.max()) - 1e-6)
    return float(low), float(max(high, low + 1))


def kept_range(low: float, high: float) -> dict[str, Any]:
    """At most [low, high], as an automatic range.

    A range of its own would be a new one with every step, and plotly then drops a reader's zoom.
    """
    return {"autorange": True, "autorangeoptions": {"clipmin": low, "clipmax": high}}


def steps_axis(steps: NDArray[np.int64], *, cells: bool = False) -> dict[str, Any]:
    """An axis over exactly these steps; with `cells`, half a column further at both ends."""
    axis: dict[str, Any] = {"title": {"text": "step"}, "showgrid": False, "zeroline": False}
    if steps.size > 1:
        first, last = float(steps[0]), float(steps[-1])
        margin = (last - first) / (steps.size - 1) / 2 if cells else 0.0
        axis |= kept_range(first - margin, last + margin)
    return axis


def plotly_steps(steps: NDArray[np.int64]) -> NDArray[Any]:
    """Steps in a type that plotly sends as bytes: a browser has no arrays of 64-bit integers."""
    fits = steps.size == 0 or int(steps.max()) < 2**31
    return steps.astype(np.int32 if fits else np.float64)
