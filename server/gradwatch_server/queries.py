"""What pages ask for: one statistic over layers and steps, a step's gradient flow, curves."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from gradwatch.health.finding import Severity
from gradwatch.health.score import LAYER_DEFINITION, layer_scores
from gradwatch.wire.api import Flow, Heatmap, Histograms, LayersView, LayerView, Scalars
from gradwatch.wire.statistics import BY_NAME
from gradwatch_server.database import finite
from gradwatch_server.models import (
    DETAILS,
    GONE,
    NORMS,
    OPEN,
    FindingRow,
    FrameRow,
    Optimizer,
    Run,
    Stretch,
)
from gradwatch_server.packing import unpack_frame
from gradwatch_server.tiered import Span as Span
from gradwatch_server.tiered import equal_groups, read_histograms, read_scalars, read_statistic
from gradwatch_server.tiers import by_squares, join_columns
from gradwatch_server.windows import Layout, load_layout, statistic_rows

MAX_COLUMNS = 2000
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
    names = [layout.layers[place].name for place in order]
    span = span._replace(columns=min(span.columns, max(1, MAX_CELLS // max(1, len(order)))))
    grid = read_statistic(session, optimizer, span, statistic, names)
    return Heatmap(
        statistic=statistic,
        layers=names,
        steps_bytes=grid.steps.astype("<i8").tobytes(),
        low_bytes=grid.fold.low.T.astype("<f4").tobytes(),
        mean_bytes=grid.fold.mean(by_squares(statistic)).T.astype("<f4").tobytes(),
        high_bytes=grid.fold.high.T.astype("<f4").tobytes(),
        nonfinite_bytes=grid.broken.T.tobytes(),
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


def histograms(session: Session, optimizer: Optimizer, layer: str, span: Span) -> Histograms:
    """One layer's histograms over steps, neighbours added up to at most `span.columns` of them.

    Raises NotFoundError when there is no such layer.
    """
    known = {item.name for item in load_layout(session, optimizer).layers}
    if layer not in known:
        raise NotFoundError(f"optimizer {optimizer.name!r} has no layer {layer!r}")
    steps, counts = read_histograms(session, optimizer, span, layer)
    starts = equal_groups(len(steps), span.columns)
    added = np.add.reduceat(counts, starts, axis=0) if len(starts) else counts
    return Histograms(
        layer=layer,
        steps_bytes=steps[starts].astype("<i8").tobytes(),
        counts_bytes=added.astype("<u8").tobytes(),
    )


def flow(session: Session, optimizer: Optimizer, step: int | None) -> Flow:
    """Every statistic of the last detail frame at or before `step`. Raises NotFoundError."""
    details = select(FrameRow.step, FrameRow.body).where(
        FrameRow.optimizer_id == optimizer.id,
        FrameRow.rank == optimizer.speaker,
        FrameRow.holds >= DETAILS,
    )
    if step is not None:
        details = details.where(FrameRow.step <= step)
    row = session.execute(details.order_by(FrameRow.step.desc()).limit(1)).first()
    # A frame of the run's beginning does not stand for those after it that are gone.
    gone = select(Stretch.start).where(
        Stretch.optimizer_id == optimizer.id,
        Stretch.tier == 1,
        Stretch.frames == GONE,
        Stretch.start > (-1 if row is None else row.step),
        Stretch.start <= (optimizer.last_step if step is None else step),
    )
    if session.scalar(gone.limit(1)) is not None:
        raise NotFoundError(
            "frames of single steps are not kept for so long here; the heatmap and the curves "
            "still hold what they were folded into"
        )
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


def layers(session: Session, optimizer: Optimizer) -> LayersView:
    """How each layer does: its health, what is open of it, and its last gradient norm."""
    layout = load_layout(session, optimizer)
    run = session.get_one(Run, optimizer.run_id)
    standing = session.scalars(
        select(FindingRow).where(
            FindingRow.run_id == run.id,
            FindingRow.optimizer.in_(("", optimizer.name)),
            FindingRow.state == OPEN,
            FindingRow.muted_at.is_(None),
        )
    ).all()
    gravest_first = sorted(standing, key=lambda row: -Severity(row.severity).rank)
    names = [layer.name for layer in layout.layers]
    told = [(Severity(row.severity), row.layers) for row in gravest_first]
    scores = layer_scores(told, names) if run.judged else {}
    step, norms = _last_norms(session, optimizer, layout)
    return LayersView(
        definition=LAYER_DEFINITION,
        step=step,
        layers=[
            LayerView(
                name=names[place],
                role=layout.layers[place].role,
                score=round(scores[names[place]], 1) if scores else None,
                findings=[row.kind for row in gravest_first if names[place] in row.layers],
                norm=finite(float(norms[place])),
            )
            for place in layout.by_depth()
        ],
    )


def _last_norms(
    session: Session, optimizer: Optimizer, layout: Layout
) -> tuple[int | None, NDArray[np.float32]]:
    """The last step at which gradients were looked at, and float32[layers]."""
    last = (
        select(FrameRow.step, FrameRow.body)
        .where(
            FrameRow.optimizer_id == optimizer.id,
            FrameRow.rank == optimizer.speaker,
            FrameRow.holds >= NORMS,
        )
        .order_by(FrameRow.step.desc())
        .limit(1)
    )
    row = session.execute(last).first()
    if row is None:
        return None, np.full(len(layout.layers), np.nan, dtype=np.float32)
    frame = unpack_frame(row.body, optimizer.name, optimizer.speaker, row.step)
    return row.step, statistic_rows(layout, [frame], "norm")[0]


def scalars(session: Session, optimizer: Optimizer, span: Span) -> Scalars:
    """Scalars over steps, in at most `span.columns` columns that end at steps which are recorded,
    the last one at the last of them."""
    found = read_scalars(session, optimizer, span)
    whole = join_columns(found, equal_groups(len(found.first), span.columns))
    folded = {name: course for name, course in whole.scalars.items() if (course.logged > 1).any()}

    def sent(values: dict[str, NDArray[np.float64]]) -> dict[str, bytes]:
        return {name: series.astype("<f8").tobytes() for name, series in values.items()}

    broken = {name: course.logged > course.fold.finite for name, course in whole.scalars.items()}
    return Scalars(
        steps_bytes=whole.last.astype("<i8").tobytes(),
        series_bytes=sent({name: course.newest for name, course in whole.scalars.items()}),
        broken_bytes={name: flags.tobytes() for name, flags in broken.items() if flags.any()},
        low_bytes=sent({name: course.fold.low for name, course in folded.items()}),
        mean_bytes=sent({name: course.fold.mean(False) for name, course in folded.items()}),
        high_bytes=sent({name: course.fold.high for name, course in folded.items()}),
    )
