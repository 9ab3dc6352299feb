"""From frame rows to arrays: what detectors judge and what pictures show."""

from __future__ import annotations

from functools import lru_cache

from sqlalchemy import bindparam, select
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


# Made once: to put a query together costs as much as to run it.
_MANIFESTS = (
    select(ManifestRow.__table__.c.body)
    .where(
        ManifestRow.__table__.c.optimizer_id == bindparam("optimizer"),
        ManifestRow.__table__.c.rank == bindparam("speaker"),
    )
    .order_by(ManifestRow.__table__.c.version)
)
_FRAMES = FrameRow.__table__.c
_MEASURED = select(_FRAMES.step, _FRAMES.digest).where(
    _FRAMES.optimizer_id == bindparam("optimizer"),
    _FRAMES.rank == bindparam("speaker"),
    _FRAMES.holds >= NORMS,
)
_PARTS = (
    _MEASURED.order_by(_FRAMES.step).limit(BEGINNING_FRAMES),
    _MEASURED.order_by(_FRAMES.step.desc()).limit(WINDOW_FRAMES - BEGINNING_FRAMES),
)
_BODIES = _MEASURED.add_columns(_FRAMES.body).where(
    _FRAMES.step.in_(bindparam("steps", expanding=True)),
    # By the range too: see ingest._Batch._stored_digests.
    _FRAMES.step.between(bindparam("first"), bindparam("last")),
)


def load_layout(session: Session, optimizer: Optimizer, rank: int | None = None) -> Layout:
    """The layers of an optimizer, as one of its ranks described them, or all of them together."""
    own = {"optimizer": optimizer.id, "speaker": optimizer.speaker if rank is None else rank}
    return _layout(tuple(body for (body,) in session.connection().execute(_MANIFESTS, own)))


# By what is stored, not by whose it is: runs of a team share it, and what is found out of it.
@lru_cache(maxsize=512)
def _layout(manifests: tuple[bytes, ...]) -> Layout:
    return Layout([read_manifest(body) for body in manifests])


def load_window(session: Session, optimizer: Optimizer, cache: FrameCache | None = None) -> Window:
    """The first and the last measured frames of an optimizer, oldest first.

    cache: what was read before; nothing of it is read again, and it takes in what is new.
    """
    connection = session.connection()
    own = {"optimizer": optimizer.id, "speaker": optimizer.speaker}
    known = cache.frames(optimizer.id) if cache is not None else {}
    found: dict[Key, Frame] = {}
    for part in _PARTS:
        stored: list[Key] = [tuple(row) for row in connection.execute(part, own).all()]
        found |= {each: known[each] for each in stored if each in known}
        new = [step for step, digest in stored if (step, digest) not in found]
        if new:
            chosen = own | {"steps": new, "first": min(new), "last": max(new)}
            for step, digest, body in connection.execute(_BODIES, chosen):
                frame = unpack_frame(body, optimizer.name, optimizer.speaker, step)
                found[step, digest] = slim(frame)
    if cache is not None:
        cache.keep(optimizer.id, found)
    recorded = [found[each] for each in sorted(found)]
    return window_of(load_layout(session, optimizer), recorded)
