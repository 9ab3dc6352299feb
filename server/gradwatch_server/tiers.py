"""Tiers: frames folded by powers of 16, so that any range of steps is a few thousand columns.

A column of tier k is what the frames of 16**k steps had in common: of each statistic of each layer
the smallest, mean and largest finite value and how many there were. A row of the table holds a
stretch of 16 columns side by side, and the sum of their histograms; a stretch of one tier is a
column of the next. Pure functions over arrays: folding is associative, so tiers fold from tiers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradwatch.wire.frame import Frame
from gradwatch.wire.histogram import BUCKETS
from gradwatch.wire.statistics import BY_NAME, Merge
from gradwatch_server.packing import LEVEL, squeeze, unpack_histograms, unsqueeze

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FACTOR = 16
# A stretch of the highest tier is a million steps; 15 columns of it are enough for any picture.
TOP = 4

Ints = NDArray[np.int64]
# Names of the layers of each version of a manifest.
Names = Mapping[int, Sequence[str]]


def column_steps(tier: int) -> int:
    """Steps of one column of a tier; 1 for tier 0, the frames themselves."""
    return FACTOR**tier


def stretch_steps(tier: int) -> int:
    """Steps of one stretch of a tier, which is one column of the next."""
    return FACTOR ** (tier + 1)


class Fold(NamedTuple):
    """Finite values of one statistic, folded: arrays of [columns, layers] or of [columns]."""

    low: NDArray[Any]  # NaN where there was no value, as `high`
    high: NDArray[Any]
    total: NDArray[np.float64]  # of the values, or of their squares: see by_squares
    finite: Ints  # how many values

    def mean(self, squares: bool) -> NDArray[np.float64]:
        """Mean of the values, or the root mean square. NaN where there was none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.total / self.finite
        return np.sqrt(mean) if squares else mean

    def taken(self, columns: Ints | NDArray[np.bool_]) -> Fold:
        """Some of the columns, by place or as they are marked."""
        return Fold(
            self.low[columns], self.high[columns], self.total[columns], self.finite[columns]
        )


class Course(NamedTuple):
    """One scalar, folded: arrays of [columns]."""

    fold: Fold  # of float64
    newest: NDArray[np.float64]  # as it was logged last, NaN included
    logged: Ints  # how often it was logged; more than fold.finite when it was not finite

    def taken(self, columns: Ints | NDArray[np.bool_]) -> Course:
        """Some of the columns, by place or as they are marked."""
        return Course(self.fold.taken(columns), self.newest[columns], self.logged[columns])


class Columns(NamedTuple):
    """Columns side by side in the order of steps; their layers are those of one manifest."""

    first: Ints  # first and last step of each column that has a frame
    last: Ints
    statistics: dict[str, Fold]
    scalars: dict[str, Course]

    def taken(self, columns: Ints | NDArray[np.bool_]) -> Columns:
        """Some of them, by place or as they are marked."""
        return Columns(
            self.first[columns],
            self.last[columns],
            {name: fold.taken(columns) for name, fold in self.statistics.items()},
            {name: course.taken(columns) for name, course in self.scalars.items()},
        )


def by_squares(statistic: str) -> bool:
    """Whether a statistic's mean is the root mean square, as that of norms."""
    return BY_NAME[statistic].merge is Merge.ROOT_SUM_SQUARES


def lift(values: NDArray[Any], squares: bool = False) -> Fold:
    """Each row as a column of its own. values: float[rows, layers] or float[rows]."""
    finite = np.isfinite(values)
    exact = np.where(finite, values, 0.0).astype(np.float64)
    kept = np.where(finite, values, np.array(np.nan, dtype=values.dtype))
    return Fold(kept, kept, exact * exact if squares else exact, finite.astype(np.int64))


def join(fold: Fold, starts: Ints) -> Fold:
    """Columns in groups. starts: int64[groups], the first column of each group."""
    return Fold(
        reduced(np.fmin, fold.low, starts),
        reduced(np.fmax, fold.high, starts),
        reduced(np.add, fold.total, starts),
        reduced(np.add, fold.finite, starts),
    )


def reduced(combine: np.ufunc, values: NDArray[Any], starts: Ints) -> NDArray[Any]:
    """What `combine.reduceat(values, starts, axis=0)` is, in a fifth of its time for wide rows."""
    if values.ndim == 1:
        return combine.reduceat(values, starts)
    if len(starts) == len(values):
        return values
    out = np.empty((len(starts), *values.shape[1:]), dtype=values.dtype)
    ends = [*starts[1:].tolist(), len(values)]
    for row, (start, end) in enumerate(zip(starts.tolist(), ends, strict=True)):
        combine.reduce(values[start:end], axis=0, out=out[row])
    return out


