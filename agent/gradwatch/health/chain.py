"""The chain that backpropagation runs along: the weight layers in order of depth.

Biases, normalisation and embeddings are no links of it: a bias before batch-norm has gradient 0 by
design, and most rows of an embedding have none in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.robust import Held, held, root_sum_squares
from gradwatch.health.window import Layer, Layers, Window

EVERY = slice(None)


@dataclass(frozen=True)
class Chain:
    """Weight layers, the input's first. n: their number.

    rms, bias_rms: root mean square of a gradient's elements, so that sizes of layers cancel.
    relative: norm of the gradient / norm of the weights, NaN where the latter is 0 or unknown.
    """

    layers: tuple[int, ...]  # place of each link in window.layers
    names: tuple[str, ...]
    rms: NDArray[np.float32]  # [steps, n]
    bias_rms: NDArray[np.float32]  # [steps, n], NaN for a link without bias
    relative: NDArray[np.float32]  # [steps, n]

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


def is_stray(layer: Layer) -> bool:
    """Whether the optimizer holds it though no model does, as it holds what was replaced since."""
    return layer.optimized and not layer.module


def links(window: Window) -> list[int]:
    """Places in window.layers of the weight layers, the input's first."""
    return window.of_layers(_links)


def links_of(layers: Layers) -> list[int]:
    """Places of the weight layers, the input's first."""
    return layers.once(_links)


def _links(layers: Layers) -> list[int]:
    places = [place for place, layer in enumerate(layers) if is_link(layer)]
    return sorted(places, key=lambda place: (layers[place].depth, place))


def optimized(window: Window) -> NDArray[np.bool_]:
    """Layers that the optimizer holds. bool[layers]."""
    return window.of_layers(_optimized)


def _optimized(layers: Layers) -> NDArray[np.bool_]:
    return np.array([layer.optimized for layer in layers], dtype=np.bool_)


def trainable(window: Window) -> NDArray[np.bool_]:
    """Layers that ask for a gradient. bool[layers]."""
    return window.of_layers(_trainable)


def _trainable(layers: Layers) -> NDArray[np.bool_]:
    return np.array([layer.trainable for layer in layers], dtype=np.bool_)


def bias_places(window: Window) -> list[int]:
    """For each link the place of its bias, or of the norm right after it; -1 for none.

    A unit's bias has gradient 0 exactly when no gradient arrives at the unit, whatever its input.
    """
    return window.of_layers(_bias_places)


def bias_places_of(layers: Layers) -> list[int]:
    """For each of the weight layers the place of its bias: see bias_places."""
    return layers.once(_bias_places)


def _bias_places(layers: Layers) -> list[int]:
    by_name = {layer.name: place for place, layer in enumerate(layers)}
    order = sorted(range(len(layers)), key=lambda place: (layers[place].depth, place))
    position = {place: number for number, place in enumerate(order)}
    found: list[int] = []
    for place in links_of(layers):
        layer = layers[place]
        module, _, leaf = layer.name.rpartition(".")
        prefix = f"{module}." if module else ""
        own = {prefix + leaf.replace("weight", "bias"), prefix + "bias"}
        names = [by_name[name] for name in sorted(own) if name in by_name and name != layer.name]
        after = _norm_after(layers, order, position[place] + 1)
        candidates = names or ([after] if after is not None else [])
        fitting = [c for c in candidates if layers[c].shape == layer.shape[:1]]
        found.append(fitting[0] if fitting else -1)
    return found


def _norm_after(layers: Layers, order: list[int], start: int) -> int | None:
    """The bias of the first normalisation before the next weight layer, from `start` on."""
    for position in range(start, len(order)):
        place = order[position]
        layer = layers[place]
        if is_link(layer):
            return None
        if layer.role == "norm" and layer.name.endswith("bias"):
            return place
    return None


def rms(window: Window, rows: NDArray[np.intp] | slice = EVERY) -> NDArray[np.float32]:
    """Root mean square of the elements of each gradient. float32[rows, layers]."""
    return window.statistic("norm")[rows] / roots(window)


def roots(window: Window) -> NDArray[np.float32]:
    """Square root of each layer's number of elements. float32[layers]."""
    return window.of_layers(_roots)


def _roots(layers: Layers) -> NDArray[np.float32]:
    sizes = np.array([max(prod(layer.shape), 1) for layer in layers], dtype=np.float64)
    return np.sqrt(sizes).astype(np.float32)


def chain_of(window: Window) -> Chain:
    """The weight layers of a window, by depth."""
    return window.once(_chain_of)


def _chain_of(window: Window) -> Chain:
    places = links(window)
    norm = window.statistic("norm")
    names, has, biases = window.of_layers(_names_and_biases)
    bias_rms = np.full((len(window.steps), len(places)), np.nan, dtype=np.float32)
    bias_rms[:, has] = norm[:, biases] / roots(window)[biases]
    return Chain(
        layers=tuple(places),
        names=names,
        rms=norm[:, places] / roots(window)[places],
        bias_rms=bias_rms,
        relative=relative_size(window, places),
    )


def _names_and_biases(
    layers: Layers,
) -> tuple[tuple[str, ...], NDArray[np.intp], NDArray[np.int64]]:
    """Names of the weight layers; which of them have a bias, and the place of each such bias."""
    biases = np.array(bias_places_of(layers), dtype=np.int64)
    # A normalisation's bias says whether gradient arrives, but not how much the weights get.
    has = np.flatnonzero([bias >= 0 and layers[bias].role == "bias" for bias in biases.tolist()])
    return tuple(layers[place].name for place in links_of(layers)), has, biases[has]


def relative_size(window: Window, places: Sequence[int]) -> NDArray[np.float32]:
    """Gradient norm / weight norm of some layers, NaN where the latter is 0 or unknown. [steps, n].

    The norm of the weights is held between detail frames.
    """
    weights = weight_norms(window)
    known = weights.values[:, places]
    known[~(known > 0)] = np.nan
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return window.statistic("norm")[:, places] / known[weights.row]


def weight_norms(window: Window) -> Held:
    """Norm of each layer's weights, held between detail frames."""
    return window.once(_weight_norms)


def _weight_norms(window: Window) -> Held:
    return held(window.statistic("weight_norm"))


def broken_steps(window: Window) -> NDArray[np.bool_]:
    """Steps at which a gradient or the loss was NaN or Inf. bool[steps]."""
    return window.once(_broken_steps)


def _broken_steps(window: Window) -> NDArray[np.bool_]:
    counted = (window.statistic("nonfinite") > 0).any(axis=1)
    infinite = np.isinf(window.statistic("absmax")).any(axis=1)
    return counted | infinite | window.broken_scalar("loss")


def sound_part(window: Window) -> Window:
    """The steps whose gradients were measured and finite: what most detectors reason about."""
    sound = window.once(_sound_part)
    return window if sound is None else sound


def total_norm(window: Window) -> NDArray[np.float64]:
    """Norm of all gradients together at each step. float64[steps]."""
    return window.once(_total_norm)


def _total_norm(window: Window) -> NDArray[np.float64]:
    return root_sum_squares(window.statistic("norm"))


def _sound_part(window: Window) -> Window | None:
    """None for all of it: a window that kept itself would not be freed before the next sweep."""
    keep = ~broken_steps(window)
    if window.measured is not None:
        keep &= window.measured
    return None if keep.all() else window.only(keep)
