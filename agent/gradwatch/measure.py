"""Measuring gradients: the hot path.

`Meter` runs in the training thread, reads only, and on an accelerator starts work without waiting
for it. `Reading.resolve` runs in the agent's own thread and turns what was read into statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.layers import Layer
from gradwatch.wire.histogram import histogram

# Elements of a layer's gradient that its histogram and share of zeros are taken from.
SAMPLE_SIZE = 1024
# Elements of a layer's weights that their movement and spread are taken from.
WEIGHT_SAMPLE_SIZE = 128
# Squares lose digits below 1e-38: a layer of a billion elements does so below this norm.
TINY_NORM = 1e-15
# A unit is called dead after this many detail frames in a row without any gradient.
DEAD_AFTER_FRAMES = 5

# The multi-tensor norm that torch's own clip_grad_norm_ is built on; it has no public name.
foreach_norm: Callable[..., list[Tensor]] = torch._foreach_norm  # pyright: ignore

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


class Statistics(NamedTuple):
    """What one step's frame says of the layers.

    values: float32[columns, layers]; histograms: uint16[layers, BUCKETS] on detail frames.
    """

    columns: tuple[str, ...]
    values: NDArray[np.float32]
    histograms: NDArray[np.uint16] | None = None


class Weights(NamedTuple):
    """A sample of every layer's weights, and the one before it, perhaps still on their way."""

    sizes: NDArray[np.int64]  # elements of each layer
    now: Tensor  # float64[sum of sizes]
    before: Tensor | None
    steps: int  # optimizer steps between the two


