"""Runs of several ranks: when a step's frames are merged, amended, and no longer kept apart.

A step is merged by whoever stores the last rank's frame, within that transaction. One that waits
for a rank too long is merged without it by a worker, and amended when the rank's frame comes.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from sqlalchemy import Engine, delete, literal, select
from sqlalchemy.orm import Session

from gradwatch.wire.codec import decode_manifest, encode_record
from gradwatch.wire.frame import Frame, LayerInfo, Manifest
from gradwatch_server.database import insert_new, writing
from gradwatch_server.marks import mark_stretches
from gradwatch_server.merge import MERGED, Part, merge_frames, merge_layers
from gradwatch_server.models import FrameRow, ManifestRow, Optimizer, PartialStep, Run
from gradwatch_server.packing import Ranges, digest, pack_frame, unpack_frame

# A step that some rank is silent about is merged without it after this long.
MERGE_TIMEOUT_S = 10.0
# Rows of a query with steps in it, and steps that a worker merges in one transaction.
STEPS_A_QUERY = 500


def chunks(steps: Iterable[int]) -> Iterator[list[int]]:
    """Steps in ascending order, as many as one query takes."""
    ordered = sorted(steps)
    for start in range(0, len(ordered), STEPS_A_QUERY):
        yield ordered[start : start + STEPS_A_QUERY]


def merge_arrivals(
    session: Session, run: Run, optimizer: Optimizer, arrived: Iterable[tuple[int, int]]
) -> None:
    """Note that frames of these ranks and steps were stored; merge the steps that are whole.

    The caller holds the lock of the run.
    """
    bits: dict[int, int] = defaultdict(int)
    for rank, step in arrived:
        bits[step] |= 1 << rank
    whole = (1 << run.world_size) - 1
    for steps in chunks(bits):
        rows = {
            row.step: row
            for row in session.scalars(
                select(PartialStep).where(
                    PartialStep.optimizer_id == optimizer.id, PartialStep.step.in_(steps)
                )
            )
        }
        due: list[int] = []
        done: list[int] = []
        for step in steps:
            row = rows.get(step)
            known = int.from_bytes(row.arrived, "little") if row else 0
            now = known | bits[step]
            if now == whole:
                due.append(step)
                done.append(step)
                continue
            if row is None:
                session.add(
                    PartialStep(
                        optimizer_id=optimizer.id,
                        step=step,
                        arrived=_as_bytes(now),
                        opened_at=time.time(),
                        merged=False,
                    )
                )
                continue
            row.arrived = _as_bytes(now)
            if row.merged:
                due.append(step)
        session.flush()
        _merge(session, run, optimizer, due)
        known_done = [step for step in done if step in rows]
        if known_done:
            session.execute(
                delete(PartialStep).where(
                    PartialStep.optimizer_id == optimizer.id, PartialStep.step.in_(known_done)
                )
            )


def merge_due(engine: Engine, timeout_s: float | None = None) -> int:
    """Merge the steps that have waited for a rank too long. Returns how many were merged."""
    cutoff = time.time() - (MERGE_TIMEOUT_S if timeout_s is None else timeout_s)
    merged = 0
    with Session(engine) as session:
        waiting = session.scalars(
            select(PartialStep.optimizer_id)
            .join(Optimizer, Optimizer.id == PartialStep.optimizer_id)
            .where(
                PartialStep.merged.is_(False),
                PartialStep.opened_at < cutoff,
                Optimizer.run_id.is_not(None),
            )
            .distinct()
        ).all()
    for optimizer_id in waiting:
        while count := _merge_some(engine, optimizer_id, cutoff):
            merged += count
    return merged


def _merge_some(engine: Engine, optimizer_id: int, cutoff: float) -> int:
    with writing(engine) as session:
        optimizer = session.get(Optimizer, optimizer_id)
        if optimizer is None:
            return 0
        # The lock keeps a collector from storing the missing rank meanwhile.
        run = session.get(Run, optimizer.run_id, with_for_update=True)
        if run is None:
            return 0
        rows = session.scalars(
            select(PartialStep)
            .where(
                PartialStep.optimizer_id == optimizer_id,
                PartialStep.merged.is_(False),
                PartialStep.opened_at < cutoff,
            )
            .order_by(PartialStep.step)
            .limit(STEPS_A_QUERY)
        ).all()
        for row in rows:
            row.merged = True
        _merge(session, run, optimizer, [row.step for row in rows])
        run.changed += 1
        return len(rows)


def settled_steps(session: Session, optimizer: Optimizer, steps: Iterable[int]) -> set[int]:
    """Of these steps, those that are merged for good: their ranks' frames are gone."""
    old = [step for step in steps if step < optimizer.kept_from]
    found: set[int] = set()
    for some in chunks(old):
        found |= set(
            session.scalars(
                select(FrameRow.step).where(
                    FrameRow.optimizer_id == optimizer.id,
                    FrameRow.rank == MERGED,
                    FrameRow.step.in_(some),
                )
            )
        )
    return found


def grow_world(session: Session, run: Run, world_size: int) -> None:
    """A run turns out to have more ranks than it said: its only rank's frames spoke until now."""
    if run.world_size == 1:
        for optimizer in session.scalars(select(Optimizer).where(Optimizer.run_id == run.id)):
            _copy_as_merged(session, optimizer)
    run.world_size = world_size


