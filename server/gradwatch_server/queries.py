"""What pages ask for: one statistic over layers and steps, a step's gradient flow, curves."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from gradwatch.wire.api import Flow, Heatmap, Histograms, Scalars
from gradwatch.wire.frame import Frame
from gradwatch.wire.histogram import BUCKETS
from gradwatch.wire.statistics import BY_NAME, Merge
from gradwatch_server.models import DETAILS, NORMS, SCALARS, FrameRow, Optimizer, Run
from gradwatch_server.packing import unpack_frame, unpack_histograms
from gradwatch_server.windows import Layout, load_layout, statistic_rows

MAX_COLUMNS = 2000
# Frames decoded at a time: bounds memory, whatever the length of the run.
CHUNK_FRAMES = 1000
# Cells of a heatmap: the columns are fewer where the layers are very many.
MAX_CELLS = 4_000_000


class NotFoundError(LookupError):
    """There is no such run, optimizer or frame. The message says which."""


def find_run(session: Session, run_key: str) -> Run:
    """Raises NotFoundError."""
    run = session.scalar(select(Run).where(Run.key == run_key))
    if run is None:
        raise NotFoundError(f"there is no run {run_key!r}")
    return run


def find_optimizer(session: Session, run_key: str, name: str) -> Optimizer:
    """Raises NotFoundError."""
    run = find_run(session, run_key)
    optimizer = session.scalar(
        select(Optimizer).where(Optimizer.run_id == run.id, Optimizer.name == name)
    )
    if optimizer is None:
        raise NotFoundError(f"run {run_key!r} has no optimizer {name!r}")
    return optimizer


class Span(NamedTuple):
    """Steps to answer for, and in how many columns; None for the first and the last there is."""

    first: int | None
    last: int | None
    columns: int


class Folded(NamedTuple):
    """Rows in groups: the finite values of each, any non-finite one, and the first row of each.

    low, mean, high: float32[groups, layers]; nonfinite: bool[groups, layers]; starts: int64[groups]
    """

    low: NDArray[np.float32]
    mean: NDArray[np.float32]
    high: NDArray[np.float32]
    nonfinite: NDArray[np.bool_]
    starts: NDArray[np.int64]


def heatmap(
    session: Session, optimizer: Optimizer, statistic: str, span: Span, pattern: str | None = None
) -> Heatmap:
    """One statistic over layers (in depth order) and steps, at most `span.columns` of them.

    pattern: of the layers' names, as "blocks.0.*"; None for all. Raises NotFoundError when the
    statistic has no such name, or no layer fits.
    """
    if statistic not in BY_NAME:
        raise NotFoundError(f"{statistic!r} is no statistic; known are {', '.join(BY_NAME)}")
    layout = load_layout(session, optimizer)
    order = _fitting(layout, pattern)
    chosen = _frames_of(optimizer, NORMS, span.first, span.last)
    steps: list[int] = []
    values: list[NDArray[np.float32]] = []
    broken: list[NDArray[np.bool_]] = []
    for frames in _chunks(session, optimizer, chosen):
        measured = [frame for frame in frames if statistic in frame.columns]
        if measured:
            steps += [frame.step for frame in measured]
            values.append(statistic_rows(layout, measured, statistic)[:, order])
            broken.append(statistic_rows(layout, measured, "nonfinite")[:, order] > 0)
    folded = _fold(
        np.concatenate(values) if values else np.empty((0, len(order)), np.float32),
        np.concatenate(broken) if broken else np.empty((0, len(order)), np.bool_),
        min(span.columns, max(1, MAX_CELLS // max(1, len(order)))),
        BY_NAME[statistic].merge is Merge.ROOT_SUM_SQUARES,
    )
    return Heatmap(
        statistic=statistic,
        layers=[layout.layers[place].name for place in order],
        steps_bytes=np.array(steps, dtype="<i8")[folded.starts].tobytes(),
        low_bytes=folded.low.T.astype("<f4").tobytes(),
        mean_bytes=folded.mean.T.astype("<f4").tobytes(),
        high_bytes=folded.high.T.astype("<f4").tobytes(),
        nonfinite_bytes=folded.nonfinite.T.tobytes(),
    )


def _fitting(layout: Layout, pattern: str | None) -> NDArray[np.int64]:
    """Places of the layers whose names fit, the input's first. Raises NotFoundError for none."""
    order = layout.by_depth()
    if pattern is None:
        return order
    fits = [fnmatchcase(layout.layers[place].name, pattern) for place in order]
    if not any(fits):
        raise NotFoundError(f"no layer fits {pattern!r}; * stands for any text, as in 'blocks.0.*'")
    return order[fits]


