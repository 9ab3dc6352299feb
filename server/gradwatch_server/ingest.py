"""Storing a batch: what is new is written, what is known is skipped, what conflicts is refused."""

from __future__ import annotations

import collections
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from sqlalchemy import and_, select
from sqlalchemy.orm import Session

from gradwatch.health import non_finite
from gradwatch.wire.codec import Decoded
from gradwatch.wire.frame import (
    Drops,
    Flight,
    Frame,
    Manifest,
    Origin,
    Receipt,
    Rejection,
    RunEnd,
    RunInfo,
)
from gradwatch_server.arrivals import Arrived, ArrivedFrame
from gradwatch_server.database import finite, insert_new
from gradwatch_server.findings import reconcile
from gradwatch_server.marks import mark_stretches
from gradwatch_server.merge import MERGED
from gradwatch_server.models import Event, FrameRow, ManifestRow, Optimizer, Run
from gradwatch_server.ranks import chunks, grow_world, merge_arrivals, settled_steps
from gradwatch_server.reports import Report, tell
from gradwatch_server.reports import keep as keep_report
from gradwatch_server.storable import refusal, without_nul
from gradwatch_server.windows import load_layout, window_of

# A step this old when it comes was kept on disk: it does not say that its job still runs.
FRESH_S = 3600.0
# Key of a frame within its optimizer.
Key = tuple[int, int]  # rank, step


class UnknownRunError(LookupError):
    """A batch for a run that was never introduced here."""


class UnstorableRunError(ValueError):
    """A run's introduction that no database could hold. The message names the field."""


class Stored(msgspec.Struct):
    """What storing one batch came to."""

    receipt: Receipt
    alerted: bool  # alerts wait in the outbox


def introduce(session: Session, info: RunInfo) -> None:
    """Make a run known. Repeating it changes nothing, but that a job may have gained ranks.

    Raises UnstorableRunError.
    """
    if reason := refusal(info):
        raise UnstorableRunError(reason)
    row = {
        "key": info.id,
        "project": info.project,
        "info": msgspec.json.encode(info),
        "world_size": info.world_size,
        "status": "running",
        "reason": "",
        "created_at": time.time(),
        "dropped": {},
        "conflicts": 0,
        "loss_nonfinite": False,
        "changed": 0,
        "judged": 0,
        "leased_until": 0.0,
    }
    session.execute(insert_new(session, Run), [row])
    grown = select(Run).where(
        Run.key == info.id, Run.project == info.project, Run.world_size < info.world_size
    )
    if run := session.scalar(grown.with_for_update()):
        grow_world(session, run, info.world_size)


def store(
    session: Session,
    run_key: str,
    records: Sequence[Arrived],
    channels: Sequence[str],
    project: str | None = None,
) -> Stored:
    """Write one batch within the caller's transaction. Raises UnknownRunError.

    project: the only one that the sender may write to; None for any.
    """
    batch = _Batch(session, run_key, _ranks(records), project)
    run = batch.run
    for arrived in records:
        batch.take(arrived)
    batch.write_frames()
    alerted = batch.raise_non_finite(channels)
    alerted |= batch.tell_reports(channels)
    run.changed += 1
    run.conflicts += sum(rejection.conflict for rejection in batch.rejected)
    return Stored(
        Receipt(stored=batch.stored, repeated=batch.repeated, rejected=batch.rejected), alerted
    )


def _ranks(records: Sequence[Arrived]) -> set[int]:
    """The ranks whose layers a batch speaks of."""
    return {item.record.rank for item in records if isinstance(item.record, Frame | Manifest)}