def _copy_as_merged(session: Session, optimizer: Optimizer) -> None:
    optimizer.speaker = MERGED
    for model, columns in (
        (FrameRow, ("step", "holds", "digest", "body")),
        (ManifestRow, ("version", "layers", "body")),
    ):
        copied = [getattr(model, name) for name in columns]
        of_rank = select(model.optimizer_id, literal(MERGED), *copied).where(
            model.optimizer_id == optimizer.id, model.rank == 0
        )
        session.execute(
            insert_new(session, model).from_select(["optimizer_id", "rank", *columns], of_rank)
        )


def _merge(session: Session, run: Run, optimizer: Optimizer, steps: Sequence[int]) -> None:
    """Write the merged frames of these steps, in place of those that were merged before."""
    if not steps:
        return
    manifests = _Manifests(session, optimizer)
    found: dict[int, list[tuple[int, int, Frame]]] = defaultdict(list)
    for ranks in chunks(manifests.ranks):
        stored = session.execute(
            select(FrameRow.rank, FrameRow.step, FrameRow.holds, FrameRow.body).where(
                FrameRow.optimizer_id == optimizer.id,
                FrameRow.rank.in_(ranks),
                FrameRow.step.in_(steps),
            )
        )
        for rank, step, holds, body in stored:
            found[step].append((rank, holds, unpack_frame(body, optimizer.name, rank, step)))
    rows: list[dict[str, object]] = []
    for step, stored in found.items():
        stored.sort(key=lambda item: item[0])
        parts = [Part(frame, manifests.layers_of(frame)) for _, _, frame in stored]
        manifest = manifests.merged([part.frame for part in parts])
        frame = merge_frames(parts, manifest.layers, manifest.version)
        body = pack_frame(frame, gaps([rank for rank, _, _ in stored], run.world_size))
        rows.append(
            {
                "optimizer_id": optimizer.id,
                "rank": MERGED,
                "step": step,
                "holds": max(holds for _, holds, _ in stored),
                "digest": digest(body),  # tells an amended frame from what it was before
                "body": body,
            }
        )
    before = (FrameRow.rank == MERGED, FrameRow.step.in_(steps))
    session.execute(
        delete(FrameRow)
        .where(FrameRow.optimizer_id == optimizer.id, *before)
        .execution_options(synchronize_session=False)
    )
    if rows:
        session.execute(insert_new(session, FrameRow), rows)
    mark_stretches(session, optimizer.id, steps)


def gaps(ranks: Sequence[int], world_size: int) -> Ranges:
    """The ranks that are not there, as first and last of each range. ranks: ascending."""
    edges = [-1, *ranks, world_size]
    return tuple((low + 1, high - 1) for low, high in itertools.pairwise(edges) if high - low > 1)


class _Manifests:
    """The manifests of an optimizer's ranks, and those that its merged frames speak of."""

    def __init__(self, session: Session, optimizer: Optimizer) -> None:
        self._session = session
        self._optimizer = optimizer
        self._of_rank: dict[tuple[int, int], Manifest] = {}
        self._merged: list[Manifest] = []
        self._for: dict[tuple[tuple[int, int], ...], Manifest] = {}
        rows = session.execute(
            select(ManifestRow.rank, ManifestRow.version, ManifestRow.body)
            .where(ManifestRow.optimizer_id == optimizer.id)
            .order_by(ManifestRow.version)
        )
        for rank, version, body in rows:
            if rank == MERGED:
                self._merged.append(read_manifest(body))
            else:
                self._of_rank[rank, version] = read_manifest(body)

    @property
    def ranks(self) -> set[int]:
        """Ranks that have ever sent something."""
        return {rank for rank, _ in self._of_rank}

    def layers_of(self, frame: Frame) -> list[LayerInfo]:
        return self._of_rank[frame.rank, frame.manifest].layers

    def merged(self, frames: Sequence[Frame]) -> Manifest:
        """The manifest that names the layers of all these ranks; written when it is new."""
        key = tuple((frame.rank, frame.manifest) for frame in frames)
        if key not in self._for:
            self._for[key] = self._find(merge_layers([self.layers_of(frame) for frame in frames]))
        return self._for[key]

    def _find(self, layers: list[LayerInfo]) -> Manifest:
        for known in reversed(self._merged):
            if known.layers == layers:
                return known
        version = 1 + (self._merged[-1].version if self._merged else 0)
        manifest = Manifest(optimizer=self._optimizer.name, version=version, layers=layers)
        row = {
            "optimizer_id": self._optimizer.id,
            "rank": MERGED,
            "version": version,
            "layers": len(layers),
            "body": encode_record(manifest),
        }
        self._session.execute(insert_new(self._session, ManifestRow), [row])
        self._merged.append(manifest)
        self._optimizer.layers = len(layers)
        return manifest


@lru_cache(maxsize=256)
def read_manifest(body: bytes) -> Manifest:
    """A stored manifest. Ranks of a job and frames of a run share a few of them."""
    return decode_manifest(body)


def _as_bytes(bits: int) -> bytes:
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")
