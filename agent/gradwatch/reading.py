"""Readings: what was read of the gradients at one step, and the statistics that come of it.

They are made in the training thread and resolved in the agent's own, once the numbers have
arrived from the device; so all that needs no look at the gradients themselves is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.gather import Gathered
from gradwatch.reduce import Numbers
from gradwatch.units import UnitCounter
from gradwatch.wire.histogram import BUCKETS, bucket_of

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
    now: Tensor  # float[sum of sizes]
    before: Tensor | None
    steps: int  # optimizer steps between the two


@dataclass(frozen=True)
class Details:
    """What a detail frame is made of beside norms. Sequences run over the gradients.

    gather: what was gathered of the gradients, or will be, of copies of them.
    """

    shapes: Sequence[tuple[int, ...]]
    sizes: Sequence[int]
    gather: Callable[[], Gathered]
    weight_norm: Numbers
    weights: Weights
    units: UnitCounter


class Reading:
    """What was read of the gradients at one step, perhaps still on its way from a device.

    layers: how many the frame speaks of. present: those that have a gradient, of which all else
    here speaks. rows: `norm`, and `nonfinite` or `peak`, of a frame that has no details. scale:
    what the gradients are to be divided by. copied: fires when all of it has arrived. broken:
    whether a gradient is not finite; on an accelerator that is not known at once. probed: weights
    that are compared with those of other ranks. Tensors are on the CPU.
    """

    def __init__(
        self,
        layers: int,
        present: Sequence[int],
        rows: Mapping[str, Numbers],
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
        if self._details is None:
            found = _norms(self._rows, scale)
            return self._compared(Statistics(NORM_COLUMNS, self._matrix(found, NORM_COLUMNS)))
        gathered = self._details.gather()
        found = _norms(gathered.rows, scale)
        found |= _statistics(self._details, gathered, self._present, found["norm"], scale)
        histograms = np.zeros((self._layers, BUCKETS), dtype=np.uint16)
        histograms[self._present] = _histograms(gathered, scale)
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


def _norms(rows: Mapping[str, Numbers], scale: float) -> dict[str, Floats]:
    arrays = {name: np.asarray(row, dtype=np.float64) for name, row in rows.items()}
    return {"norm": arrays["norm"] / scale, "nonfinite": _nonfinite(arrays)}


def _nonfinite(rows: Mapping[str, Floats]) -> Floats:
    """Count of non-finite elements: where only the maximum is known 1 stands for some, and where
    neither is, all are finite."""
    if "peak" in rows:
        return (~np.isfinite(rows["peak"])).astype(np.float64)
    return rows.get("nonfinite", np.zeros_like(rows["norm"]))


def _statistics(
    details: Details, gathered: Gathered, present: Sequence[int], norm: Floats, scale: float
) -> dict[str, Floats]:
    """What a detail frame says beyond norms. float64[gradients] each."""
    values, sizes, large = gathered.sample.numpy(), gathered.sample_sizes, gathered.large
    starts = np.cumsum(sizes) - sizes
    magnitude = np.abs(values)
    total = np.add.reduceat(values, starts, dtype=np.float64)
    l1 = np.add.reduceat(magnitude, starts, dtype=np.float64)
    absmax = np.maximum.reduceat(magnitude, starts).astype(np.float64)
    zeros = np.add.reduceat(magnitude == 0, starts, dtype=np.int64)
    peaks = _split(gathered.peaks.numpy(), gathered.peak_sizes)
    absmax[large] = [peak.max() for peak in peaks]
    total[large], l1[large] = gathered.sum.numpy(), gathered.l1.numpy()
    total, l1, absmax = total / scale, l1 / scale, absmax / scale
    size = np.array(details.sizes)
    mean = total / size
    largest = dict(zip(large, peaks, strict=True))
    silent = {
        present[place]: largest[place] == 0
        if place in largest
        else _silent(
            values[starts[place] : starts[place] + sizes[place]].reshape(shape),
            details.units.dim(present[place]),
        )
        for place, shape in enumerate(details.shapes)
        if details.units.counts(present[place])
    }
    moved, spread = movement(details.weights)
    return {
        "mean_abs": l1 / size,
        "absmax": absmax,
        "std": np.sqrt(np.maximum(norm**2 / size - mean**2, 0.0)),
        "zero_fraction": zeros / sizes,
        "dead_fraction": details.units.dead_fractions(silent)[present],
        "weight_norm": np.asarray(details.weight_norm, dtype=np.float64),
        "update_ratio": moved[present],
        "weight_spread": spread[present],
    }


def _histograms(gathered: Gathered, scale: float) -> NDArray[np.uint16]:
    """Counts of each gradient's sample. uint16[gradients, BUCKETS]."""
    sizes = gathered.sample_sizes
    gradient = np.repeat(np.arange(len(sizes)), sizes)
    bucket = bucket_of((gathered.sample.numpy() / scale).astype(np.float32))
    cells = np.bincount(gradient * BUCKETS + bucket, minlength=len(sizes) * BUCKETS)
    return cells.reshape(-1, BUCKETS).astype(np.uint16)


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
    now = weights.now.numpy().astype(np.float64)

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
    now = weights.now.numpy().astype(np.float64)
    with np.errstate(all="ignore"):  # weights may be 0, or no numbers any more
        square = np.bincount(layer, now**2, minlength=layers)
        along = np.bincount(layer, now * SIGNS[within % len(SIGNS)], minlength=layers)
        probe = along / np.sqrt(square) + 0.5 * np.log(square)
    return np.where(square == 0, 0.0, probe)
