"""From frame rows to arrays: what detectors judge and what pictures show."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from gradwatch.health.window import Window
from gradwatch.windows import Layout, statistic_rows, window_of
from gradwatch.wire.codec import decode_frame, decode_manifest
from gradwatch_server.models import NORMS, FrameRow, ManifestRow, Optimizer

# Frames that a judgement looks at: some minutes of a quick job, with dozens of detail frames.
WINDOW_FRAMES = 512
# Until ranks are merged, the first one speaks for the run: it has the average under DDP.
SPEAKING_RANK = 0


__all__ = ["Layout", "load_layout", "load_window", "statistic_rows", "window_of"]


def load_layout(session: Session, optimizer: Optimizer, rank: int = SPEAKING_RANK) -> Layout:
    """The layers of an optimizer, as one of its ranks described them."""
    rows = session.scalars(
        select(ManifestRow.body)
        .where(ManifestRow.optimizer_id == optimizer.id, ManifestRow.rank == rank)
        .order_by(ManifestRow.version)
    )
    return Layout([decode_manifest(body) for body in rows])


def load_window(session: Session, optimizer: Optimizer, frames: int = WINDOW_FRAMES) -> Window:
    """The last measured frames of an optimizer, oldest first."""
    bodies = session.scalars(
        select(FrameRow.body)
        .where(
            FrameRow.optimizer_id == optimizer.id,
            FrameRow.rank == SPEAKING_RANK,
            FrameRow.holds >= NORMS,
        )
        .order_by(FrameRow.step.desc())
        .limit(frames)
    ).all()
    return window_of(load_layout(session, optimizer), map(decode_frame, reversed(bodies)))
