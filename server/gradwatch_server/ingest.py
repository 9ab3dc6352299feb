"""Storing a batch: what is new is written, what is known is skipped, what conflicts is refused."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from gradwatch.health import non_finite
from gradwatch.wire.codec import Decoded
from gradwatch.wire.frame import Drops, Frame, Manifest, Receipt, Rejection, RunEnd, RunInfo
from gradwatch_server.database import finite, insert_new
from gradwatch_server.findings import reconcile
from gradwatch_server.models import DETAILS, NORMS, SCALARS, FrameRow, ManifestRow, Optimizer, Run
from gradwatch_server.storable import refusal, without_nul
from gradwatch_server.windows import load_layout, window_of

# Key of a frame within its optimizer.
Key = tuple[int, int]  # rank, step
# Steps that one query asks for.
STEPS_A_QUERY = 1000


class UnknownRunError(LookupError):
    """A batch for a run that was never introduced here."""


class UnstorableRunError(ValueError):
    """A run's introduction that no database could hold. The message names the field."""


class Stored(msgspec.Struct):
    """What storing one batch came to."""

    receipt: Receipt
    alerted: bool  # alerts wait in the outbox


def introduce(session: Session, info: RunInfo) -> None:
    """Make a run known. Repeating it changes nothing. Raises UnstorableRunError."""
    if reason := refusal(info):
        raise UnstorableRunError(reason)
    row = {
        "key": info.id,
        "project": info.project,
        "info": msgspec.json.encode(info),
        "status": "running",
        "reason": "",
        "created_at": time.time(),
        "dropped": {},
        "loss_nonfinite": False,
        "changed": 0,
        "judged": 0,
        "leased_until": 0.0,
    }
    session.execute(insert_new(session, Run), [row])


def store(
    session: Session, run_key: str, records: Sequence[Decoded], channels: Sequence[str]
) -> Stored:
    """Write one batch within the caller's transaction. Raises UnknownRunError."""
    # The lock puts the collectors that write one run in turn; SQLite has one writer anyway.
    run = session.scalar(select(Run).where(Run.key == run_key).with_for_update())
    if run is None:
        raise UnknownRunError(run_key)
    batch = _Batch(session, run)
    for decoded in records:
        batch.take(decoded)
    batch.write_frames()
    alerted = batch.raise_non_finite(channels)
    run.changed += 1
    return Stored(
        Receipt(stored=batch.stored, repeated=batch.repeated, rejected=batch.rejected), alerted
    )