def append(folds: Sequence[Fold]) -> Fold:
    """Columns one after the other."""
    return Fold(
        np.concatenate([fold.low for fold in folds]),
        np.concatenate([fold.high for fold in folds]),
        np.concatenate([fold.total for fold in folds]),
        np.concatenate([fold.finite for fold in folds]),
    )


def placed(fold: Fold, places: Ints) -> Fold:
    """The same columns with other layers. places: of each new layer among the old, -1 for none."""
    if np.array_equal(places, np.arange(fold.low.shape[1])):
        return fold  # the common case, and copies would take as long as unpacking
    return Fold(
        spread(fold.low, places, np.nan),
        spread(fold.high, places, np.nan),
        spread(fold.total, places, 0.0),
        spread(fold.finite, places, 0),
    )


def spread(values: NDArray[Any], places: Ints, missing: float) -> NDArray[Any]:
    """Values of new layers. values: [columns, old layers]; returns [columns, new layers]."""
    known = places >= 0
    if known.all():
        return values[:, places]
    wide = np.full((len(values), len(places)), missing, dtype=values.dtype)
    wide[:, known] = values[:, places[known]]
    return wide


def places_of(old: Sequence[str], new: Sequence[str]) -> Ints:
    """Where each new layer stood among the old, -1 for one that was not there."""
    place = {name: index for index, name in enumerate(old)}
    return np.array([place.get(name, -1) for name in new], dtype=np.int64)


def groups_of(keys: Ints) -> Ints:
    """Starts of runs of equal keys."""
    return np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else keys


