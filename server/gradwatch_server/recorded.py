"""What was stored of a run, as it was sent: its layers, frames and events."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from gradwatch.wire.api import (
    EventPage,
    EventView,
    FramePage,
    FrameView,
    ManifestView,
    numbers,
)
from gradwatch.wire.frame import Rank, Step
from gradwatch_server.database import finite
from gradwatch_server.models import Event, FrameRow, ManifestRow, Optimizer, Run
from gradwatch_server.packing import missing_ranks, unpack_frame
from gradwatch_server.queries import NotFoundError
from gradwatch_server.ranks import read_manifest

# A page of frames ends where it holds so many: about 8 MB of JSON.
MAX_NUMBERS = 400_000


# Step, optimizer, rank and name of the last event of a page.
Cursor = tuple[Step, Step, Rank, str]


class CursorError(ValueError):
    """An `after` that was not the `next` of a page."""


class Chosen(NamedTuple):
    """Which frames of an optimizer; None for its speaker, its first step, its last one."""

    rank: int | None
    first: int | None
    last: int | None


class Happened(NamedTuple):
    """Which events of a run; None for all."""

    optimizer: str | None
    first: int | None
    last: int | None
    after: str | None  # `next` of the page before


def manifests(session: Session, run: Run, optimizer: str | None) -> list[ManifestView]:
    """Every version of the layers, by optimizer and rank. Raises NotFoundError."""
    chosen = (
        select(Optimizer.name, ManifestRow)
        .join(ManifestRow, ManifestRow.optimizer_id == Optimizer.id)
        .where(Optimizer.run_id == run.id)
        .order_by(Optimizer.id, ManifestRow.rank, ManifestRow.version)
    )
    if optimizer is not None:
        chosen = chosen.where(Optimizer.name == optimizer)
    views = [
        ManifestView(
            optimizer=name,
            rank=row.rank,
            version=row.version,
            layers=list(read_manifest(row.body).layers),
        )
        for name, row in session.execute(chosen)
    ]
    if optimizer is not None and not views:
        raise NotFoundError(f"run {run.key!r} has no optimizer {optimizer!r}")
    return views


def frames(session: Session, optimizer: Optimizer, chosen: Chosen, limit: int) -> FramePage:
    """One page of frames, in the order of steps."""
    rank = optimizer.speaker if chosen.rank is None else chosen.rank
    query = (
        select(FrameRow.step, FrameRow.body)
        .where(FrameRow.optimizer_id == optimizer.id, FrameRow.rank == rank)
        .order_by(FrameRow.step)
        .limit(limit + 1)
        .execution_options(yield_per=10)
    )
    if chosen.first is not None:
        query = query.where(FrameRow.step >= chosen.first)
    if chosen.last is not None:
        query = query.where(FrameRow.step <= chosen.last)
    views: list[FrameView] = []
    held = 0
    for step, body in session.execute(query):
        if len(views) == limit or held > MAX_NUMBERS:
            return FramePage(frames=views, next=str(views[-1].step))
        view = _frame_view(optimizer, rank, step, body)
        views.append(view)
        held += sum(map(len, view.statistics.values()))
    return FramePage(frames=views)


def _frame_view(optimizer: Optimizer, rank: int, step: int, body: bytes) -> FrameView:
    frame = unpack_frame(body, optimizer.name, rank, step)
    return FrameView(
        optimizer=optimizer.name,
        rank=rank,
        step=step,
        time=finite(frame.time),
        manifest=frame.manifest,
        statistics=dict(zip(frame.columns, numbers(frame.matrix()), strict=True)),
        scalars={name: finite(value) for name, value in frame.scalars.items()},
        events=list(frame.events),
        missing_ranks=list(missing_ranks(body)),
    )


def events(session: Session, run: Run, chosen: Happened, limit: int) -> EventPage:
    """One page of events, in the order of steps. Raises CursorError."""
    order = (Event.step, Event.optimizer_id, Event.rank, Event.name)
    query = (
        select(Optimizer.name, Event)
        .join(Optimizer, Optimizer.id == Event.optimizer_id)
        .where(Optimizer.run_id == run.id)
        .order_by(*order)
        .limit(limit + 1)
    )
    if chosen.optimizer is not None:
        query = query.where(Optimizer.name == chosen.optimizer)
    if chosen.first is not None:
        query = query.where(Event.step >= chosen.first)
    if chosen.last is not None:
        query = query.where(Event.step <= chosen.last)
    if chosen.after is not None:
        query = query.where(tuple_(*order) > tuple_(*_place(chosen.after)))
    rows = session.execute(query).all()
    views = [
        EventView(optimizer=name, rank=row.rank, step=row.step, name=row.name)
        for name, row in rows[:limit]
    ]
    return EventPage(events=views, next=_cursor(rows[limit - 1][1]) if len(rows) > limit else None)


def _cursor(row: Event) -> str:
    return msgspec.json.encode([row.step, row.optimizer_id, row.rank, row.name]).decode()


def _place(cursor: str) -> tuple[Any, ...]:
    try:
        return msgspec.json.decode(cursor, type=Cursor)
    except (msgspec.DecodeError, ValueError):
        raise CursorError("after: this is not the `next` of a page of events") from None
