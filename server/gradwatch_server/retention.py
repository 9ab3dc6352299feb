"""What is kept for how long, and how rows go: in pieces, so that no writer waits for long.

A deleted run is gone at once for everyone: its optimizers lose their run, and what they hold is
freed behind it. Frames go when they are old and their stretch is folded; what they were folded
into stays as long as the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Engine, delete, exists, or_, select, text, tuple_, update
from sqlalchemy.orm import Session

from gradwatch.windows import BEGINNING_FRAMES, WINDOW_FRAMES
from gradwatch_server.database import writing
from gradwatch_server.merge import MERGED
from gradwatch_server.models import (
    BARE,
    GONE,
    NORMS,
    Event,
    FrameRow,
    ManifestRow,
    Optimizer,
    PartialStep,
    ReportRow,
    Run,
    Stretch,
    StretchDue,
)
from gradwatch_server.packing import without_histograms
from gradwatch_server.ranks import chunks
from gradwatch_server.tiers import stretch_steps

DAY_S = 86_400.0
# Frames of single ranks are kept for so many steps: enough to see which one drifts or lags.
RANK_WINDOW_STEPS = 2000
# Layers of all rows that one transaction deletes: some megabytes, some hundredths of a second.
PIECE_LAYERS = 300_000
# Pages of SQLite that one transaction gives back to the file system: 2 MB.
PIECE_PAGES = 512
# What an optimizer holds, the largest tables first.
HELD: tuple[type[Any], ...] = (
    FrameRow,
    Stretch,
    Event,
    PartialStep,
    StretchDue,
    ReportRow,
    ManifestRow,
)


class Keep(NamedTuple):
    """How long what is kept; math.inf for ever."""

    frames_days: float = math.inf  # frames of single steps
    histograms_days: float = math.inf  # histograms of single steps
    runs_days: float = math.inf  # runs, after their last frame
    rank_steps: float = RANK_WINDOW_STEPS  # frames of single ranks


def retain(engine: Engine, keep: Keep, budget_s: float) -> bool:
    """Free what is not kept any more, for about so long. Returns whether there is more to free.

    Safe to repeat at any time, by several workers at once.
    """
    began = time.monotonic()
    now = time.time()
    for piece in _pieces(engine, keep, now):
        started = time.monotonic()
        piece()
        if time.monotonic() - began > budget_s:
            return True
        # As long for others as for this one: SQLite's writers ask for the lock by and by.
        time.sleep(time.monotonic() - started)
    return False


def _pieces(engine: Engine, keep: Keep, now: float) -> Iterator[Callable[[], None]]:
    """What is to be done, one short transaction each."""
    before = now - keep.runs_days * DAY_S
    for run_id in _old_runs(engine, before):
        yield lambda run_id=run_id: _delete_run(engine, run_id, before)
    for model, optimizer_id, rows in _orphans(engine):
        yield lambda m=model, o=optimizer_id, r=rows: _delete_some(engine, m, o, r)
    for optimizer_id, keep_from in _outgrown(engine, int(keep.rank_steps)):
        while (before_step := _rank_piece(engine, optimizer_id, keep_from)) is not None:
            yield lambda o=optimizer_id, b=before_step: _drop_rank_frames(engine, o, b)
    for rest, days in ((GONE, keep.frames_days), (BARE, keep.histograms_days)):
        for optimizer_id, start in _old_stretches(engine, rest, now - days * DAY_S):
            yield lambda o=optimizer_id, s=start, r=rest: _thin(engine, o, s, r)
    if engine.dialect.name == "sqlite":
        while _free_pages(engine) > PIECE_PAGES:
            yield lambda: _give_back(engine)


def _old_runs(engine: Engine, before: float) -> list[int]:
    with Session(engine) as session:
        return list(session.scalars(select(Run.id).where(*_is_older(before))))


def _is_older(before: float) -> tuple[ColumnElement[bool], ...]:
    """A run without a frame since then, by the job's clock and by the collector's."""
    folded = (
        exists()
        .where(Stretch.optimizer_id == Optimizer.id, Stretch.folded_at >= before)
        .where(Optimizer.run_id == Run.id)
    )
    silent = or_(Run.last_frame_at.is_(None), Run.last_frame_at < before)
    return Run.created_at < before, silent, ~folded


def _delete_run(engine: Engine, run_id: int, before: float) -> None:
    with writing(engine) as session:
        session.execute(
            delete(Run)
            .where(Run.id == run_id, *_is_older(before))
            .execution_options(synchronize_session=False)
        )


def _orphans(engine: Engine) -> Iterator[tuple[type[Any], int, int]]:
    """Tables with rows of deleted runs, again and again until there are none; rows to delete."""
    with Session(engine) as session:
        orphans = session.execute(
            select(Optimizer.id, Optimizer.layers).where(Optimizer.run_id.is_(None))
        ).all()
    for optimizer_id, layers in orphans:
        rows = max(1, PIECE_LAYERS // max(1, layers))
        for model in HELD:
            while _has_rows(engine, model, optimizer_id):
                yield model, optimizer_id, rows
        yield Optimizer, optimizer_id, 1


def _has_rows(engine: Engine, model: type[Any], optimizer_id: int) -> bool:
    held = select(model.optimizer_id).where(model.optimizer_id == optimizer_id).limit(1)
    with Session(engine) as session:
        return session.scalar(held) is not None


def _delete_some(engine: Engine, model: type[Any], optimizer_id: int, rows: int) -> None:
    keys = list(model.__table__.primary_key.columns)
    owner = model.id if model is Optimizer else model.optimizer_id
    some = select(*keys).where(owner == optimizer_id).limit(rows)
    with writing(engine) as session:
        session.execute(
            delete(model)
            .where(tuple_(*keys).in_(some))
            .execution_options(synchronize_session=False)
        )


def _outgrown(engine: Engine, window_steps: int) -> list[tuple[int, int]]:
    """Optimizers with frames of single ranks that left the window, and its first step."""
    kept = Optimizer.last_step - Optimizer.kept_from
    with Session(engine) as session:
        rows = session.execute(
            select(Optimizer.id, Optimizer.last_step - window_steps).where(
                Optimizer.speaker == MERGED,
                Optimizer.run_id.is_not(None),
                # By half a window at a time: the rows are many.
                kept > window_steps + window_steps // 2,
            )
        )
        return [(optimizer_id, keep_from) for optimizer_id, keep_from in rows]


def _rank_piece(engine: Engine, optimizer_id: int, keep_from: int) -> int | None:
    """The first step that stays when one piece more is gone; None when nothing is to go."""
    with Session(engine) as session:
        optimizer = session.get(Optimizer, optimizer_id)
        run = optimizer and session.get(Run, optimizer.run_id)
        if optimizer is None or run is None or optimizer.kept_from >= keep_from:
            return None
        # Every step whose frames may go was merged.
        merged = select(FrameRow.step).where(
            FrameRow.optimizer_id == optimizer_id,
            FrameRow.rank == MERGED,
            FrameRow.step >= optimizer.kept_from,
            FrameRow.step < keep_from,
        )
        steps = max(1, PIECE_LAYERS // max(1, optimizer.layers * run.world_size))
        following = session.scalar(merged.order_by(FrameRow.step).offset(steps).limit(1))
        return keep_from if following is None else following


def _drop_rank_frames(engine: Engine, optimizer_id: int, before: int) -> None:
    """Delete frames of single ranks before a step, but for steps that wait for a rank."""
    with writing(engine) as session:
        optimizer = session.get(Optimizer, optimizer_id)
        run = optimizer and session.get(Run, optimizer.run_id, with_for_update=True)
        if optimizer is None or run is None or optimizer.kept_from >= before:
            return
        waiting = select(PartialStep.step).where(
            PartialStep.optimizer_id == optimizer_id, PartialStep.merged.is_(False)
        )
        told = select(ManifestRow.rank).where(ManifestRow.optimizer_id == optimizer_id)
        ranks = session.scalars(told.where(ManifestRow.rank != MERGED).distinct())
        for some in chunks(ranks):
            session.execute(
                delete(FrameRow).where(
                    FrameRow.optimizer_id == optimizer_id,
                    FrameRow.rank.in_(some),
                    FrameRow.step < before,
                    FrameRow.step.not_in(waiting),
                )
            )
        session.execute(
            delete(PartialStep).where(
                PartialStep.optimizer_id == optimizer_id,
                PartialStep.step < before,
                PartialStep.merged.is_(True),
            )
        )
        optimizer.kept_from = before
        optimizer.thinned += 1


def _old_stretches(engine: Engine, rest: int, before: float) -> list[tuple[int, int]]:
    """Stretches folded before then whose frames hold more than `rest`: optimizer and start."""
    if before == -math.inf:
        return []
    marked = exists().where(
        StretchDue.optimizer_id == Stretch.optimizer_id,
        StretchDue.tier == 1,
        StretchDue.start == Stretch.start,
    )
    with Session(engine) as session:
        rows = session.execute(
            select(Stretch.optimizer_id, Stretch.start)
            .join(Optimizer, Optimizer.id == Stretch.optimizer_id)
            .where(
                Stretch.tier == 1,
                Stretch.frames > rest,
                Stretch.folded_at < before,
                Optimizer.run_id.is_not(None),
                ~marked,
            )
            .order_by(Stretch.optimizer_id, Stretch.start)
        ).all()
        spared = {
            optimizer_id: _spared(session, optimizer_id)
            for optimizer_id in {row.optimizer_id for row in rows}
        }
    return [
        (optimizer_id, start)
        for optimizer_id, start in rows
        if spared[optimizer_id].beginning < start
        and start + stretch_steps(1) <= spared[optimizer_id].present
    ]


class Spared(NamedTuple):
    """What judgements look at is always kept: steps up to `beginning`, and from `present` on."""

    beginning: int
    present: int


def _spared(session: Session, optimizer_id: int) -> Spared:
    optimizer = session.get_one(Optimizer, optimizer_id)
    judged = select(FrameRow.step).where(
        FrameRow.optimizer_id == optimizer_id,
        FrameRow.rank == optimizer.speaker,
        FrameRow.holds >= NORMS,
    )
    first = session.scalars(judged.order_by(FrameRow.step).limit(BEGINNING_FRAMES)).all()
    newest = session.scalars(judged.order_by(FrameRow.step.desc()).limit(WINDOW_FRAMES)).all()
    return Spared(first[-1] if first else 0, newest[-1] if len(newest) == WINDOW_FRAMES else 0)


def _thin(engine: Engine, optimizer_id: int, start: int, rest: int) -> None:
    """Delete the frames of one stretch, or their histograms alone."""
    with writing(engine) as session:
        optimizer = session.get_one(Optimizer, optimizer_id)
        # The lock keeps late frames from coming meanwhile.
        session.get(Run, optimizer.run_id, with_for_update=True)
        if session.get(StretchDue, (optimizer_id, 1, start)) is not None:
            return
        session.execute(
            update(Stretch)
            .where(Stretch.optimizer_id == optimizer_id, Stretch.tier == 1, Stretch.start == start)
            .values(frames=rest)
        )
        optimizer.thinned += 1
        own = (
            FrameRow.optimizer_id == optimizer_id,
            FrameRow.rank == optimizer.speaker,
            FrameRow.step.between(start, start + stretch_steps(1) - 1),
        )
        if rest == GONE:
            session.execute(delete(FrameRow).where(*own))
            return
        for row in session.scalars(select(FrameRow).where(*own)):
            row.body = without_histograms(row.body)


def _free_pages(engine: Engine) -> int:
    """Pages of an SQLite file that can be given back; 0 for one made without that in mind."""
    with engine.connect() as connection:
        if connection.scalar(text("PRAGMA auto_vacuum")) != 2:
            return 0
        return connection.scalar(text("PRAGMA freelist_count")) or 0


def _give_back(engine: Engine) -> None:
    with engine.execution_options(writes=True).begin() as connection:
        driver: Any = connection.connection.dbapi_connection
        # It frees a page for each row that is asked for, though the rows hold nothing.
        driver.execute(f"PRAGMA incremental_vacuum({PIECE_PAGES})").fetchall()