def fold_frames(frames: Sequence[Frame], names: Names, manifest: int, tier: int = 1) -> Columns:
    """Frames in ascending order of step, as columns of a tier.

    manifest: the version that names the layers of the result; a layer that it does not name is
    left out.
    """
    starts = groups_of(np.array([frame.step // column_steps(tier) for frame in frames]))
    ends = [*starts[1:].tolist(), len(frames)]
    whole = np.zeros(1, dtype=np.int64)
    # A column at a time bounds the memory, whatever the number of layers.
    return _append_columns(
        [
            join_columns(_lift_frames(frames[start:end], names, manifest), whole)
            for start, end in zip(starts.tolist(), ends, strict=True)
        ],
        len(names[manifest]),
    )


def fold_columns(parts: Sequence[tuple[Columns, int]], names: Names, to: int, tier: int) -> Columns:
    """Columns of any lower tiers, or halves of columns of this one, as columns of a tier.

    parts: with the manifest that names their layers; to: the manifest of the result.
    """
    moved = [_moved(columns, names, version, to) for columns, version in parts]
    whole = _append_columns(moved, len(names[to]))
    order = np.argsort(whole.last, kind="stable")
    whole = whole.taken(order)
    return join_columns(whole, groups_of(whole.first // column_steps(tier)))


def _lift_frames(frames: Sequence[Frame], names: Names, manifest: int) -> Columns:
    layers = names[manifest]
    statistics: dict[str, Fold] = {}
    for name in BY_NAME:
        rows = np.full((len(frames), len(layers)), np.nan, dtype=np.float32)
        for index, frame in enumerate(frames):
            row = frame.row(name)
            if row is None:
                continue
            if frame.manifest == manifest:
                rows[index] = row
            else:
                places = places_of(names[frame.manifest], layers)
                rows[index, places >= 0] = row[places[places >= 0]]
        if any(name in frame.columns for frame in frames):
            statistics[name] = lift(rows, by_squares(name))
    told = lift_scalars([frame.step for frame in frames], [frame.scalars for frame in frames])
    return told._replace(statistics=statistics)


def lift_scalars(at: Sequence[int], frames: Sequence[Mapping[str, float]]) -> Columns:
    """A column for each frame, of its scalars alone. at: their steps."""
    steps = np.array(at, dtype=np.int64)
    scalars: dict[str, Course] = {}
    for name in sorted({name for told in frames for name in told}):
        values = np.array([told.get(name, math.nan) for told in frames])
        logged = np.array([name in told for told in frames], dtype=np.int64)
        scalars[name] = Course(lift(values), values, logged)
    return Columns(steps, steps, {}, scalars)


def join_columns(columns: Columns, starts: Ints) -> Columns:
    """Columns in groups. starts: int64[groups], the first column of each group."""
    scalars: dict[str, Course] = {}
    for name, course in columns.scalars.items():
        told = np.where(course.logged > 0, np.arange(len(course.logged)), -1)
        newest = np.maximum.reduceat(told, starts)
        scalars[name] = Course(
            join(course.fold, starts),
            np.where(newest >= 0, course.newest[newest], np.nan),
            np.add.reduceat(course.logged, starts),
        )
    return Columns(
        np.minimum.reduceat(columns.first, starts),
        np.maximum.reduceat(columns.last, starts),
        {name: join(fold, starts) for name, fold in columns.statistics.items()},
        scalars,
    )


def _append_columns(parts: Sequence[Columns], layers: int) -> Columns:
    def filled(part: Columns, name: str) -> Fold:
        return part.statistics.get(name) or empty_fold((len(part.first), layers), np.float32)

    def told(part: Columns, name: str) -> Course:
        return part.scalars.get(name) or _silent(len(part.first))

    courses = {
        name: [told(part, name) for part in parts]
        for name in sorted({name for part in parts for name in part.scalars})
    }
    return Columns(
        np.concatenate([part.first for part in parts]),
        np.concatenate([part.last for part in parts]),
        {
            name: append([filled(part, name) for part in parts])
            for name in BY_NAME
            if any(name in part.statistics for part in parts)
        },
        {
            name: Course(
                append([course.fold for course in found]),
                np.concatenate([course.newest for course in found]),
                np.concatenate([course.logged for course in found]),
            )
            for name, found in courses.items()
        },
    )


def empty_fold(shape: tuple[int, ...], dtype: type[np.floating[Any]]) -> Fold:
    """Columns without a value."""
    nothing = np.full(shape, np.nan, dtype=dtype)
    return Fold(nothing, nothing, np.zeros(shape), np.zeros(shape, dtype=np.int64))


def _silent(columns: int) -> Course:
    never = np.zeros(columns, dtype=np.int64)
    return Course(empty_fold((columns,), np.float64), np.full(columns, np.nan), never)


def _moved(columns: Columns, names: Names, version: int, to: int) -> Columns:
    if names[version] == names[to]:
        return columns
    places = places_of(names[version], names[to])
    statistics = {name: placed(fold, places) for name, fold in columns.statistics.items()}
    return columns._replace(statistics=statistics)


class _Packed(msgspec.Struct, array_like=True, frozen=True):
    """A stretch at rest. Each statistic is squeezed apart: a picture needs one of them."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    statistics: dict[str, memoryview]
    scalars: tuple[str, ...]
    courses: memoryview  # float64[scalars, 6, columns]
    # Counts that are 0 everywhere, as those of non-finite values mostly are: of them the numbers
    # of values alone are kept.
    zeros: tuple[str, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Packed] = msgspec.msgpack.Decoder(_Packed)


def pack_columns(columns: Columns) -> bytes:
    """A stretch's row. Smallest, mean and largest values are kept as float32, sums as float64."""
    courses = [
        np.stack([*course.fold, course.newest, course.logged]).astype("<f8")
        for course in columns.scalars.values()
    ]
    told = np.concatenate(courses).tobytes() if courses else b""
    return _encoder.encode(
        _Packed(
            first=tuple(columns.first.tolist()),
            last=tuple(columns.last.tolist()),
            statistics={
                name: memoryview(_pack_fold(name, fold))
                for name, fold in columns.statistics.items()
            },
            scalars=tuple(columns.scalars),
            courses=memoryview(squeeze(memoryview(told))),
            zeros=tuple(name for name, fold in columns.statistics.items() if _is_zero(name, fold)),
        )
    )


def unpack_columns(
    body: bytes, statistics: Collection[str] | None = None, scalars: bool = True
) -> Columns:
    """A stretch, or as much of it as is asked for. statistics: None for all of them."""
    packed = _decoder.decode(body)
    size = len(packed.first)
    found: dict[str, Course] = {}
    if scalars and packed.scalars:
        told = np.frombuffer(unsqueeze(packed.courses), dtype="<f8")
        table = told.reshape(len(packed.scalars), 6, size)
        for name, (low, high, total, finite, newest, logged) in zip(
            packed.scalars, table, strict=True
        ):
            fold = Fold(low, high, total, finite.astype(np.int64))
            found[name] = Course(fold, newest, logged.astype(np.int64))
    return Columns(
        np.array(packed.first, dtype=np.int64),
        np.array(packed.last, dtype=np.int64),
        {
            name: _unpack_zeros(squeezed, size)
            if name in packed.zeros
            else _unpack_fold(name, squeezed, size)
            for name, squeezed in packed.statistics.items()
            if statistics is None or name in statistics
        },
        found,
    )


def _is_zero(name: str, fold: Fold) -> bool:
    return BY_NAME[name].merge is Merge.SUM and bool(
        fold.finite.all() and not fold.low.any() and not fold.high.any()
    )


def _unpack_zeros(squeezed: memoryview, columns: int) -> Fold:
    finite = np.frombuffer(unsqueeze(squeezed), dtype="<u4").reshape(columns, -1).astype(np.int64)
    nothing = np.zeros(finite.shape, dtype=np.float32)
    return Fold(nothing, nothing, np.zeros(finite.shape), finite)


def _pack_fold(name: str, fold: Fold) -> bytes:
    if _is_zero(name, fold):
        return squeeze(memoryview(fold.finite.astype("<u4").tobytes()))
    counts = BY_NAME[name].merge is Merge.SUM
    middle = fold.total.astype("<f8") if counts else fold.mean(by_squares(name)).astype("<f4")
    parts = (fold.low.astype("<f4"), fold.high.astype("<f4"), fold.finite.astype("<u4"), middle)
    return squeeze(memoryview(b"".join(part.tobytes() for part in parts)))


def _unpack_fold(name: str, squeezed: memoryview, columns: int) -> Fold:
    counts = BY_NAME[name].merge is Merge.SUM
    content = unsqueeze(squeezed)
    plane = len(content) // (5 if counts else 4)
    shape = (columns, plane // 4 // max(1, columns))

    def read(dtype: str, place: int) -> NDArray[Any]:
        size = shape[0] * shape[1]
        return np.frombuffer(content, dtype, size, place * plane).reshape(shape)

    low, high, finite = read("<f4", 0), read("<f4", 1), read("<u4", 2).astype(np.int64)
    if counts:
        return Fold(low, high, read("<f8", 3), finite)
    mean = read("<f4", 3).astype(np.float64)
    total = finite * (mean * mean if by_squares(name) else mean)
    # Where there was no value the mean is NaN.
    return Fold(low, high, np.where(finite > 0, total, 0.0), finite)


def add_histograms(
    frames: Sequence[Frame], names: Names, manifest: int
) -> NDArray[np.uint64] | None:
    """Counts of all frames together. uint64[layers, BUCKETS], None when no frame has any."""
    return add_counts(
        [(counts, frame.manifest) for frame, counts in _counted(frames)], names, manifest
    )


def add_counts(
    parts: Sequence[tuple[NDArray[Any], int]], names: Names, to: int
) -> NDArray[np.uint64] | None:
    """Counts of layers, added. parts: uint[layers, BUCKETS] with the manifest of their layers."""
    if not parts:
        return None
    added = np.zeros((len(names[to]), BUCKETS), dtype=np.uint64)
    for counts, version in parts:
        if version == to:
            added += counts
        else:
            places = places_of(names[version], names[to])
            added[places >= 0] += counts[places[places >= 0]]
    return added


def _counted(frames: Sequence[Frame]) -> list[tuple[Frame, NDArray[np.uint32]]]:
    found = [(frame, unpack_histograms(frame)) for frame in frames]
    return [(frame, counts) for frame, counts in found if counts is not None]


def pack_counts(counts: NDArray[np.uint64]) -> bytes:
    """Histograms of a stretch's row, in the narrowest numbers that hold them."""
    largest = int(counts.max(initial=0))
    dtype = next(kind for kind in ("<u2", "<u4", "<u8") if largest <= np.iinfo(kind).max)
    return zstd.compress(counts.astype(dtype).tobytes(), level=LEVEL)


def unpack_counts(body: bytes, layers: int) -> NDArray[Any]:
    """Histograms of a stretch's row, in the numbers that it keeps. uint[layers, BUCKETS]."""
    content = zstd.decompress(body)
    width = len(content) // max(1, layers * BUCKETS)
    return np.frombuffer(content, dtype=f"<u{width or 2}").reshape(layers, BUCKETS)
