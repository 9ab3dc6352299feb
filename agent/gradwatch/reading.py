"""Readings: what was read of the gradients at one step, and the statistics that come of it.

They are made in the training thread and resolved in the agent's own, once the numbers have
arrived from the device; so all that needs no look at the gradients themselves is done here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.units import UnitCounter
from gradwatch.wire.histogram import BUCKETS, bucket_of

# Elements of a layer's gradient that its histogram is taken from; a smaller layer's are all taken.
SAMPLE_SIZE = 1024
# Elements that statistics are made of at once, or those of one layer.
CHUNK = 1 << 18

NORM_COLUMNS = ("norm", "nonfinite")
DETAIL_COLUMNS = (
    *NORM_COLUMNS,
    "mean_abs",
    "absmax",
    "std",
    "zero_fraction",
    "dead_fraction",
    "weight_norm",
    "update_ratio",
    "weight_spread",
)
# What ranks are compared by; measured in jobs of several.
COMPARED = "weight_probe"

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Statistics(NamedTuple):
    """What one step's frame says of the layers.

    values: float32[columns, layers]; histograms: uint16[layers, BUCKETS] on detail frames.
    """

    columns: tuple[str, ...]
    values: NDArray[np.float32]
    histograms: NDArray[np.uint16] | None = None


class Weights(NamedTuple):
    """A sample of every layer's weights, and the one before it, perhaps still on their way."""

    places: Sequence[int]  # of the layers, in the order of their elements
    sizes: Ints  # elements of each
    now: Tensor  # float64[sum of sizes]
    before: Tensor | None
    steps: int  # optimizer steps between the two


@dataclass(frozen=True)
class Details:
    """What a detail frame is made of beside norms. Sequences run over the gradients.

    sample: elements of one gradient after the other: of a large one some at equal distances, of
    another one all. l1, sum, peaks: see `Reduced`; of the large ones, in their order.
    """

    shapes: Sequence[tuple[int, ...]]
    sizes: Ints
    sample: Tensor
    sample_sizes: Ints
    large: Sequence[int]
    l1: Tensor
    sum: Tensor
    peaks: Tensor
    peak_sizes: Sequence[int]
    weight_norm: Tensor
    weights: Weights
    units: UnitCounter


class Reading:
    """What was read of the gradients at one step, perhaps still on its way from a device.

    layers: how many the frame speaks of. present: those that have a gradient, of which all else
    here speaks. rows: `norm`, and `nonfinite` or `peak`; none where all gradients were copied.
    scale: what the gradients are to be divided by. copied: fires when all of it has arrived.
    broken: whether a gradient is not finite; on an accelerator that is not known at once. probed:
    weights that are compared with those of other ranks. Tensors are on the CPU.
    """

    def __init__(
        self,
        layers: int,
        present: Sequence[int],
        rows: Mapping[str, Tensor],
        scale: Tensor | None,
        copied: torch.Event | None,
        details: Details | None = None,
        broken: bool = False,
        probed: Weights | None = None,
    ) -> None:
        self.broken = broken
        self._probed = probed
        self._layers = layers
        self._present = present
        self._rows = rows
        self._scale = scale
        self._copied = copied
        self._details = details
        self._found: Statistics | None = None

    @property
    def resolved(self) -> bool:
        return self._found is not None

    def resolve(self) -> Statistics:
        """The statistics, once the numbers have arrived. Called again it gives the same."""
        if self._found is None:
            if self._copied is not None:
                self._copied.synchronize()
            with np.errstate(all="ignore"):  # non-finite gradients are data here
                self._found = self._statistics(1.0 if self._scale is None else float(self._scale))
            self._details, self._probed = None, None
        return self._found

    def _statistics(self, scale: float) -> Statistics:
        rows = {name: row.numpy() for name, row in self._rows.items()}
        if self._details is None:
            found = {"norm": rows["norm"] / scale, "nonfinite": _nonfinite(rows)}
            return self._compared(Statistics(NORM_COLUMNS, self._matrix(found, NORM_COLUMNS)))
        sample = Sample.of(self._details)
        if not rows:
            rows = sample.norms()
        found = {"norm": rows["norm"] / scale, "nonfinite": _nonfinite(rows)}
        found |= _statistics(self._details, self._present, sample, found["norm"], scale)
        histograms = np.zeros((self._layers, BUCKETS), dtype=np.uint16)
        histograms[self._present] = sample.histograms(scale)
        matrix = self._matrix(found, DETAIL_COLUMNS)
        return self._compared(Statistics(DETAIL_COLUMNS, matrix, histograms))

    def _compared(self, found: Statistics) -> Statistics:
        """With what other ranks are to compare: of every layer, with a gradient or without."""
        if self._probed is None:
            return found
        probe = weight_probe(self._probed).astype(np.float32)
        columns = (*found.columns, COMPARED)
        return Statistics(columns, np.vstack([found.values, probe]), found.histograms)

    def _matrix(self, found: Mapping[str, Floats], columns: Sequence[str]) -> NDArray[np.float32]:
        values = np.full((len(columns), self._layers), np.nan, dtype=np.float32)
        values[:, self._present] = np.stack([found[name] for name in columns])
        return values


