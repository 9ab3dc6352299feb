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
from gradwatch.wire.frame import Frame
from gradwatch_server.frame_cache import FrameCache, Key, slim
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


def load_window(session: Session, optimizer: Optimizer, cache: FrameCache | None = None) -> Window:
    """The first and the last measured frames of an optimizer, oldest first.

    cache: what was read before; nothing of it is read again, and it takes in what is new.
    """
    key = (FrameRow.step, FrameRow.digest)
    measured = (
        FrameRow.optimizer_id == optimizer.id,
        FrameRow.rank == optimizer.speaker,
        FrameRow.holds >= NORMS,
    )
    keys = select(*key).where(*measured)
    first = keys.order_by(FrameRow.step).limit(BEGINNING_FRAMES)
    last = keys.order_by(FrameRow.step.desc()).limit(WINDOW_FRAMES - BEGINNING_FRAMES)
    known = cache.frames(optimizer.id) if cache is not None else {}
    found: dict[Key, Frame] = {}
    for part in (first, last):
        stored = [(step, digest) for step, digest in session.execute(part)]
        found |= {each: known[each] for each in stored if each in known}
        new = [step for step, digest in stored if (step, digest) not in found]
        if new:
            # By the range too: see ingest._Batch._stored_digests.
            chosen = (FrameRow.step.in_(new), FrameRow.step.between(min(new), max(new)))
            rows = select(*key, FrameRow.body).where(*measured, *chosen)
            for step, digest, body in session.execute(rows):
                frame = unpack_frame(body, optimizer.name, optimizer.speaker, step)
                found[step, digest] = slim(frame)
    if cache is not None:
        cache.keep(optimizer.id, found)
    recorded = [found[each] for each in sorted(found)]
    return window_of(load_layout(session, optimizer), recorded)