class Reading:
    """What was read of the gradients at one step, perhaps still on its way from a device."""

    def __init__(
        self,
        layers: int,
        present: list[int],
        sizes: list[int],
        rows: dict[str, Tensor],
        sample: Tensor | None = None,
        sample_sizes: Sequence[int] = (),
        weights: Weights | None = None,
    ) -> None:
        self._layers = layers
        self._present = present  # layers that have a gradient
        self._sizes = sizes  # elements of each of them
        self._names = list(rows)
        self._sample_sizes = sample_sizes
        self._weights = weights
        self._table = _to_host(torch.stack([row.double() for row in rows.values()]))
        self._sample = None if sample is None else _to_host(sample)
        self._copied = _copy_event(next(iter(rows.values())).device)

    def resolve(self) -> Statistics:
        """The statistics, once the numbers have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        read = dict(zip(self._names, self._table.numpy(), strict=True))
        size = np.asarray(self._sizes, dtype=np.float64)
        found = {"norm": read["norm"], "nonfinite": _nonfinite(read)}
        histograms: NDArray[np.uint16] | None = None
        if self._sample is not None and self._weights is not None:
            moved, spread = movement(self._weights)
            parts = np.split(self._sample.numpy(), np.cumsum(self._sample_sizes)[:-1])
            counted = np.stack([histogram(part) for part in parts])
            histograms = np.zeros((self._layers, counted.shape[1]), dtype=np.uint16)
            histograms[self._present] = counted
            with np.errstate(all="ignore"):  # non-finite gradients are data here
                mean = read["sum"] / size
                found |= {
                    "mean_abs": read["l1"] / size,
                    "absmax": np.maximum(-read["low"], read["high"]),
                    "std": np.sqrt(np.maximum(read["norm"] ** 2 / size - mean**2, 0.0)),
                    "zero_fraction": np.array([np.mean(part == 0) for part in parts]),
                    "dead_fraction": read["dead"],
                    "weight_norm": read["weight_norm"],
                    "update_ratio": moved[self._present],
                    "weight_spread": spread[self._present],
                }
        columns = NORM_COLUMNS if self._sample is None else DETAIL_COLUMNS
        values = np.full((len(columns), self._layers), np.nan, dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            values[:, self._present] = np.stack([found[name] for name in columns])
        return Statistics(columns, values, histograms)


class NoGradient:
    """What was read of the gradients at a step at which no layer had one."""

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def resolve(self) -> Statistics:
        """NaN for every layer: looked at, and nothing was there."""
        values = np.full((len(NORM_COLUMNS), self._layers), np.nan, dtype=np.float32)
        return Statistics(NORM_COLUMNS, values)


class Meter:
    """Measures the gradients of a fixed list of layers."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._unit_dims = [layer.unit_dim for layer in layers]
        index = {layer.name: place for place, layer in enumerate(layers)}
        # A unit whose inputs are all 0 has no weight gradient, but its bias tells that it lives.
        self._bias_of = [
            index.get(layer.name.removesuffix("weight") + "bias")
            if layer.name.endswith("weight")
            else None
            for layer in layers
        ]
        self._silent_frames: dict[int, Tensor] = {}
        self._detail_frames = 0
        self._weights: tuple[int, Tensor] | None = None  # step, sample

    def norms(self, parameters: Sequence[Tensor], scale: Tensor | None = None) -> Reading | None:
        """Norm of each layer's gradient; None when no layer has one. `scale`: see `details`."""
        present, gradients = _gradients(parameters)
        if not present:
            return None
        rows = _norm_rows(gradients)
        sizes = [gradient.numel() for gradient in gradients]
        return Reading(len(parameters), present, sizes, _unscale(rows, scale))

    def details(
        self, parameters: Sequence[Tensor], scale: Tensor | None = None, step: int = 0
    ) -> Reading | None:
        """Every statistic of each layer's gradient; None when no layer has one.

        scale: the loss scale that the gradients still carry (a fused optimizer under AMP).
        step: of the optimizer, by which the weights' movement is told a step.
        """
        present, gradients = _gradients(parameters)
        if not present:
            return None
        self._detail_frames += 1
        half = [gradient if _wide(gradient) else gradient.float() for gradient in gradients]
        extremes = [torch.aminmax(gradient) for gradient in half]
        samples = [_sample(gradient) for gradient in half]
        weights = [plain(parameters[layer]) for layer in present]
        rows = _norm_rows(gradients) | {
            "l1": _stack([torch.linalg.vector_norm(gradient, 1) for gradient in half]),
            "sum": _stack([gradient.sum() for gradient in half]),
            "low": _stack([extreme.min for extreme in extremes]),
            "high": _stack([extreme.max for extreme in extremes]),
            "dead": _stack(self._dead_fractions(present, gradients)),
            "weight_norm": _foreach_norm(weights),
        }
        sizes = [gradient.numel() for gradient in gradients]
        sample = torch.cat([part.to(samples[0].device) for part in samples])
        if scale is not None:
            sample = sample / scale.to(sample.device)
        sample_sizes = [part.numel() for part in samples]
        moved = self._movement(parameters, step)
        rows = _unscale(rows, scale)
        return Reading(len(parameters), present, sizes, rows, sample, sample_sizes, moved)

    def _movement(self, parameters: Sequence[Tensor], step: int) -> Weights:
        """A sample of the weights, beside that of the detail frame before."""
        parts = [_strided(plain(tensor), WEIGHT_SAMPLE_SIZE).double() for tensor in parameters]
        device = parts[0].device
        now = _to_host(torch.cat([part.to(device, non_blocking=True) for part in parts]))
        sizes = np.array([part.numel() for part in parts], dtype=np.int64)
        past, before = self._weights or (step, None)
        if before is not None and before.shape != now.shape:
            before = None
        self._weights = (step, now)
        return Weights(sizes, now, before, max(step - past, 1))

    def _dead_fractions(self, present: list[int], gradients: list[Tensor]) -> list[Tensor]:
        """Share of dead units of each present layer, NaN where it has none or it is too early."""
        gradient_of = dict(zip(present, gradients, strict=True))
        unknown = torch.tensor(float("nan"), device=gradients[0].device)
        fractions: list[Tensor] = []
        for layer, gradient in gradient_of.items():
            dim = self._unit_dims[layer]
            if dim is None or gradient.dim() < 2:
                fractions.append(unknown)
                continue
            silent = silent_units(gradient, dim)
            bias = self._bias_of[layer]
            bias_gradient = gradient_of.get(bias) if bias is not None else None
            if bias_gradient is not None and bias_gradient.shape == silent.shape:
                silent = silent & (bias_gradient == 0)
            before = self._silent_frames.get(layer)
            if before is None or before.shape != silent.shape:
                before = torch.zeros_like(silent, dtype=torch.int32)
            frames = torch.where(silent, before + 1, 0)
            self._silent_frames[layer] = frames
            enough = self._detail_frames >= DEAD_AFTER_FRAMES
            dead = (frames >= DEAD_AFTER_FRAMES).float().mean()
            fractions.append(dead if enough else unknown)
        return fractions


def read_scalar(value: float | Tensor) -> Callable[[], float]:
    """A number now, or soon from a device: taken without waiting, read by calling the result."""
    if not isinstance(value, Tensor):
        number = float(value)
        return lambda: number
    taken = plain(value).reshape(-1)[0].double()
    host = _to_host(taken.clone())
    copied = _copy_event(value.device)

    def read() -> float:
        if copied is not None:
            copied.synchronize()
        return float(host)

    return read


def silent_units(gradient: Tensor, dim: int) -> Tensor:
    """Units without any gradient. bool[units]; `dim` is the dimension that runs over units."""
    units = gradient.transpose(0, dim).flatten(1)
    if gradient.device.type != "cpu":
        return torch.linalg.vector_norm(units, float("inf"), dim=1) == 0
    # On a CPU the L2 kernel is 7 times as fast as the maximum, but squares underflow: look again.
    wide = units.dtype if _wide(units) else torch.float32
    silent = torch.linalg.vector_norm(units, 2, dim=1, dtype=wide) == 0
    if silent.any():
        silent[silent.clone()] = ~units[silent].any(dim=1)
    return silent