class NoGradient:
    """What was read of the gradients at a step at which no layer had one."""

    broken = False

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def resolve(self) -> Statistics:
        """NaN for every layer: looked at, and nothing was there."""
        values = np.full((len(NORM_COLUMNS), self._layers), np.nan, dtype=np.float32)
        return Statistics(NORM_COLUMNS, values)


class Sample(NamedTuple):
    """Elements of one gradient after the other. values: float32 or float64[n]."""

    values: NDArray[Any]
    sizes: Ints
    starts: Ints

    @classmethod
    def of(cls, details: Details) -> Sample:
        sizes = details.sample_sizes
        return cls(details.sample.numpy(), sizes, np.cumsum(sizes) - sizes)

    def part(self, gradient: int) -> NDArray[Any]:
        start = self.starts[gradient]
        return self.values[start : start + self.sizes[gradient]]

    def chunks(self) -> Iterator[tuple[NDArray[Any], Ints]]:
        """Several gradients at a time, and where each starts: what is made of all of their
        elements takes little memory so."""
        chunk = self.starts // CHUNK
        for places in np.split(np.arange(len(self.starts)), np.flatnonzero(np.diff(chunk)) + 1):
            start, last = self.starts[places[0]], places[-1]
            yield (
                self.values[start : self.starts[last] + self.sizes[last]],
                self.starts[places] - start,
            )

    def norms(self) -> dict[str, Floats]:
        """Of gradients that were copied whole. float64[gradients] each."""
        squares, broken = zip(*map(_squares, self.chunks()), strict=True)
        return {
            "norm": np.sqrt(np.concatenate(squares)),
            "nonfinite": np.concatenate(broken).astype(np.float64),
        }

    def histograms(self, scale: float) -> NDArray[np.uint16]:
        """Counts of SAMPLE_SIZE elements of each gradient at most. uint16[gradients, BUCKETS]."""
        steps = -(-self.sizes // SAMPLE_SIZE)
        parts = [self.part(place)[::step] for place, step in enumerate(steps.tolist())]
        gradient = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        bucket = bucket_of((np.concatenate(parts) / scale).astype(np.float32))
        cells = np.bincount(gradient * BUCKETS + bucket, minlength=len(parts) * BUCKETS)
        return cells.reshape(-1, BUCKETS).astype(np.uint16)


def _squares(chunk: tuple[NDArray[Any], Ints]) -> tuple[Floats, Ints]:
    """Of each gradient of a chunk: the sum of squares, and the count of non-finite elements."""
    values, starts = chunk
    squares = np.add.reduceat(np.square(values, dtype=np.float64), starts)
    return squares, np.add.reduceat(~np.isfinite(values), starts, dtype=np.int64)


def _sums(chunk: tuple[NDArray[Any], Ints]) -> tuple[Floats, Floats, Floats, Ints]:
    """Of each gradient of a chunk: sum, sum of magnitudes, the largest, and the count of zeros."""
    values, starts = chunk
    magnitude = np.abs(values)
    return (
        np.add.reduceat(values, starts, dtype=np.float64),
        np.add.reduceat(magnitude, starts, dtype=np.float64),
        np.maximum.reduceat(magnitude, starts).astype(np.float64),
        np.add.reduceat(magnitude == 0, starts, dtype=np.int64),
    )


def _nonfinite(rows: Mapping[str, Floats]) -> Floats:
    """Count of non-finite elements: where only the maximum is known 1 stands for some, and where
    neither is, all are finite."""
    if "peak" in rows:
        return (~np.isfinite(rows["peak"])).astype(np.float64)
    return rows.get("nonfinite", np.zeros_like(rows["norm"]))


def _statistics(
    details: Details, present: Sequence[int], sample: Sample, norm: Floats, scale: float
) -> dict[str, Floats]:
    """What a detail frame says beyond norms. float64[gradients] each."""
    size, large = details.sizes, details.large
    # Few and large operations: while they run, the training thread has Python to itself.
    total, l1, absmax, zeros = (
        np.concatenate(parts) for parts in zip(*map(_sums, sample.chunks()), strict=True)
    )
    total, l1, absmax = total / scale, l1 / scale, absmax / scale
    peaks = _split(details.peaks.numpy(), details.peak_sizes)
    for place, peak in zip(large, peaks, strict=True):
        absmax[place] = float(peak.max()) / scale
    if large:
        total[large], l1[large] = details.sum.numpy() / scale, details.l1.numpy() / scale
    mean = total / size
    largest = dict(zip(large, peaks, strict=True))
    silent = {
        present[place]: largest[place] == 0
        if place in largest
        else _silent(sample.part(place).reshape(shape), details.units.dim(present[place]))
        for place, shape in enumerate(details.shapes)
        if details.units.counts(present[place])
    }
    moved, spread = movement(details.weights)
    return {
        "mean_abs": l1 / size,
        "absmax": absmax,
        "std": np.sqrt(np.maximum(norm**2 / size - mean**2, 0.0)),
        "zero_fraction": zeros / sample.sizes,
        "dead_fraction": details.units.dead_fractions(silent)[present],
        "weight_norm": details.weight_norm.numpy(),
        "update_ratio": moved[present],
        "weight_spread": spread[present],
    }


def _silent(gradient: NDArray[Any], dim: int) -> NDArray[np.bool_]:
    """Units without any gradient. bool[units]; `dim` is the dimension that runs over units."""
    others = tuple(axis for axis in range(gradient.ndim) if axis != dim)
    return ~np.any(gradient, axis=others)


def _split(values: NDArray[Any], sizes: Sequence[int]) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(sizes)[:-1]) if sizes else []


