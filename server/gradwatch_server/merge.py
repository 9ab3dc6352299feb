"""Ranks into one: what the frames of all ranks say of a step, as one frame of the whole model.

Pure functions over frames. A layer that every rank holds whole (DDP) has the same gradient on all
of them: the lowest rank that measured it speaks. A layer in shards (FSDP) is put together by the
rule of each statistic. Layers that only some ranks have (pipeline stages) stand beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradwatch.wire.frame import Frame, LayerInfo
from gradwatch.wire.statistics import BY_NAME, Merge
from gradwatch_server.packing import pack_histograms, unpack_histograms

# The rank of a merged frame, and of the manifest that names its layers.
MERGED = -1

# The statistic that ranks are compared by, and from where on its values differ: see
# gradwatch.reading.weight_probe, which rounds at 1e-6.
COMPARED = "weight_probe"
REPLICATED = "Replicate()"  # in a layer's sharding
DIFFERENT = 1e-5
# Relative difference of gradient norms below which ranks have the same gradient.
SIMILAR = 1e-3

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Part(NamedTuple):
    """One rank's frame, and the layers it speaks of."""

    frame: Frame
    layers: Sequence[LayerInfo]


def merge_layers(layouts: Sequence[Sequence[LayerInfo]]) -> list[LayerInfo]:
    """The layers of all ranks, each once, in order of execution. layouts: by rank.

    A rank whose layers the ranks before it do not have is a later stage: its depths go on from
    theirs.
    """
    merged: dict[str, LayerInfo] = {}
    for layout in layouts:
        if all(layer.name in merged for layer in layout):
            continue
        below = 1 + max((layer.depth for layer in merged.values()), default=-1)
        later = not any(layer.name in merged for layer in layout)
        for layer in layout:
            shift = below if later else 0
            merged.setdefault(
                layer.name, msgspec.structs.replace(layer, depth=layer.depth + shift, held=None)
            )
    return list(merged.values())


def merge_frames(parts: Sequence[Part], layers: Sequence[LayerInfo], manifest: int) -> Frame:
    """One frame of all ranks, whatever the order of the parts. Raises ValueError without parts.

    layers: as merge_layers gives them; manifest: the version that names them. The norms, largest
    values, counts and histograms of shards are those of the whole layer; a standard deviation is
    so but for the sign of the shards' means, which no rank tells: it is off by less than the
    largest of them.
    """
    if not parts:
        raise ValueError("there is no frame to merge")
    parts = sorted(parts, key=lambda part: part.frame.rank)
    table = _Table(parts, layers)
    rows = {
        name: table.merged(name)
        for name, statistic in BY_NAME.items()
        if table.measured(name) and statistic.merge is not Merge.COMPARE
    }
    if table.measured(COMPARED):
        rows["weight_drift"], rows["norm_spread"] = table.weight_drift(), table.norm_spread()
    columns = tuple(name for name in BY_NAME if name in rows)
    first = parts[0].frame
    with np.errstate(over="ignore"):
        values = np.array([rows[name] for name in columns], dtype="<f4")
    return Frame(
        optimizer=first.optimizer,
        rank=MERGED,
        step=first.step,
        time=max((part.frame.time for part in parts), key=lambda time: (math.isfinite(time), time)),
        manifest=manifest,
        columns=columns,
        values=memoryview(values.tobytes()),
        scalars=_merge_scalars(parts, table, rows.get("norm")),
        events=tuple(dict.fromkeys(event for part in parts for event in part.frame.events))[:20],
        histograms=table.histograms(),
    )


