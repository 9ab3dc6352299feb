"""What the pictures of the zoo's jobs are made of: curves, maps of layers, marks of findings."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from PIL import Image

from gradwatch.health.chain import links
from gradwatch.health.finding import Finding
from gradwatch.health.window import Window
from gradwatch.replay import Recording

from .fixtures import Key

Floats = NDArray[np.floating]
Color = str | tuple[float, float, float, float]

# Okabe and Ito's colours, which colour-blind people tell apart too.
FAULT, HEALTH, THIRD, QUIET = "#d55e00", "#0072b2", "#009e73", "#6b6b6b"
DEPTH = mpl.colormaps["viridis"]  # the input's layer is dark, the output's light
NONE, GONE, BROKEN = "#e6e6e6", "#ffffff", FAULT  # cells without gradient, of exactly 0, of NaN
DPI, COLORS = 180, 64
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


class Job(NamedTuple):
    """A job of the zoo as it was recorded, and what was said of it."""

    key: Key
    recording: Recording
    window: Window
    findings: Sequence[Finding]

    def told(self, kind: str) -> Finding:
        """Raises ValueError when the job was not told this kind."""
        for finding in self.findings:
            if finding.kind == kind:
                return finding
        raise ValueError(f"{self.key} was not told {kind}, but {[f.kind for f in self.findings]}")

    @property
    def steps(self) -> NDArray[np.int64]:
        return self.window.steps

    @property
    def loss(self) -> Floats:
        return self.window.scalar("loss")


def new_figure() -> Figure:
    return Figure(figsize=(8.6, 3.1), layout="constrained", facecolor="white")


def write_png(figure: Figure, path: Path) -> None:
    """Write a picture of few colours: a third of the size, and no difference to the eye."""
    full = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(full, dpi=DPI)
    full.seek(0)
    few = Image.open(full).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def onset(axes: Axes, finding: Finding, *, high: float = 0.97, left: bool = False) -> None:
    """A line where the finding begins. high: of its label, as a part of the height."""
    # Behind the curves: what leaps at that very step must be seen.
    axes.axvline(
        finding.first_step, color="black", linestyle=(0, (4, 2)), linewidth=1.1, zorder=1.5
    )
    axes.annotate(
        f"{finding.kind}, step {finding.first_step:,}",
        (finding.first_step, high),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-4 if left else 4, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        fontsize=8.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2},
    )


def say(axes: Axes, x: float, y: float, text: str, color: Color, **options: object) -> None:
    """A word beside a curve, in its colour. x, y: in the data's units."""
    given: dict[str, Any] = {"ha": "left", "va": "center", "fontsize": 8.5, **options}
    axes.text(x, y, text, color=color, **given)


def curve(
    axes: Axes, job: Job, values: Floats, color: Color, label: str, **options: object
) -> None:
    """Values over the steps at which they were measured."""
    known = np.isfinite(values)
    axes.plot(job.steps[known], values[known], color=color, label=label, **options)  # type: ignore[arg-type]


def layer_curves(axes: Axes, job: Job, values: Floats, names: Sequence[str]) -> None:
    """A curve a layer, coloured by depth. values: float[steps, layers]."""
    for place in range(values.shape[1]):
        color = DEPTH(0.9 * place / max(values.shape[1] - 1, 1))
        known = np.isfinite(values[:, place])
        axes.plot(job.steps[known], values[known, place], color=color, label=names[place])


def layer_map(figure: Figure, axes: Axes, job: Job, places: Sequence[int], first: int = 0) -> None:
    """Gradient RMS of layers over steps, the input's layer at the top.

    first: row of the window to begin with.
    """
    layers = [job.window.layers[place] for place in places]
    roots = np.sqrt([float(np.prod(layer.shape)) for layer in layers])
    norms = job.window.statistic("norm")[first:, places].T
    broken = job.window.statistic("nonfinite")[first:, places].T > 0
    sizes = norms / roots[:, None]
    shown = np.ma.masked_where(~(np.isfinite(sizes) & (sizes > 0)) | broken, sizes)
    image = axes.pcolormesh(
        np.append(job.steps[first:], job.steps[-1] + 1) - 0.5,
        np.arange(len(places) + 1) - 0.5,
        shown,
        norm=LogNorm(),
        cmap="viridis",
        rasterized=True,
    )
    states = ((np.isnan(norms) & ~broken, NONE), (norms == 0, GONE), (broken, BROKEN))
    for cells, color in states:
        for row, column in _stretches(cells):
            start = float(job.steps[first + column.start])
            stop = float(job.steps[first + column.stop - 1]) + 1
            axes.add_patch(
                Rectangle(
                    (start - 0.5, row - 0.5),
                    stop - start,
                    1,
                    facecolor=color,
                    edgecolor="#b0b0b0",
                    linewidth=0.4,
                    hatch="////" if color == GONE else None,
                )
            )
    axes.set_yticks(range(len(places)), [layer.name for layer in layers], fontsize=8)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_xlabel("step")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="gradient RMS", pad=0.015, aspect=14)


def _stretches(cells: NDArray[np.bool_]) -> Iterator[tuple[int, slice]]:
    """Runs of set cells along each row. cells: bool[rows, columns]."""
    for row, flags in enumerate(cells):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
        for start, stop in edges.reshape(-1, 2).tolist():
            yield row, slice(start, stop)


def map_legend(axes: Axes, *states: tuple[str, str]) -> None:
    """What cells without a colour of the scale mean: (colour, text)."""
    patches = [
        Patch(facecolor=color, edgecolor="#888888", hatch="////" if color == GONE else None)
        for color, _ in states
    ]
    axes.legend(
        patches,
        [text for _, text in states],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(states),
        fontsize=8.5,
        borderaxespad=0.1,
    )


def short(axes: Axes) -> None:
    """Large numbers of a logarithmic axis by their powers, small ones as they are."""

    def word(value: float, _: object) -> str:
        return f"{value:g}" if 1e-3 <= value < 1e4 else f"$10^{{{np.log10(value):.0f}}}$"

    axes.yaxis.set_major_formatter(FuncFormatter(word))


def two(figure: Figure, widths: Sequence[float] = (1, 1), *, sharey: bool = False) -> list[Axes]:
    """Axes side by side, with steps on x."""
    grid = figure.subplots(
        1, len(widths), gridspec_kw={"width_ratios": list(widths)}, sharey=sharey, squeeze=False
    )
    for axes in grid[0]:
        axes.set_xlabel("step")
    return list(grid[0])


def of_links(job: Job, statistic: str) -> Floats:
    """A statistic of the weight layers at the steps that measured it, NaN elsewhere. [steps, n]."""
    return job.window.statistic(statistic)[:, links(job.window)].astype(np.float64)


def link_names(job: Job) -> list[str]:
    return [job.window.layers[place].name for place in links(job.window)]


def parts(job: Job) -> list[int]:
    """Weights and biases of a job's model, in order of depth; not what only its optimizer holds."""
    layers = job.window.layers
    known = [place for place, layer in enumerate(layers) if ".parameter_" not in layer.name]
    return sorted(known, key=lambda place: (layers[place].depth, place))