class _Batch:
    """One batch on its way into the tables."""

    def __init__(
        self, session: Session, run_key: str, ranks: set[int], project: str | None
    ) -> None:
        self.stored = 0
        self.repeated = 0
        self.rejected: list[Rejection] = []
        self._session = session
        # The lock puts the collectors that write one run in turn; SQLite has one writer anyway.
        run = session.scalar(select(Run).where(Run.key == run_key).with_for_update())
        if run is None or project not in (None, run.project):
            raise UnknownRunError(run_key)
        self.run = run
        self._optimizers: dict[str, Optimizer] = {}
        self._layer_counts: dict[tuple[int, int, int], int] = {}
        # Asked once the lock is held: before, it might see what another collector is changing.
        for optimizer, rank, version, layers in session.execute(
            select(Optimizer, ManifestRow.rank, ManifestRow.version, ManifestRow.layers)
            .outerjoin(
                ManifestRow,
                and_(ManifestRow.optimizer_id == Optimizer.id, ManifestRow.rank.in_(ranks)),
            )
            .where(Optimizer.run_id == run.id)
        ):
            self._optimizers[optimizer.name] = optimizer
            if _is_there(version):
                self._layer_counts[optimizer.id, rank, version] = layers
        self._frames: dict[str, dict[Key, ArrivedFrame]] = collections.defaultdict(dict)
        self._reported: set[str] = set()  # optimizers of which something was found out
        self._broken: dict[tuple[str, int], list[Frame]] = collections.defaultdict(list)

    def take(self, decoded: Arrived) -> None:
        """Sort one record in; frames are written together at the end."""
        if isinstance(decoded, ArrivedFrame):
            self._take_frame(decoded)
            return
        record = decoded.record
        if reason := refusal(record):
            self._reject(decoded, reason)
            return
        match record:
            case Manifest():
                self._take_manifest(record, decoded)
            case RunEnd():
                self._end(record)
            case Drops():
                self._count_drops(record)
            case Origin() | Flight():
                self._take_report(record, decoded)
            case _:
                pass

    def _take_manifest(self, manifest: Manifest, decoded: Decoded) -> None:
        optimizer = self._optimizers.get(manifest.optimizer)
        if optimizer is None:
            optimizer = Optimizer(
                run_id=self.run.id,
                name=manifest.optimizer,
                speaker=0 if self.run.world_size == 1 else MERGED,
                kept_from=0,
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
                    conflict=True,
                )
            return
        if manifest.rank >= self.run.world_size:
            grow_world(self._session, self.run, manifest.rank + 1)
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
        if manifest.version == newest and (optimizer.speaker != MERGED or not optimizer.layers):
            optimizer.layers = len(manifest.layers)

    def _take_frame(self, decoded: ArrivedFrame) -> None:
        frame = decoded.record
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
                self._settle_repeat(decoded, known.digest)

    def _settle_repeat(self, decoded: ArrivedFrame, known: bytes) -> None:
        """A key that is taken: the same frame again is fine, another one is not."""
        if decoded.digest == known:
            self.repeated += 1
        else:
            reason = "step: another frame of this rank and step is stored already"
            self._reject(decoded, reason, conflict=True)

    def _reject(self, decoded: Arrived, reason: str, conflict: bool = False) -> None:
        rejection = Rejection(place=decoded.place, reason=reason, conflict=conflict)
        self.rejected.append(rejection)

    def write_frames(self) -> None:
        """Insert the frames that are new, in one statement for each optimizer."""
        for name, frames in self._frames.items():
            optimizer = self._optimizers[name]
            for key, known in self._stored_digests(optimizer, frames):
                self._settle_repeat(frames.pop(key), known)
            if optimizer.speaker == MERGED:
                self._leave_settled(optimizer, frames)
            if frames:
                self._insert(optimizer, frames)

    def _stored_digests(
        self, optimizer: Optimizer, frames: dict[Key, ArrivedFrame]
    ) -> Iterator[tuple[Key, bytes]]:
        """Those of `frames` whose keys are taken, with the digest of what is stored there."""
        ranks = {rank for rank, _ in frames}
        # By name and not by range: a batch may hold the first step of a long run and the last.
        for steps in chunks({step for _, step in frames}):
            rows = self._session.execute(
                select(FrameRow.rank, FrameRow.step, FrameRow.digest).where(
                    FrameRow.optimizer_id == optimizer.id,
                    FrameRow.rank.in_(ranks),
                    FrameRow.step.in_(steps),
                    # Until PostgreSQL has looked at a table it seeks by the range, not by names.
                    FrameRow.step.between(steps[0], steps[-1]),
                )
            ).all()
            for rank, step, digest in rows:
                if (rank, step) in frames:
                    yield (rank, step), digest

    def _leave_settled(self, optimizer: Optimizer, frames: dict[Key, ArrivedFrame]) -> None:
        """Frames of steps so old that their ranks are not kept apart any more change nothing."""
        settled = settled_steps(self._session, optimizer, {step for _, step in frames})
        for key in [key for key in frames if key[1] in settled]:
            del frames[key]
            self.repeated += 1

    def _insert(self, optimizer: Optimizer, frames: dict[Key, ArrivedFrame]) -> None:
        rows: list[dict[str, Any]] = []
        for (rank, step), arrived in frames.items():
            if arrived.broken:
                self._broken[optimizer.name, rank].append(arrived.record)
            rows.append(
                {
                    "optimizer_id": optimizer.id,
                    "rank": rank,
                    "step": step,
                    "holds": arrived.holds,
                    "digest": arrived.digest,
                    "body": arrived.body,
                }
            )
        self._session.execute(insert_new(self._session, FrameRow), rows)
        self._note_events(optimizer, frames)
        self.stored += len(rows)
        optimizer.nonfinite_frames += sum(arrived.broken for arrived in frames.values())
        self._summarise(optimizer, [arrived.record for arrived in frames.values()])
        if optimizer.speaker == MERGED:
            merge_arrivals(self._session, self.run, optimizer, frames)
        else:
            mark_stretches(self._session, optimizer.id, (step for _, step in frames))

    def _note_events(self, optimizer: Optimizer, frames: dict[Key, ArrivedFrame]) -> None:
        """Events are few, and looked for over whole runs: they stand apart from their frames."""
        rows = [
            {"optimizer_id": optimizer.id, "step": step, "rank": rank, "name": without_nul(name)}
            for (rank, step), arrived in frames.items()
            for name in dict.fromkeys(arrived.record.events)
        ]
        if rows:
            self._session.execute(insert_new(self._session, Event), rows)

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
                self.run.loss = finite(loss)
                self.run.loss_nonfinite = self.run.loss is None
        optimizer.frames += len(frames)
        self._note_times(sorted(frame.time for frame in frames if math.isfinite(frame.time)))

    def _note_times(self, times: Sequence[float]) -> None:
        """What says of a run, by the clock, that it goes on. times: of its frames, ascending."""
        if not times:
            return
        run, now = self.run, time.time()
        before = times[0] if run.last_frame_at is None else run.last_frame_at
        # What is older than the newest was kept somewhere meanwhile: it tells of no pause.
        later = [before, *(each for each in times if each > before)]
        pauses = (second - first for first, second in itertools.pairwise(later))
        run.longest_pause_s = max(run.longest_pause_s, 0.0, *pauses)
        run.last_frame_at = later[-1]
        if now - times[-1] < FRESH_S:
            run.heard_at = now

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
                    self.run,
                    name,
                    [finding],
                    ordered[-1].step,
                    channels,
                    kinds=frozenset({finding.kind}),
                )
        return alerted

    def _take_report(self, report: Report, decoded: Decoded) -> None:
        optimizer = self._optimizers.get(report.optimizer)
        if optimizer is None:
            self._reject(decoded, f"optimizer: no manifest of {report.optimizer!r} was sent")
            return
        keep_report(self._session, optimizer, report, decoded.raw)
        self._reported.add(report.optimizer)

    def tell_reports(self, channels: Sequence[str]) -> bool:
        """Add what was found out to findings, those of this batch among them."""
        alerted = False
        for name in sorted(self._reported):
            alerted |= tell(self._session, self.run, self._optimizers[name], channels)
        return alerted

    def _end(self, end: RunEnd) -> None:
        if end.status == "failed":
            self.run.status, self.run.reason = "failed", without_nul(end.reason)
        elif end.rank == 0 and self.run.status != "failed":
            self.run.status = "finished"

    def _count_drops(self, drops: Drops) -> None:
        counts = collections.Counter(self.run.dropped)
        counts.update(drops.counts)
        self.run.dropped = dict(counts)


def _is_there(value: object) -> bool:
    """Whether an outer join found a row; the types of its columns do not say that it may not."""
    return value is not None