class _Table:
    """The parts spread over the merged layers: arrays of [parts, layers]."""

    def __init__(self, parts: Sequence[Part], layers: Sequence[LayerInfo]) -> None:
        place = {layer.name: index for index, layer in enumerate(layers)}
        self._parts = parts
        self._size = len(layers)
        self._places = [
            np.array([place[layer.name] for layer in part.layers], dtype=np.int64) for part in parts
        ]
        self._declared = [REPLICATED in layer.sharding for layer in layers]
        whole = np.array([math.prod(layer.shape) for layer in layers], dtype=np.float64)
        self._held = np.zeros((len(parts), self._size))
        for row, (part, places) in enumerate(zip(parts, self._places, strict=True)):
            self._held[row, places] = [_held_elements(layer) for layer in part.layers]
        # A rank that does not say how much it holds of a shard holds as much as the others.
        sharers = np.maximum(1, (self._held != 0).sum(axis=0))
        self._held = np.where(np.isnan(self._held), whole / sharers, self._held)
        self._sharded = ((self._held != 0) & (self._held < whole)).any(axis=0)
        # Layers of one name and of several sizes are not the same.
        self._replicas = ~self._sharded & ((self._held == 0) | (self._held == whole)).all(axis=0)
        # Shards that are held more than once (HSDP) would be counted more than once.
        self._copies = np.maximum(1.0, self._held.sum(axis=0) / np.maximum(whole, 1.0))
        self._broken = np.nan_to_num(self._spread("nonfinite")) > 0
        # Whether every rank holds all of the same layers, which stages of a pipeline do not.
        same = all(np.array_equal(places, self._places[0]) for places in self._places)
        self.alike = same and not self._sharded.any()

    def _spread(self, name: str) -> Floats:
        """One statistic of every part. float64[parts, layers], NaN where not measured."""
        spread = np.full((len(self._parts), self._size), np.nan)
        for row, (part, places) in enumerate(zip(self._parts, self._places, strict=True)):
            values = part.frame.row(name)
            if values is not None:
                spread[row, places] = values
        return spread

    def measured(self, name: str) -> bool:
        """Whether any rank measured this statistic."""
        return any(name in part.frame.columns for part in self._parts)

    def merged(self, name: str) -> Floats:
        """One statistic of the whole model. float64[layers]."""
        values = self._spread(name)
        measured = ~np.isnan(values) | (self._broken & (self._held > 0))
        spoken = values[np.argmax(measured, axis=0), np.arange(self._size)]
        if not self._sharded.any():
            return spoken
        # A shard without its number would make the whole look smaller: then there is none.
        holders = (self._held > 0) & np.isfinite(self._spread("norm"))
        known = measured.any(axis=0) & ~(holders & ~measured).any(axis=0)
        filled = np.where(measured, values, 0.0)
        weight = np.where(measured, self._held, 0.0)
        with np.errstate(all="ignore"):  # non-finite gradients are data here
            whole = self._rules[BY_NAME[name].merge](self, filled, weight)
        return np.where(self._sharded, np.where(known, whole, np.nan), spoken)

    def _root_sum_squares(self, values: Floats, _weight: Floats) -> Floats:
        return np.sqrt((values**2).sum(axis=0) / self._copies)

    def _largest(self, values: Floats, _weight: Floats) -> Floats:
        return values.max(axis=0)

    def _sum(self, values: Floats, _weight: Floats) -> Floats:
        return values.sum(axis=0) / self._copies

    def _mean(self, values: Floats, weight: Floats) -> Floats:
        return (values * weight).sum(axis=0) / weight.sum(axis=0)

    def _deviation(self, values: Floats, weight: Floats) -> Floats:
        count = weight.sum(axis=0)
        norms = np.where(weight > 0, self._spread("norm"), 0.0)
        mean_square = (norms**2).sum(axis=0) / count
        own_square = np.where(weight > 0, norms**2 / weight, 0.0)
        means = np.sqrt(np.maximum(own_square - values**2, 0.0))
        mean = (means * weight).sum(axis=0) / count
        return np.sqrt(np.maximum(mean_square - mean**2, 0.0))

    _rules: ClassVar[dict[Merge, Callable[[_Table, Floats, Floats], Floats]]] = {
        Merge.ROOT_SUM_SQUARES: _root_sum_squares,
        Merge.MAX: _largest,
        Merge.SUM: _sum,
        Merge.MEAN: _mean,
        Merge.DEVIATION: _deviation,
    }

    def disagreement(self) -> float | None:
        """Largest relative difference of a whole layer's norm between ranks, None for none."""
        norms = np.where(self._sharded, np.nan, self._spread("norm"))
        norms[np.isinf(norms)] = np.nan
        high, low = np.fmax.reduce(norms, axis=0), np.fmin.reduce(norms, axis=0)
        several = (np.isfinite(norms).sum(axis=0) > 1) & (high > 0)
        return float(np.max((high - low)[several] / high[several])) if several.any() else None

    def weight_drift(self) -> Floats:
        """Largest distance between ranks that hold a layer whole; NaN without two of them.
        float64[layers]."""
        values = self._of_replicas(COMPARED)
        return np.fmax.reduce(values, axis=0) - np.fmin.reduce(values, axis=0)

    def norm_spread(self) -> Floats:
        """Difference of gradient norms between replicas / the largest; a rank without a gradient
        counts as one whose gradient is 0. float64[layers]."""
        norms = self._of_replicas("norm", lacking=0.0)
        high, low = np.fmax.reduce(norms, axis=0), np.fmin.reduce(norms, axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (high - low) / high

    def _of_replicas(self, name: str, lacking: float = math.nan) -> Floats:
        """A statistic by rank, of layers that two ranks at least hold whole; NaN for others.

        lacking: stands for what a rank did not tell of a layer that it holds.
        """
        values = self._spread(name)
        values[np.isinf(values)] = np.nan
        told = np.array([name in part.frame.columns for part in self._parts])[:, None]
        values[np.isnan(values) & told & (self._held > 0) & ~self._broken] = lacking
        several = (~np.isnan(values)).sum(axis=0) > 1
        return np.where(self._replicas & several, values, np.nan)

    def drifting(self) -> dict[str, float]:
        """Which rank it is whose weights are not those of the others, where one rank is."""
        if not self.measured(COMPARED):
            return {}
        probes, moved = self._of_replicas(COMPARED), self._of_replicas("update_ratio")
        differ = self.weight_drift() > DIFFERENT
        alike = self.norm_spread()
        # What merely shares its name with a layer of another rank must not outvote the replicas.
        for likely in (np.array(self._declared), (alike < SIMILAR) | (alike >= 1), True):
            places = np.flatnonzero(differ & likely)
            if len(places):
                break
        else:
            return {}
        moved = moved[:, differ]
        found = {
            "rank_apart": _one_of(_farthest(probes[:, places])),
            "rank_moving": _one_of(_only(moved > 0, moved == 0)),
            "rank_still": _one_of(_only(moved == 0, moved > 0)),
        }
        return {
            name: float(self._parts[row].frame.rank)
            for name, row in found.items()
            if row is not None
        }

    def histograms(self) -> memoryview | None:
        """The counts of all ranks, added where they are shards."""
        merged: NDArray[np.uint32] | None = None
        spoken = np.zeros(self._size, dtype=np.bool_)
        for part, places in zip(self._parts, self._places, strict=True):
            counts = unpack_histograms(part.frame)
            if counts is None:
                continue
            if merged is None:
                merged = np.zeros((self._size, counts.shape[1]), dtype=np.uint32)
            told = counts.any(axis=1)
            wanted = told & (self._sharded[places] | ~spoken[places])
            merged[places[wanted]] += counts[wanted]
            spoken[places[told]] = True
        return None if merged is None else pack_histograms(merged)


def _farthest(values: Floats) -> Ints:
    """The row that stands alone in each column, -1 where none does. values: float64[ranks, n]."""
    away = np.abs(values - np.nanmedian(values, axis=0))
    row = np.nanargmax(away, axis=0)
    others = values.copy()
    others[row, np.arange(values.shape[1])] = np.nan
    spread = np.fmax.reduce(others, axis=0) - np.fmin.reduce(others, axis=0)
    alone = (np.isfinite(values).sum(axis=0) > 2) & (spread < 0.5 * np.nanmax(away, axis=0))
    return np.where(alone, row, -1)


def _only(those: NDArray[np.bool_], others: NDArray[np.bool_]) -> Ints:
    """The row that is the only one of `those` in each column, all else being `others`; -1 for none.

    those, others: bool[ranks, n].
    """
    alone = (those.sum(axis=0) == 1) & (those | others).all(axis=0) & others.any(axis=0)
    return np.where(alone, those.argmax(axis=0), -1)


def _one_of(rows: Ints) -> int | None:
    """The row that most of the columns with one name; None when none does."""
    named = rows[rows >= 0]
    found, counts = np.unique(named, return_counts=True)
    return int(found[counts.argmax()]) if 2 * counts.max(initial=0) > len(named) else None


def _held_elements(layer: LayerInfo) -> float:
    """How many elements of a layer the rank of this manifest holds, NaN for an unknown part."""
    if layer.held is not None:
        return layer.held
    return math.nan if "Shard(" in layer.sharding else math.prod(layer.shape)


def _merge_scalars(parts: Sequence[Part], table: _Table, norms: Floats | None) -> dict[str, float]:
    """Scalars of all ranks: the mean of those who told, but for those in SCALAR_RULES."""
    told: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.frame.scalars.items():
            if name not in OWN_TIMES:
                told.setdefault(name, []).append(value)
    merged = {name: SCALAR_RULES.get(name, _mean)(values) for name, values in told.items()}
    if "total_norm" in merged and norms is not None and not table.alike:
        merged["total_norm"] = float(np.sqrt(np.nansum(norms**2)))
        if any(math.isnan(value) for value in told["total_norm"]):
            merged["total_norm"] = math.nan
    differs = table.disagreement()
    compared = {} if differs is None else {"rank_disagreement": differs}
    compared |= table.drifting() | _slowest(parts)
    for name, value in compared.items():
        if len(merged) < MAX_SCALARS:
            merged[name] = value
    return merged


def _slowest(parts: Sequence[Part]) -> dict[str, float]:
    """The rank that needs most time for itself, that time, and what is usual of the others: their
    own time, and how long they wait."""
    told = [
        (own_s, part.frame.rank, part.frame.scalars.get("wait_time_s", math.nan))
        for part in parts
        if math.isfinite(own_s := part.frame.scalars.get("own_time_s", math.nan))
    ]
    if len(told) < 2:
        return {}
    slowest = max(told, key=lambda each: each[:2])
    others = [each for each in told if each is not slowest]
    return {
        "rank_slowest": float(slowest[1]),
        "rank_slowest_s": slowest[0],
        "rank_others_s": float(np.median([own_s for own_s, _, _ in others])),
        "rank_others_wait_s": float(np.median([wait_s for _, _, wait_s in others])),
    }


def _mean(values: Sequence[float]) -> float:
    # fsum refuses infinities of both signs, which are data here.
    return float(np.mean(sorted(values)))


# Ranks wait for each other, so the slowest makes the step; equal gradients have equal norms.
SCALAR_RULES: dict[str, Callable[[Sequence[float]], float]] = {
    "step_time_s": lambda values: float(np.max(values)),
    "total_norm": lambda values: values[0],
}
# What each rank says of itself for _slowest to compare, which no rule would put together.
OWN_TIMES = frozenset({"own_time_s", "wait_time_s"})
MAX_SCALARS = 200
