"""What pages ask for: one statistic over layers and steps, a step's gradient flow, curves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from gradwatch.wire.api import Flow, Heatmap, Scalars
from gradwatch.wire.frame import Frame
from gradwatch.wire.statistics import BY_NAME
from gradwatch_server.models import DETAILS, NORMS, SCALARS, FrameRow, Optimizer, Run
from gradwatch_server.packing import unpack_frame
from gradwatch_server.windows import load_layout, statistic_rows

MAX_COLUMNS = 2000
# Frames decoded at a time: bounds memory, whatever the length of the run.
CHUNK_FRAMES = 1000


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


def heatmap(
    session: Session,
    optimizer: Optimizer,
    statistic: str,
    first: int | None,
    last: int | None,
    columns: int,
) -> Heatmap:
    """One statistic over layers (in depth order) and steps, at most `columns` of them.

    Raises NotFoundError when the statistic has no such name.
    """
    if statistic not in BY_NAME:
        raise NotFoundError(f"{statistic!r} is no statistic; known are {', '.join(BY_NAME)}")
    layout = load_layout(session, optimizer)
    order = layout.by_depth()
    chosen = _frames_of(optimizer, NORMS, first, last)
    steps: list[int] = []
    values: list[NDArray[np.float32]] = []
    broken: list[NDArray[np.bool_]] = []
    for frames in _chunks(session, optimizer, chosen):
        measured = [frame for frame in frames if statistic in frame.columns]
        if measured:
            steps += [frame.step for frame in measured]
            values.append(statistic_rows(layout, measured, statistic))
            broken.append(statistic_rows(layout, measured, "nonfinite") > 0)
    low, high, nonfinite, starts = _fold(
        np.concatenate(values) if values else np.empty((0, len(order)), np.float32),
        np.concatenate(broken) if broken else np.empty((0, len(order)), np.bool_),
        columns,
    )
    return Heatmap(
        statistic=statistic,
        layers=[layout.layers[place].name for place in order],
        steps_bytes=np.array(steps, dtype="<i8")[starts].tobytes(),
        low_bytes=low.T[order].astype("<f4").tobytes(),
        high_bytes=high.T[order].astype("<f4").tobytes(),
        nonfinite_bytes=nonfinite.T[order].tobytes(),
    )


def _fold(
    values: NDArray[np.float32], broken: NDArray[np.bool_], columns: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
    """Rows in equal groups: smallest and largest finite value, any non-finite, first row of each.

    values: float32[rows, layers]; returns arrays of [groups, layers] and int64[groups].
    """
    groups = min(columns, len(values))
    starts = (np.arange(groups, dtype=np.int64) * len(values)) // max(1, groups)
    if not groups:
        return values, values, broken, starts
    finite = np.where(np.isfinite(values), values, np.float32(np.nan))
    low = np.fmin.reduceat(finite, starts, axis=0)
    high = np.fmax.reduceat(finite, starts, axis=0)
    return low, high, np.logical_or.reduceat(broken, starts, axis=0), starts


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


def scalars(session: Session, optimizer: Optimizer, columns: int) -> Scalars:
    """Scalars at up to `columns` steps, evenly chosen, the last one among them."""
    chosen = _frames_of(optimizer, SCALARS, None, None)
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
