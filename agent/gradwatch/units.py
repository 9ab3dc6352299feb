"""Dead units: output units that have had no gradient at any of the last detail frames.

A unit is a row of a weight's gradient with the element of the bias that belongs to it; never the
share of zero activations, for a healthy ReLU layer has half of them at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gradwatch.layers import Layer

# A unit is called dead after this many detail frames in a row without any gradient.
DEAD_AFTER_FRAMES = 5


class UnitCounter:
    """Counts, for each unit of a fixed list of layers, its detail frames without any gradient."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        index = {layer.name: place for place, layer in enumerate(layers)}
        self._layers = len(layers)
        self._dims = {
            place: layer.unit_dim
            for place, layer in enumerate(layers)
            if layer.unit_dim is not None
        }
        # A unit whose inputs are all 0 has no weight gradient, but its bias tells that it lives.
        self._bias_of = {
            place: index[bias]
            for place in self._dims
            if layers[place].name.endswith("weight")
            and (bias := layers[place].name.removesuffix("weight") + "bias") in index
            and layers[index[bias]].parameter.dim() == 1
        }
        self._biases = set(self._bias_of.values())
        self._silent_frames: dict[int, NDArray[np.int32]] = {}
        self._frames = 0

    def counts(self, layer: int) -> bool:
        """Whether the units of this layer's gradient are wanted."""
        return layer in self._dims or layer in self._biases

    def dim(self, layer: int) -> int:
        """The dimension of a counted layer that runs over units."""
        return self._dims.get(layer, 0)

    def dead_fractions(self, silent: Mapping[int, NDArray[np.bool_]]) -> NDArray[np.float64]:
        """Count one more detail frame. Share of each layer's units that are dead, NaN where it
        has none or it is too early to say.

        silent: for each counted layer that has a gradient, bool[units]: whether it is all 0.
        Returns float64[layers].
        """
        self._frames += 1
        fractions = np.full(self._layers, np.nan)
        for layer in self._dims.keys() & silent.keys():
            quiet = silent[layer]
            bias = silent.get(self._bias_of.get(layer, -1))
            if bias is not None and bias.shape == quiet.shape:
                quiet = quiet & bias
            before = self._silent_frames.get(layer)
            if before is None or before.shape != quiet.shape:
                before = np.zeros(quiet.shape, dtype=np.int32)
            frames = np.where(quiet, before + 1, 0).astype(np.int32)
            self._silent_frames[layer] = frames
            if self._frames >= DEAD_AFTER_FRAMES:
                fractions[layer] = np.mean(frames >= DEAD_AFTER_FRAMES)
        return fractions
