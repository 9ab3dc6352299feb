"""Reading a range of steps from the tier that has about as many columns as are wanted.

A stretch whose frames have changed since it was folded, or which the range cuts, is read from the
tiers below it, in the end from the frames themselves: an answer is always that of the frames. Only
where frames were not kept is a stretch taken as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Row, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from gradwatch_server.folding import layer_names
from gradwatch_server.models import (
    BARE,
    DETAILS,
    GONE,
    NORMS,
    SCALARS,
    FrameRow,
    Optimizer,
    Stretch,
    StretchDue,
)
from gradwatch_server.packing import Packed, read_packed, unpack_samples, unpack_statistics
from gradwatch_server.tiers import (
    TOP,
    Columns,
    Fold,
    Ints,
    append,
    by_squares,
    column_steps,
    empty_fold,
    fold_columns,
    groups_of,
    join,
    lift,
    lift_scalars,
    placed,
    places_of,
    reduced,
    spread,
    stretch_steps,
    unpack_columns,
    unpack_counts,
)

# Frames decoded at a time: bounds memory, whatever the length of the run.
CHUNK_FRAMES = 1000
# Ranges of steps in one query.
CHUNK_RANGES = 100
# Sums of histograms that will do, though more are asked for: below them stand up to 16 times as
# many, of all layers together.
ENOUGH_SUMS = 256

Range = tuple[int, int]  # first and last step


class Span(NamedTuple):
    """Steps to answer for, and in how many columns; None for the first and the last there is."""

    first: int | None
    last: int | None
    columns: int


class Grid(NamedTuple):
    """One statistic over steps."""

    steps: Ints  # the first of each column
    fold: Fold  # [columns, layers]
    broken: NDArray[np.bool_]  # [columns, layers]: a NaN or Inf gradient

    def says_something(self) -> NDArray[np.bool_]:
        """Columns with a value, or with a gradient that is none."""
        return np.any((self.fold.finite > 0) | self.broken, axis=1)

    def taken(self, columns: NDArray[Any]) -> Grid:
        """Some of the columns, by place or as they are marked."""
        everything = columns.dtype == np.bool_ and columns.all()
        sorted_already = columns.dtype != np.bool_ and np.all(np.diff(columns) == 1)
        if everything or (sorted_already and len(columns) == len(self.steps)):
            return self
        return Grid(self.steps[columns], self.fold.taken(columns), self.broken[columns])


class _Frame(NamedTuple):
    """A frame as it is stored: each reader unpacks of it what it needs."""

    step: int
    packed: Packed


class _Piece(NamedTuple):
    """A stretch as it is stored: its columns, or its histograms."""

    tier: int
    start: int
    manifest: int
    content: bytes


def read_statistic(
    session: Session, optimizer: Optimizer, span: Span, statistic: str, layers: Sequence[str]
) -> Grid:
    """One statistic of these layers, in at most `span.columns` columns, and half of them or more
    where there are so many."""
    tier = _tier_of(session, optimizer, span, func.sum(Stretch.columns), span.columns / 2)
    names = layer_names(session, optimizer)
    places = {version: places_of(known, layers) for version, known in names.items()}
    grids = [
        Grid(
            np.empty(0, dtype=np.int64),
            empty_fold((0, len(layers)), np.float32),
            np.empty((0, len(layers)), dtype=np.bool_),
        )
    ]
    for piece in _pieces(session, optimizer, tier, span, GONE, NORMS):
        if isinstance(piece, _Piece):
            columns = unpack_columns(piece.content, {statistic, "nonfinite"}, scalars=False)
            grid = _grid_of(columns, statistic, places[piece.manifest])
            grids.append(grid.taken(_within(columns, span) & grid.says_something()))
        else:
            grid = _grid_of_frames(piece, statistic, places, len(layers))
            # A frame that measured it is a column of its own, whatever it found.
            grids.append(grid.taken(grid.says_something()) if tier else grid)
    steps = np.concatenate([grid.steps for grid in grids])
    fold = append([grid.fold for grid in grids])
    broken = np.concatenate([grid.broken for grid in grids])
    whole = Grid(steps, fold, broken).taken(np.argsort(steps, kind="stable"))
    starts = groups_of(whole.steps // column_steps(tier))
    starts = starts[equal_groups(len(starts), span.columns)]
    if not len(starts):
        return whole
    return Grid(
        whole.steps[starts],
        join(whole.fold, starts),
        reduced(np.logical_or, whole.broken, starts),
    )


def equal_groups(size: int, columns: int) -> Ints:
    """Starts of at most `columns` groups of equal size."""
    groups = min(columns, size)
    return (np.arange(groups, dtype=np.int64) * size) // max(1, groups)


def _grid_of(columns: Columns, statistic: str, places: Ints) -> Grid:
    shape = (len(columns.first), len(places))
    value, count = (columns.statistics.get(name) for name in (statistic, "nonfinite"))
    return Grid(
        columns.first,
        empty_fold(shape, np.float32) if value is None else placed(value, places),
        np.zeros(shape, dtype=np.bool_) if count is None else spread(count.total > 0, places, 0),
    )


def _grid_of_frames(
    frames: Sequence[_Frame], statistic: str, places: dict[int, Ints], layers: int
) -> Grid:
    """Frames that measured it, and those that tell of a gradient that is none."""
    known = [frame for frame in frames if {statistic, "nonfinite"} & set(frame.packed.columns)]
    rows = _rows(known, {statistic, "nonfinite"}, places, layers)
    grid = Grid(
        np.array([frame.step for frame in known], dtype=np.int64),
        lift(rows[statistic], by_squares(statistic)),
        rows["nonfinite"] > 0,
    )
    measured = np.array([statistic in frame.packed.columns for frame in known], dtype=np.bool_)
    return grid.taken(measured | grid.broken.any(axis=1))


def _rows(
    frames: Sequence[_Frame], statistics: set[str], places: dict[int, Ints], layers: int
) -> dict[str, NDArray[np.float32]]:
    """Statistics of these layers. Each float32[frames, layers], NaN where not measured."""
    rows = {name: np.full((len(frames), layers), np.nan, np.float32) for name in statistics}
    alike: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
    for index, (_, packed) in enumerate(frames):
        alike[packed.manifest, packed.columns].append(index)
    for (manifest, _), found in alike.items():
        unpacked = unpack_statistics([frames[index].packed for index in found], statistics)
        for name, values in unpacked.items():
            rows[name][found] = spread(values, places[manifest], np.nan)
    return rows


def read_scalars(session: Session, optimizer: Optimizer, span: Span) -> Columns:
    """All scalars, in half of `span.columns` columns or more where there are so many."""
    tier = _tier_of(session, optimizer, span, func.sum(Stretch.columns), span.columns / 2)
    parts: list[Columns] = []
    for piece in _pieces(session, optimizer, tier, span, GONE, SCALARS):
        if isinstance(piece, _Piece):
            columns = unpack_columns(piece.content, ())
            parts.append(columns.taken(_within(columns, span)))
        else:
            steps = [frame.step for frame in piece]
            parts.append(lift_scalars(steps, [frame.packed.scalars for frame in piece]))
    parts = [part for part in parts if len(part.first)] or [lift_scalars([], [])]
    return fold_columns([(part, 0) for part in parts], {0: ()}, 0, tier)


def read_histograms(
    session: Session, optimizer: Optimizer, span: Span, layer: str
) -> tuple[Ints, NDArray[np.uint64]]:
    """One layer's histograms: the first step of each sum, and uint64[sums, BUCKETS]."""
    enough = min(span.columns / 2, ENOUGH_SUMS)
    tier = _tier_of(session, optimizer, span, func.count(Stretch.histograms), enough)
    names = layer_names(session, optimizer)
    found: dict[int, NDArray[Any]] = {}
    for piece in _pieces(session, optimizer, tier, span, BARE, DETAILS, Stretch.histograms):
        if isinstance(piece, _Piece):
            known = names[piece.manifest]
            if layer in known:
                counts = unpack_counts(piece.content, len(known))
                found[piece.start] = counts[known.index(layer)]
            continue
        for step, packed in piece:
            known = names[packed.manifest]
            if packed.histograms is not None and layer in known:
                found[step] = unpack_samples(packed.histograms, len(known))[known.index(layer)]
    steps = np.array(sorted(found), dtype=np.int64)
    rows = np.array([found[step] for step in steps.tolist()], dtype="<u8")
    starts = groups_of(steps // (stretch_steps(tier) if tier else 1))
    return steps[starts], np.add.reduceat(rows, starts, axis=0) if len(starts) else rows


def _tier_of(
    session: Session, optimizer: Optimizer, span: Span, count: ColumnElement[int], enough: float
) -> int:
    """The coarsest tier with enough columns in the range; 0 when none has.

    A range just too short for a tier is read from the one below, with up to 16 times as many
    columns: what is enough decides how long the slowest question takes.
    """
    for tier in range(TOP, 0, -1):
        # Of stretches that the range cuts it is not known how many columns are in it.
        rest = stretch_steps(tier) - 1
        inside = Span(
            None if span.first is None else span.first + rest,
            None if span.last is None else span.last - rest,
            span.columns,
        )
        found = session.scalar(select(count).where(*_in_range(optimizer, tier, inside)))
        if (found or 0) >= enough:
            return tier
    return 0


def _in_range(optimizer: Optimizer, tier: int, span: Span) -> list[ColumnElement[bool]]:
    """Stretches of a tier that hold a step of the range."""
    conditions = [Stretch.optimizer_id == optimizer.id, Stretch.tier == tier]
    if span.first is not None:
        conditions.append(Stretch.start > span.first - stretch_steps(tier))
    if span.last is not None:
        conditions.append(Stretch.start <= span.last)
    return conditions


def _pieces(
    session: Session,
    optimizer: Optimizer,
    tier: int,
    span: Span,
    lost: int,
    holds: int,
    content: InstrumentedAttribute[bytes] | InstrumentedAttribute[bytes | None] = Stretch.body,
) -> Iterator[_Piece | list[_Frame]]:
    """What the range is made of, each step once: stretches of a tier and below, and frames.

    lost: a stretch of whose frames no more than that is left is read in place of them. holds: the
    least that a frame must hold. content: what to read of stretches.
    """
    changed = _changed(session, optimizer, tier, span)
    instead: set[int] = set()  # stretches of tier 1 whose frames are not to be read
    for level in range(tier, 0, -1):
        # Of the highest level all in the range, of the others what is in the gaps above.
        gaps = None if level == tier else _ranges(changed[level + 1], stretch_steps(level + 1))
        for start, manifest, left, found in _stretches(
            session, optimizer, level, span, gaps, content
        ):
            if start in changed[level]:
                if level > 1 or left > lost:
                    continue
                instead.add(start)
            if found is not None:
                yield _Piece(level, start, manifest, found)
    if tier == 0:
        for start, manifest, _, found in _stretches(
            session, optimizer, 1, span, None, content, most=lost
        ):
            instead.add(start)
            if found is not None:
                yield _Piece(1, start, manifest, found)
    whole = stretch_steps(1)
    gaps = None if tier == 0 else _ranges(changed[1] - instead, whole)
    for frames in _frames(session, optimizer, span, gaps, holds):
        yield [
            frame for frame in frames if frame.step - frame.step % stretch_steps(1) not in instead
        ]


def _changed(session: Session, optimizer: Optimizer, tier: int, span: Span) -> dict[int, set[int]]:
    """Starts of the stretches of each tier that do not say what their frames in the range say."""
    marked = select(StretchDue.start).where(
        StretchDue.optimizer_id == optimizer.id, StretchDue.tier <= tier
    )
    if span.first is not None:
        marked = marked.where(StretchDue.until > span.first)
    if span.last is not None:
        marked = marked.where(StretchDue.start <= span.last)
    starts = set(session.scalars(marked)) if tier else set[int]()
    whole = stretch_steps(tier)
    # Those that begin before the range, or end after it.
    cut = {span.first} if span.first is not None and span.first % whole else set[int]()
    if span.last is not None and (span.last + 1) % whole:
        cut.add(span.last)
    return {
        level: {start - start % stretch_steps(level) for start in starts | cut}
        for level in range(1, tier + 1)
    }


def _ranges(starts: Iterable[int], size: int) -> list[Range]:
    """Stretches of one size as ranges of steps, neighbours together."""
    ranges: list[Range] = []
    for start in sorted(starts):
        if ranges and ranges[-1][1] == start - 1:
            ranges[-1] = (ranges[-1][0], start + size - 1)
        else:
            ranges.append((start, start + size - 1))
    return ranges


def _chunked(ranges: list[Range] | None) -> Iterator[list[Range]]:
    """Some ranges at a time; one list without any when there is no bound."""
    if ranges is None:
        yield []
        return
    for place in range(0, len(ranges), CHUNK_RANGES):
        yield ranges[place : place + CHUNK_RANGES]


def _stretches(
    session: Session,
    optimizer: Optimizer,
    tier: int,
    span: Span,
    ranges: list[Range] | None,
    content: InstrumentedAttribute[bytes] | InstrumentedAttribute[bytes | None],
    most: int | None = None,
) -> Iterator[Row[int, int, int, bytes | None]]:
    """Start, manifest, what is left of the frames, and content."""
    chosen = select(Stretch.start, Stretch.manifest, Stretch.frames, content).where(
        *_in_range(optimizer, tier, span)
    )
    if most is not None:
        chosen = chosen.where(Stretch.frames <= most)
    for some in _chunked(ranges):
        within = [Stretch.start.between(first, last) for first, last in some]
        query = chosen.where(or_(*within)) if within else chosen
        yield from session.execute(query.execution_options(yield_per=CHUNK_FRAMES))


def _frames(
    session: Session,
    optimizer: Optimizer,
    span: Span,
    ranges: list[Range] | None,
    holds: int,
) -> Iterator[list[_Frame]]:
    chosen = select(FrameRow.step, FrameRow.body).where(
        FrameRow.optimizer_id == optimizer.id,
        FrameRow.rank == optimizer.speaker,
        FrameRow.holds >= holds,
    )
    if span.first is not None:
        chosen = chosen.where(FrameRow.step >= span.first)
    if span.last is not None:
        chosen = chosen.where(FrameRow.step <= span.last)
    for some in _chunked(ranges):
        within = [FrameRow.step.between(first, last) for first, last in some]
        query = (chosen.where(or_(*within)) if within else chosen).order_by(FrameRow.step)
        rows = session.execute(query.execution_options(yield_per=CHUNK_FRAMES))
        for chunk in rows.partitions():
            yield [_Frame(step, read_packed(body)) for step, body in chunk]


def _within(columns: Columns, span: Span) -> NDArray[np.bool_]:
    """Columns with a step of the range."""
    inside = np.ones(len(columns.first), dtype=np.bool_)
    if span.first is not None:
        inside &= columns.last >= span.first
    if span.last is not None:
        inside &= columns.first <= span.last
    return inside