def _fold(
    values: NDArray[np.float32], broken: NDArray[np.bool_], columns: int, squares: bool
) -> Folded:
    """Rows in at most `columns` groups of equal size. values: float32[rows, layers].

    squares: the mean is the root of the mean square.
    """
    groups = min(columns, len(values))
    starts = (np.arange(groups, dtype=np.int64) * len(values)) // max(1, groups)
    if not groups:
        return Folded(values, values, values, broken, starts)
    known = np.isfinite(values)
    finite = np.where(known, values, np.float32(np.nan))
    wide = np.where(known, values, 0.0).astype(np.float64)
    counts = np.add.reduceat(known, starts, axis=0, dtype=np.int64)
    sums = np.add.reduceat(wide * wide if squares else wide, starts, axis=0)
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return Folded(
        np.fmin.reduceat(finite, starts, axis=0),
        (np.sqrt(means) if squares else means).astype(np.float32),
        np.fmax.reduceat(finite, starts, axis=0),
        np.logical_or.reduceat(broken, starts, axis=0),
        starts,
    )


def histograms(session: Session, optimizer: Optimizer, layer: str, span: Span) -> Histograms:
    """One layer's histograms over steps, neighbours added up to at most `span.columns` of them.

    Raises NotFoundError when there is no such layer.
    """
    layout = load_layout(session, optimizer)
    place = next((at for at, item in enumerate(layout.layers) if item.name == layer), None)
    if place is None:
        raise NotFoundError(f"optimizer {optimizer.name!r} has no layer {layer!r}")
    steps: list[int] = []
    counts: list[NDArray[np.uint32]] = []
    for frames in _chunks(
        session, optimizer, _frames_of(optimizer, DETAILS, span.first, span.last)
    ):
        for frame in frames:
            found = unpack_histograms(frame)
            row = None if found is None else layout.column(frame.manifest, place)
            if found is not None and row is not None:
                steps.append(frame.step)
                counts.append(found[row])
    groups = min(span.columns, len(steps))
    starts = (np.arange(groups, dtype=np.int64) * len(steps)) // max(1, groups)
    rows = np.array(counts, dtype="<u8").reshape(-1, BUCKETS)
    added = np.add.reduceat(rows, starts, axis=0) if groups else rows
    return Histograms(
        layer=layer,
        steps_bytes=np.array(steps, dtype="<i8")[starts].tobytes(),
        counts_bytes=added.tobytes(),
    )


def flow(session: Session, optimizer: Optimizer, step: int | None) -> Flow:
    """Every statistic of the last detail frame at or before `step`. Raises NotFoundError."""
    newest = _frames_of(optimizer, DETAILS, None, step)
    row = session.execute(newest.order_by(None).order_by(FrameRow.step.desc()).limit(1)).first()
    if row is None:
        raise NotFoundError("no detail frame has come yet")
    frame = unpack_frame(row.body, optimizer.name, optimizer.speaker, row.step)
    layout = load_layout(session, optimizer)
    order = layout.by_depth()
    statistics: dict[str, list[float | None]] = {}
    for name in frame.columns:
        row = statistic_rows(layout, [frame], name)[0][order]
        statistics[name] = [float(value) if np.isfinite(value) else None for value in row]
    return Flow(
        step=frame.step,
        layers=[layout.layers[place].name for place in order],
        roles=[layout.layers[place].role for place in order],
        statistics=statistics,
    )


def scalars(
    session: Session,
    optimizer: Optimizer,
    columns: int,
    first: int | None = None,
    last: int | None = None,
) -> Scalars:
    """Scalars at up to `columns` steps, evenly chosen, the last one among them."""
    chosen = _frames_of(optimizer, SCALARS, first, last)
    steps: list[int] = []
    found: list[dict[str, float]] = []
    for frames in _chunks(session, optimizer, chosen):
        steps += [frame.step for frame in frames]
        found += [frame.scalars for frame in frames]
    picked = np.unique(np.linspace(0, max(0, len(steps) - 1), min(columns, len(steps)), dtype=int))
    names = sorted({name for values in found for name in values})
    missing = float("nan")
    series = {
        name: np.array([found[place].get(name, missing) for place in picked], "<f8")
        for name in names
    }
    broken = {
        name: np.array([name in found[place] for place in picked], "?") & ~np.isfinite(values)
        for name, values in series.items()
    }
    return Scalars(
        steps_bytes=np.array(steps, dtype="<i8")[picked].tobytes(),
        series_bytes={name: values.tobytes() for name, values in series.items()},
        broken_bytes={name: flags.tobytes() for name, flags in broken.items() if flags.any()},
    )


def _frames_of(
    optimizer: Optimizer, holds: int, first: int | None, last: int | None
) -> Select[int, bytes]:
    """Steps and bodies of frames that hold at least so much, in ascending order of step."""
    chosen = select(FrameRow.step, FrameRow.body).where(
        FrameRow.optimizer_id == optimizer.id,
        FrameRow.rank == optimizer.speaker,
        FrameRow.holds >= holds,
    )
    if first is not None:
        chosen = chosen.where(FrameRow.step >= first)
    if last is not None:
        chosen = chosen.where(FrameRow.step <= last)
    return chosen.order_by(FrameRow.step)


def _chunks(
    session: Session, optimizer: Optimizer, chosen: Select[int, bytes]
) -> Iterator[list[Frame]]:
    streamed = session.execute(chosen.execution_options(yield_per=CHUNK_FRAMES))
    for rows in streamed.partitions():
        yield [unpack_frame(body, optimizer.name, optimizer.speaker, step) for step, body in rows]