def movement(weights: Weights) -> tuple[Floats, Floats]:
    """Update ratio a step, and spread, of each layer's weights; NaN where they are all 0.

    The ratio is |w_t - w_s| / (t - s) / |w_t|, s being the detail frame before: what is left of
    the updates between them once they have cancelled. Returns float64[layers] twice.
    """
    layers = len(weights.sizes)
    layer = np.repeat(weights.places, weights.sizes)
    sizes = np.bincount(layer, minlength=layers)
    now = weights.now.numpy()

    def summed(values: Floats) -> Floats:
        return np.bincount(layer, values, minlength=layers).astype(np.float64)

    with np.errstate(all="ignore"):  # weights may be 0, or no numbers any more
        square = summed(now**2)
        mean = summed(now) / sizes
        variance = square / sizes - mean**2
        # Equal weights leave a variance of rounding errors alone.
        variance = np.where(variance > 1e-12 * mean**2, variance, 0.0)
        spread = np.sqrt(variance / (square / sizes))
        spread[sizes < 2] = np.nan
        if weights.before is None:
            return np.full(layers, np.nan), spread
        moved = np.sqrt(summed((now - weights.before.numpy()) ** 2) / square) / weights.steps
    return np.where(square > 0, moved, np.nan), spread


# One sign for each element of a layer's sample, the same on every rank: this generator alone
# promises the same numbers in every version of numpy (NEP 19).
SIGNS = np.random.RandomState(0).randint(0, 2, 1024) * 2.0 - 1.0


def weight_probe(weights: Weights) -> Floats:
    """A number of each layer's weights w that ranks can compare: s.w / |w| + ln |w|, s: signs.

    Equal weights give equal numbers. Others differ by about |w - w'| / |w|: of a small change d the
    first term moves by s.d / |w|, which is +-|d| / |w| on average over signs (Johnson and
    Lindenstrauss 1984, with one dimension), the second by the change of length, which the first
    does not see. 0 for weights that are all 0. Returns float64[layers].
    """
    layers = len(weights.sizes)
    layer = np.repeat(weights.places, weights.sizes)
    within = np.arange(len(layer)) - np.repeat(
        np.cumsum(weights.sizes) - weights.sizes, weights.sizes
    )
    now = weights.now.numpy()
    with np.errstate(all="ignore"):  # weights may be 0, or no numbers any more
        square = np.bincount(layer, now**2, minlength=layers)
        along = np.bincount(layer, now * SIGNS[within % len(SIGNS)], minlength=layers)
        probe = along / np.sqrt(square) + 0.5 * np.log(square)
    return np.where(square == 0, 0.0, probe)
