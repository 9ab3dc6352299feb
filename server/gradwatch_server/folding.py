"""Folding what is stored into tiers: what is to be done stands in `stretches_due`.

Whoever stores a frame marks its stretch. A worker folds a marked stretch once the run is past it,
outside of any transaction, and writes it only when the mark is as it was: a frame that came
meanwhile, or another worker that was quicker, costs one fold in vain and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, delete, select, update
from sqlalchemy.orm import Session

from gradwatch.wire.frame import Frame
from gradwatch_server.database import reading, writing
from gradwatch_server.marks import mark_stretches
from gradwatch_server.merge import MERGED
from gradwatch_server.models import (
    GONE,
    WHOLE,
    FrameRow,
    ManifestRow,
    Optimizer,
    Run,
    Stretch,
    StretchDue,
)
from gradwatch_server.packing import unpack_frame
from gradwatch_server.ranks import read_manifest
from gradwatch_server.tiers import (
    TOP,
    Columns,
    Names,
    add_counts,
    add_histograms,
    fold_columns,
    fold_frames,
    pack_columns,
    pack_counts,
    stretch_steps,
    unpack_columns,
    unpack_counts,
)

log = logging.getLogger(__name__)

# How long a worker may take over the stretches that it claimed before another one tries.
LEASE_S = 60.0
# Stretches of one optimizer folded in a row and written in one transaction: 300 layers take 40 ms
# each, so that alerts, which share the worker, wait for less than a blink.
BATCH = 8


class _Folded(NamedTuple):
    """A stretch that is ready to be written."""

    columns: Columns
    manifest: int
    present: bytes
    frames: int  # what is left of them
    histograms: NDArray[np.uint64] | None
    repeated: int = 0  # frames that came again after those of their stretch had gone


def fold_due(engine: Engine, budget_s: float) -> bool:
    """Fold stretches that are over for about so long. Returns whether more are due."""
    began = time.monotonic()
    while time.monotonic() - began < budget_s:
        claim = _claim(engine)
        if claim is None:
            return False
        try:
            _fold(engine, claim)
        except Exception:
            # They are tried again when the lease ends; the others must not wait for that.
            log.exception("stretches of optimizer %d could not be folded", claim.optimizer_id)
    return True


class _Claim(NamedTuple):
    """Stretches of one tier of one optimizer that this worker is to fold."""

    run_id: int
    optimizer_id: int
    tier: int
    due: Sequence[StretchDue]


def _claim(engine: Engine) -> _Claim | None:
    """Take what nobody else is at, lower tiers first."""
    now = time.time()
    free = StretchDue.leased_until < now
    with Session(engine) as session:
        rows = session.execute(
            select(Optimizer.run_id, StretchDue.optimizer_id, StretchDue.tier, StretchDue.start)
            .join(Optimizer, Optimizer.id == StretchDue.optimizer_id)
            .where(Optimizer.run_id.is_not(None), StretchDue.until <= Optimizer.last_step, free)
            .order_by(StretchDue.tier, StretchDue.optimizer_id, StretchDue.start)
            .limit(BATCH)
        ).all()
    if not rows:
        return None
    run_id, optimizer_id, tier, _ = rows[0]
    assert run_id is not None
    taking = (
        update(StretchDue)
        .where(
            StretchDue.optimizer_id == optimizer_id,
            StretchDue.tier == tier,
            StretchDue.start.in_([row.start for row in rows if row[:3] == rows[0][:3]]),
            free,
        )
        .values(leased_until=now + LEASE_S)
        .returning(StretchDue)
    )
    with writing(engine) as session:
        session.expire_on_commit = False
        # The collector that marks these stretches holds this lock as well.
        session.get(Run, run_id, with_for_update=True)
        return _Claim(run_id, optimizer_id, tier, session.scalars(taking).all())


def _fold(engine: Engine, claim: _Claim) -> None:
    with reading(engine) as session:
        optimizer = session.get(Optimizer, claim.optimizer_id)
        if optimizer is None:
            return
        names = layer_names(session, optimizer)
        fold = _from_frames if claim.tier == 1 else _from_stretches
        folded = [fold(session, optimizer, names, due.start, due.tier) for due in claim.due]
    with writing(engine) as session:
        if session.get(Run, claim.run_id, with_for_update=True) is None:
            return
        for due, stretch in zip(claim.due, folded, strict=True):
            if not _settle(session, due) or stretch is None:
                continue
            _write(session, due, stretch)
            if due.tier < TOP:
                mark_stretches(session, due.optimizer_id, [due.start], due.tier + 1)
            session.get_one(Optimizer, due.optimizer_id).thinned += 1


def layer_names(session: Session, optimizer: Optimizer) -> Names:
    """Names of the layers of every version of the manifest that speaks for an optimizer."""
    rows = session.execute(
        select(ManifestRow.version, ManifestRow.body).where(
            ManifestRow.optimizer_id == optimizer.id, ManifestRow.rank == optimizer.speaker
        )
    )
    return {version: [layer.name for layer in read_manifest(body).layers] for version, body in rows}


def _from_frames(
    session: Session, optimizer: Optimizer, names: Names, start: int, tier: int
) -> _Folded | None:
    frames = _frames_in(session, optimizer, start, stretch_steps(tier))
    before = session.get(Stretch, (optimizer.id, tier, start))
    if before is not None and before.frames != WHOLE:
        return _with_late_frames(before, frames, names)
    if not frames:
        return None
    manifest = max(frame.manifest for frame in frames)
    return _Folded(
        fold_frames(frames, names, manifest),
        manifest,
        _bits([frame.step - start for frame in frames]),
        WHOLE,
        add_histograms(frames, names, manifest),
    )


def _frames_in(session: Session, optimizer: Optimizer, start: int, steps: int) -> list[Frame]:
    rows = session.execute(
        select(FrameRow.step, FrameRow.body)
        .where(
            FrameRow.optimizer_id == optimizer.id,
            FrameRow.rank == optimizer.speaker,
            FrameRow.step.between(start, start + steps - 1),
        )
        .order_by(FrameRow.step)
    )
    return [unpack_frame(body, optimizer.name, optimizer.speaker, step) for step, body in rows]


def _with_late_frames(before: Stretch, frames: Sequence[Frame], names: Names) -> _Folded:
    """A stretch whose frames are not what they were, with those that came since."""
    has = int.from_bytes(before.present, "little")
    new = [frame for frame in frames if not has >> (frame.step - before.start) & 1]
    manifest = max([before.manifest, *(frame.manifest for frame in new)])
    parts = [(unpack_columns(before.body), before.manifest)]
    counts: list[tuple[NDArray[np.uint64], int]] = []
    if before.histograms is not None:
        told = unpack_counts(before.histograms, len(names[before.manifest]))
        counts.append((told, before.manifest))
    if new:
        parts.append((fold_frames(new, names, manifest), manifest))
        added = add_histograms(new, names, manifest)
        counts += [] if added is None else [(added, manifest)]
    return _Folded(
        fold_columns(parts, names, manifest, before.tier),
        manifest,
        _bits([frame.step - before.start for frame in new], has),
        before.frames,
        add_counts(counts, names, manifest),
        len(frames) - len(new) if before.frames == GONE else 0,
    )


def _from_stretches(
    session: Session, optimizer: Optimizer, names: Names, start: int, tier: int
) -> _Folded | None:
    rows = session.scalars(
        select(Stretch)
        .where(
            Stretch.optimizer_id == optimizer.id,
            Stretch.tier == tier - 1,
            Stretch.start.between(start, start + stretch_steps(tier) - 1),
        )
        .order_by(Stretch.start)
    ).all()
    if not rows:
        return None
    manifest = max(row.manifest for row in rows)
    # One by one: the columns of all of them together would be 16 times what is kept.
    parts = [
        (fold_columns([(unpack_columns(row.body), row.manifest)], names, manifest, tier), manifest)
        for row in rows
    ]
    counts = [
        (unpack_counts(row.histograms, len(names[row.manifest])), row.manifest)
        for row in rows
        if row.histograms is not None
    ]
    return _Folded(
        fold_columns(parts, names, manifest, tier),
        manifest,
        b"",
        WHOLE,
        add_counts(counts, names, manifest),
    )


def _settle(session: Session, due: StretchDue) -> bool:
    """Take a stretch off the list, unless it has changed since it was claimed: then again."""
    key = (
        StretchDue.optimizer_id == due.optimizer_id,
        StretchDue.tier == due.tier,
        StretchDue.start == due.start,
    )
    done = delete(StretchDue).where(*key, StretchDue.changes == due.changes)
    if session.scalar(done.returning(StretchDue.start)) is not None:
        return True
    session.execute(update(StretchDue).where(*key).values(leased_until=0.0))
    return False


def _write(session: Session, due: StretchDue, folded: _Folded) -> None:
    session.merge(
        Stretch(
            optimizer_id=due.optimizer_id,
            tier=due.tier,
            start=due.start,
            columns=len(folded.columns.first),
            manifest=folded.manifest,
            folded_at=time.time(),
            present=folded.present,
            frames=folded.frames,
            body=pack_columns(folded.columns),
            histograms=None if folded.histograms is None else pack_counts(folded.histograms),
        )
    )
    if folded.frames == GONE:
        optimizer = session.get_one(Optimizer, due.optimizer_id)
        if optimizer.speaker != MERGED:
            optimizer.frames -= folded.repeated
        session.execute(
            delete(FrameRow).where(
                FrameRow.optimizer_id == due.optimizer_id,
                FrameRow.rank == optimizer.speaker,
                FrameRow.step.between(due.start, due.until - 1),
            )
        )


def _bits(places: Sequence[int], known: int = 0) -> bytes:
    for place in places:
        known |= 1 << place
    return known.to_bytes(stretch_steps(1) // 8, "little")