class _Batch:
    """One batch on its way into the tables."""

    def __init__(self, session: Session, run: Run) -> None:
        self.stored = 0
        self.repeated = 0
        self.rejected: list[Rejection] = []
        self._session = session
        self._run = run
        rows = session.scalars(select(Optimizer).where(Optimizer.run_id == run.id))
        self._optimizers = {row.name: row for row in rows}
        self._layer_counts: dict[tuple[int, int, int], int] = {}
        for optimizer_id, rank, version, layers in session.execute(
            select(
                ManifestRow.optimizer_id,
                ManifestRow.rank,
                ManifestRow.version,
                ManifestRow.layers,
            ).where(ManifestRow.optimizer_id.in_([row.id for row in self._optimizers.values()]))
        ):
            self._layer_counts[optimizer_id, rank, version] = layers
        self._frames: dict[str, dict[Key, Decoded]] = collections.defaultdict(dict)
        self._broken: dict[tuple[str, int], list[Frame]] = collections.defaultdict(list)

    def take(self, decoded: Decoded) -> None:
        """Sort one record in; frames are written together at the end."""
        record = decoded.record
        if reason := refusal(record):
            self._reject(decoded, reason)
            return
        match record:
            case Manifest():
                self._take_manifest(record, decoded)
            case Frame():
                self._take_frame(record, decoded)
            case RunEnd():
                self._end(record)
            case Drops():
                self._count_drops(record)

    def _take_manifest(self, manifest: Manifest, decoded: Decoded) -> None:
        optimizer = self._optimizers.get(manifest.optimizer)
        if optimizer is None:
            optimizer = Optimizer(
                run_id=self._run.id,
                name=manifest.optimizer,
                frames=0,
                nonfinite_frames=0,
                first_step=0,
                last_step=0,
            )
            self._session.add(optimizer)
            self._session.flush()
            self._optimizers[manifest.optimizer] = optimizer
        key = (optimizer.id, manifest.rank, manifest.version)
        if key in self._layer_counts:
            known = self._session.get_one(ManifestRow, key)
            if known.body != decoded.raw:
                self._reject(
                    decoded,
                    f"version: another manifest {manifest.version} of {manifest.optimizer!r} is "
                    "stored already; layers that change need a new version",
                )
            return
        self._layer_counts[key] = len(manifest.layers)
        row = {
            "optimizer_id": optimizer.id,
            "rank": manifest.rank,
            "version": manifest.version,
            "layers": len(manifest.layers),
            "body": decoded.raw,
        }
        self._session.execute(insert_new(self._session, ManifestRow), [row])
        newest = max(version for row_id, _, version in self._layer_counts if row_id == optimizer.id)
        if manifest.version == newest:
            optimizer.layers = len(manifest.layers)

    def _take_frame(self, frame: Frame, decoded: Decoded) -> None:
        optimizer = self._optimizers.get(frame.optimizer)
        key = (optimizer.id if optimizer else 0, frame.rank, frame.manifest)
        layers = self._layer_counts.get(key)
        if layers is None:
            self._reject(
                decoded,
                f"manifest: version {frame.manifest} of {frame.optimizer!r} was not sent by rank "
                f"{frame.rank}; send the manifest before its frames",
            )
        elif frame.columns and frame.layers != layers:
            self._reject(
                decoded,
                f"values: {frame.layers} layers a column, but the manifest names {layers}",
            )
        else:
            known = self._frames[frame.optimizer].get((frame.rank, frame.step))
            if known is None:
                self._frames[frame.optimizer][frame.rank, frame.step] = decoded
            else:
                self._settle_repeat(decoded, known.raw)

    def _settle_repeat(self, decoded: Decoded, known: bytes) -> None:
        """A key that is taken: the same frame again is fine, another one is not."""
        if decoded.raw == known:
            self.repeated += 1
        else:
            self._reject(decoded, "step: another frame of this rank and step is stored already")

    def _reject(self, decoded: Decoded, reason: str) -> None:
        self.rejected.append(Rejection(place=decoded.place, reason=reason))

    def write_frames(self) -> None:
        """Insert the frames that are new, in one statement for each optimizer."""
        for name, frames in self._frames.items():
            optimizer = self._optimizers[name]
            for key, body in self._stored_bodies(optimizer, frames).items():
                self._settle_repeat(frames.pop(key), body)
            if frames:
                self._insert(optimizer, frames)

    def _stored_bodies(self, optimizer: Optimizer, frames: dict[Key, Decoded]) -> dict[Key, bytes]:
        ranks = {rank for rank, _ in frames}
        steps = sorted({step for _, step in frames})
        stored: dict[Key, bytes] = {}
        # By name and not by range: a batch may hold the first step of a long run and the last.
        for start in range(0, len(steps), STEPS_A_QUERY):
            rows = self._session.execute(
                select(FrameRow.rank, FrameRow.step, FrameRow.body).where(
                    FrameRow.optimizer_id == optimizer.id,
                    FrameRow.rank.in_(ranks),
                    FrameRow.step.in_(steps[start : start + STEPS_A_QUERY]),
                )
            )
            stored |= {(rank, step): body for rank, step, body in rows if (rank, step) in frames}
        return stored

    def _insert(self, optimizer: Optimizer, frames: dict[Key, Decoded]) -> None:
        rows: list[dict[str, Any]] = []
        taken: list[Frame] = []
        for (rank, step), decoded in frames.items():
            frame = decoded.record
            assert isinstance(frame, Frame)
            taken.append(frame)
            if _is_broken(frame):
                self._broken[optimizer.name, rank].append(frame)
            rows.append(
                {
                    "optimizer_id": optimizer.id,
                    "rank": rank,
                    "step": step,
                    "holds": _holds(frame),
                    "body": decoded.raw,
                }
            )
        self._session.execute(insert_new(self._session, FrameRow), rows)
        self.stored += len(rows)
        self._summarise(optimizer, taken)

    def _summarise(self, optimizer: Optimizer, frames: Sequence[Frame]) -> None:
        """Keep what lists and gauges show beside the run, so that they read no frames."""
        newest = max(frames, key=lambda frame: frame.step)
        steps = [frame.step for frame in frames]
        first = min(steps)
        optimizer.first_step = min(optimizer.first_step, first) if optimizer.frames else first
        if newest.step >= optimizer.last_step:
            optimizer.last_step = newest.step
            optimizer.total_norm = finite(newest.scalars.get("total_norm", optimizer.total_norm))
            logged = [frame for frame in frames if "loss" in frame.scalars]
            if logged:
                loss = max(logged, key=lambda frame: frame.step).scalars["loss"]
                self._run.loss = finite(loss)
                self._run.loss_nonfinite = self._run.loss is None
        optimizer.frames += len(frames)
        optimizer.nonfinite_frames += sum(map(_is_broken, frames))
        times = [frame.time for frame in frames if math.isfinite(frame.time)]
        if times:
            self._run.last_frame_at = max(self._run.last_frame_at or 0.0, *times)

    def raise_non_finite(self, channels: Sequence[str]) -> bool:
        """Non-finite values need no history: tell of them now, not at the next judgement."""
        alerted = False
        for (name, rank), frames in self._broken.items():
            ordered = sorted(frames, key=lambda frame: frame.step)
            layout = load_layout(self._session, self._optimizers[name], rank)
            window = window_of(layout, ordered)
            finding = non_finite.detect(window)
            if finding is not None:
                alerted |= reconcile(
                    self._session,
                    self._run,
                    name,
                    [finding],
                    ordered[-1].step,
                    channels,
                    kinds=frozenset({finding.kind}),
                )
        return alerted

    def _end(self, end: RunEnd) -> None:
        if end.status == "failed":
            self._run.status, self._run.reason = "failed", without_nul(end.reason)
        elif end.rank == 0 and self._run.status != "failed":
            self._run.status = "finished"

    def _count_drops(self, drops: Drops) -> None:
        counts = collections.Counter(self._run.dropped)
        counts.update(drops.counts)
        self._run.dropped = dict(counts)


def _is_broken(frame: Frame) -> bool:
    """Whether a frame tells of a NaN or Inf in a gradient or in the loss."""
    counts = frame.row("nonfinite")
    broken_gradient = counts is not None and bool(np.any(counts > 0))
    return broken_gradient or not math.isfinite(frame.scalars.get("loss", 0.0))


def _holds(frame: Frame) -> int:
    if "mean_abs" in frame.columns:
        return DETAILS
    return NORMS if frame.columns or _is_broken(frame) else SCALARS
