"""From frame rows to arrays: what detectors judge and what pictures show."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from gradwatch.health.window import Window
from gradwatch.windows import (
    BEGINNING_FRAMES,
    WINDOW_FRAMES,
    Layout,
    statistic_rows,
    window_of,
)
from gradwatch_server.models import NORMS, FrameRow, ManifestRow, Optimizer
from gradwatch_server.packing import unpack_frame
from gradwatch_server.ranks import read_manifest

__all__ = ["Layout", "load_layout", "load_window", "statistic_rows", "window_of"]


def load_layout(session: Session, optimizer: Optimizer, rank: int | None = None) -> Layout:
    """The layers of an optimizer, as one of its ranks described them, or all of them together."""
    speaker = optimizer.speaker if rank is None else rank
    rows = session.scalars(
        select(ManifestRow.body)
        .where(ManifestRow.optimizer_id == optimizer.id, ManifestRow.rank == speaker)
        .order_by(ManifestRow.version)
    )
    return Layout([read_manifest(body) for body in rows])


def load_window(session: Session, optimizer: Optimizer, frames: int = WINDOW_FRAMES) -> Window:
    """The first and the last measured frames of an optimizer, oldest first."""
    measured = select(FrameRow.step, FrameRow.body).where(
        FrameRow.optimizer_id == optimizer.id,
        FrameRow.rank == optimizer.speaker,
        FrameRow.holds >= NORMS,
    )
    beginning = min(BEGINNING_FRAMES, frames // 2)
    first = measured.order_by(FrameRow.step).limit(beginning)
    last = measured.order_by(FrameRow.step.desc()).limit(frames - beginning)
    bodies = {row.step: row.body for part in (first, last) for row in session.execute(part)}
    recorded = [
        unpack_frame(bodies[step], optimizer.name, optimizer.speaker, step)
        for step in sorted(bodies)
    ]
    return window_of(load_layout(session, optimizer), recorded)