def _gradients(parameters: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """The layers that have a gradient, and their gradients as dense, real, local tensors."""
    present: list[int] = []
    gradients: list[Tensor] = []
    for layer, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        gradient = plain(gradient)
        if gradient.numel():
            present.append(layer)
            gradients.append(gradient)
    return present, gradients


def plain(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, dense and real. Implicit zeros of a sparse one are left out."""
    plain = tensor.detach()
    if hasattr(plain, "to_local"):
        plain = cast("Tensor", plain.to_local())  # pyright: ignore[reportAttributeAccessIssue]
    if plain.is_sparse:
        plain = plain.coalesce().values()
    return plain.abs() if plain.is_complex() else plain


def _wide(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float64)


def _stack(values: list[Tensor]) -> Tensor:
    """Zero-dimensional tensors as one, on the device of the first. float64[len(values)]."""
    first = values[0]
    if any(value.device != first.device or value.dtype != first.dtype for value in values):
        values = [value.to(first.device, torch.float64, non_blocking=True) for value in values]
    return torch.stack(values).double()


def _foreach_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm of each, accumulated in float32 at least. float64[len(tensors)]."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    norms: list[Tensor] = [tensors[0]] * len(tensors)
    for (_, dtype), places in groups.items():
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        found = foreach_norm([tensors[place] for place in places], 2, dtype=wide)
        for place, norm in zip(places, found, strict=True):
            norms[place] = norm
    return _stack(norms)


def _norm_rows(gradients: list[Tensor]) -> dict[str, Tensor]:
    """Norms, and what tells a norm that overflowed from a gradient that is not finite."""
    norms = _foreach_norm(gradients)
    if norms.device.type != "cpu":
        # To look at the norms would be to wait for the device: take the maximum along instead.
        return {"norm": norms, "peak": _stack(foreach_norm(gradients, float("inf")))}
    counts = torch.zeros_like(norms)
    doubtful = torch.nonzero(~torch.isfinite(norms) | (norms < TINY_NORM)).flatten().tolist()
    for place in doubtful:
        gradient = gradients[place]
        # Squares of finite float32 values overflow from 1.8e19 on, and are 0 below 1e-23.
        norms[place] = torch.linalg.vector_norm(gradient, 2, dtype=torch.float64)
        if not torch.isfinite(norms[place]):
            counts[place] = gradient.numel() - torch.isfinite(gradient).sum()
    return {"norm": norms, "nonfinite": counts}


def _nonfinite(read: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Count of non-finite elements; where only the maximum is known, 1 stands for some."""
    counted = read.get("nonfinite")
    return counted if counted is not None else (~np.isfinite(read["peak"])).astype(np.float64)


UNSCALED_ROWS = frozenset({"nonfinite", "dead", "weight_norm"})


def _unscale(rows: dict[str, Tensor], scale: Tensor | None) -> dict[str, Tensor]:
    if scale is None:
        return rows
    return {
        name: row if name in UNSCALED_ROWS else row / scale.to(row.device)
        for name, row in rows.items()
    }


def _sample(gradient: Tensor) -> Tensor:
    """Up to SAMPLE_SIZE elements at equal distances, from end to end."""
    return _strided(gradient, SAMPLE_SIZE).float()


def _strided(tensor: Tensor, count: int) -> Tensor:
    flat = tensor.flatten()
    return flat[:: max(-(-flat.numel() // count), 1)]


def movement(weights: Weights) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Update ratio a step, and spread, of each layer's weights; NaN where they are all 0.

    The ratio is |w_t - w_s| / (t - s) / |w_t|, s being the detail frame before: what is left of
    the updates between them once they have cancelled. Returns float64[layers] twice.
    """
    layers = len(weights.sizes)
    layer = np.repeat(np.arange(layers), weights.sizes)
    now = weights.now.numpy()

    def summed(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(layer, values, minlength=layers).astype(np.float64)

    with np.errstate(all="ignore"):  # weights may be 0, or no numbers any more
        square = summed(now**2)
        mean = summed(now) / weights.sizes
        variance = square / weights.sizes - mean**2
        # Equal weights leave a variance of rounding errors alone.
        variance = np.where(variance > 1e-12 * mean**2, variance, 0.0)
        spread = np.sqrt(variance / (square / weights.sizes))
        spread[weights.sizes < 2] = np.nan
        if weights.before is None:
            return np.full(layers, np.nan), spread
        moved = np.sqrt(summed((now - weights.before.numpy()) ** 2) / square) / weights.steps
    return np.where(square > 0, moved, np.nan), spread


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _copy_event(device: torch.device) -> torch.Event | None:
    """Fires when what was asked of the device until now is done."""
    if device.type == "cpu":
        return None
    event = torch.Event(device=device.type)
    event.record()
    return event
