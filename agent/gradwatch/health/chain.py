"""The chain that backpropagation runs along: the weight layers in order of depth.

Biases, normalisation and embeddings are no links of it: a bias before batch-norm has gradient 0 by
design, and most rows of an embedding have none in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.robust import held
from gradwatch.health.window import Layer, Window


@dataclass(frozen=True)
class Chain:
    """Weight layers, the input's first. n: their number.

    rms, bias_rms: root mean square of a gradient's elements, so that sizes of layers cancel.
    relative: norm of the gradient / norm of the weights, NaN where the latter is 0 or unknown.
    """

    layers: tuple[int, ...]  # place of each link in window.layers
    names: tuple[str, ...]
    rms: NDArray[np.float64]  # [steps, n]
    bias_rms: NDArray[np.float64]  # [steps, n], NaN for a link without bias
    relative: NDArray[np.float64]  # [steps, n]

    def only(self, keep: NDArray[np.bool_]) -> Chain:
        """The links that are kept. keep: bool[n]."""
        if keep.all():
            return self
        places = np.flatnonzero(keep)
        return Chain(
            layers=tuple(self.layers[place] for place in places),
            names=tuple(self.names[place] for place in places),
            rms=self.rms[:, places],
            bias_rms=self.bias_rms[:, places],
            relative=self.relative[:, places],
        )


def is_link(layer: Layer) -> bool:
    """Whether backpropagation passes through this layer's matrix."""
    return layer.role == "weight" and len(layer.shape) >= 2


def links(window: Window) -> list[int]:
    """Places in window.layers of the weight layers, the input's first."""
    return window.once(_links)


def _links(window: Window) -> list[int]:
    places = [place for place, layer in enumerate(window.layers) if is_link(layer)]
    return sorted(places, key=lambda place: (window.layers[place].depth, place))


def bias_places(window: Window) -> list[int]:
    """For each link the place of its bias, or of the norm right after it; -1 for none.

    A unit's bias has gradient 0 exactly when no gradient arrives at the unit, whatever its input.
    """
    return window.once(_bias_places)


def _bias_places(window: Window) -> list[int]:
    by_name = {layer.name: place for place, layer in enumerate(window.layers)}
    order = sorted(range(len(window.layers)), key=lambda place: (window.layers[place].depth, place))
    position = {place: number for number, place in enumerate(order)}
    found: list[int] = []
    for place in links(window):
        layer = window.layers[place]
        module, _, leaf = layer.name.rpartition(".")
        prefix = f"{module}." if module else ""
        own = {prefix + leaf.replace("weight", "bias"), prefix + "bias"}
        names = [by_name[name] for name in sorted(own) if name in by_name and name != layer.name]
        after = _norm_after(window, order, position[place] + 1)
        candidates = names or ([after] if after is not None else [])
        fitting = [c for c in candidates if window.layers[c].shape == layer.shape[:1]]
        found.append(fitting[0] if fitting else -1)
    return found


def _norm_after(window: Window, order: list[int], start: int) -> int | None:
    """The bias of the first normalisation before the next weight layer, from `start` on."""
    for position in range(start, len(order)):
        place = order[position]
        layer = window.layers[place]
        if is_link(layer):
            return None
        if layer.role == "norm" and layer.name.endswith("bias"):
            return place
    return None


def rms(window: Window) -> NDArray[np.float64]:
    """Root mean square of the elements of each gradient. float64[steps, layers]."""
    return window.once(_rms)


def _rms(window: Window) -> NDArray[np.float64]:
    sizes = np.array([max(prod(layer.shape), 1) for layer in window.layers], dtype=np.float64)
    return window.statistic("norm").astype(np.float64) / np.sqrt(sizes)


def chain_of(window: Window) -> Chain:
    """The weight layers of a window, by depth."""
    return window.once(_chain_of)


def _chain_of(window: Window) -> Chain:
    places = links(window)
    biases = bias_places(window)
    element_rms = rms(window)
    bias_rms = np.full((len(window.steps), len(places)), np.nan)
    for link, bias in enumerate(biases):
        # A normalisation's bias says whether gradient arrives, but not how much the weights get.
        if bias >= 0 and window.layers[bias].role == "bias":
            bias_rms[:, link] = element_rms[:, bias]
    return Chain(
        layers=tuple(places),
        names=tuple(window.layers[place].name for place in places),
        rms=element_rms[:, places],
        bias_rms=bias_rms,
        relative=relative_size(window)[:, places],
    )


def relative_size(window: Window) -> NDArray[np.float64]:
    """Gradient norm / weight norm, the latter held between detail frames. [steps, layers]."""
    return window.once(_relative_size)


def held_weight_norm(window: Window) -> NDArray[np.float64]:
    """Norm of each layer's weights, held between detail frames. float64[steps, layers]."""
    return window.once(_held_weight_norm)


def _held_weight_norm(window: Window) -> NDArray[np.float64]:
    return held(window.statistic("weight_norm"))


def _relative_size(window: Window) -> NDArray[np.float64]:
    weight = held_weight_norm(window)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weight > 0, window.statistic("norm") / weight, np.nan)


def broken_steps(window: Window) -> NDArray[np.bool_]:
    """Steps at which a gradient or the loss was NaN or Inf. bool[steps]."""
    return window.once(_broken_steps)


def _broken_steps(window: Window) -> NDArray[np.bool_]:
    counted = (window.statistic("nonfinite") > 0).any(axis=1)
    infinite = np.isinf(window.statistic("absmax")).any(axis=1)
    return counted | infinite | window.broken_scalar("loss")


def sound_part(window: Window) -> Window:
    """The steps whose gradients were measured and finite: what most detectors reason about."""
    return window.once(_sound_part)


def total_norm(window: Window) -> NDArray[np.float64]:
    """Norm of all gradients together at each step. float64[steps]."""
    return window.once(_total_norm)


def _total_norm(window: Window) -> NDArray[np.float64]:
    return np.sqrt(np.nansum(window.statistic("norm").astype(np.float64) ** 2, axis=1))


def _sound_part(window: Window) -> Window:
    keep = ~broken_steps(window)
    if window.measured is not None:
        keep &= window.measured
    if keep.all():
        return window
    return window.only(keep)
