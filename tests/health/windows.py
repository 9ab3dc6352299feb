"""Windows made by hand: small networks whose gradients are given as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradwatch.health.window import Window

UNITS = 64  # of every layer, so that a dense layer is told from 0.6875 dead units on


@dataclass(frozen=True)
class LayerFacts:
    name: str
    shape: tuple[int, ...]
    module: str = "Linear"
    role: str = "weight"
    depth: int = 0
    trainable: bool = True
    optimized: bool = True
    dtype: str = "float32"
    sharding: str = ""


def mlp(count: int, biases: bool = True) -> list[LayerFacts]:
    """Dense layers "0" to "count - 1"; each weight is followed by its bias."""
    layers: list[LayerFacts] = []
    for depth in range(count):
        layers.append(LayerFacts(f"{depth}.weight", (UNITS, UNITS), depth=depth))
        if biases:
            layers.append(LayerFacts(f"{depth}.bias", (UNITS,), role="bias", depth=depth))
    return layers


def window(
    layers: Sequence[LayerFacts],
    rms: ArrayLike,
    steps: int | Sequence[int] = 50,
    weight_rms: float = 0.1,
    **statistics: ArrayLike,
) -> Window:
    """A window whose gradients have these element RMS.

    rms: [layers] or [steps, layers]; other statistics likewise; all are measured on every step.
    """
    numbers = np.arange(1, steps + 1) if isinstance(steps, int) else np.array(steps, dtype=np.int64)
    shape = (len(numbers), len(layers))

    def full(values: ArrayLike) -> NDArray[np.float32]:
        return np.broadcast_to(np.asarray(values, dtype=np.float32), shape).copy()

    root = np.sqrt([np.prod(layer.shape) for layer in layers])
    norm = full(np.asarray(rms) * root)
    given = {
        "norm": norm,
        "nonfinite": np.where(np.isnan(norm), np.nan, 0.0).astype(np.float32),
        "weight_norm": full(weight_rms * root),
        "zero_fraction": np.where(norm == 0, 1.0, 0.0).astype(np.float32),
        "dead_fraction": np.where(norm == 0, 1.0, 0.0).astype(np.float32),
    }
    given |= {name: full(values) for name, values in statistics.items()}
    return Window(
        steps=numbers.astype(np.int64),
        layers=layers,
        statistics=given,
        scalars={"loss": np.full(len(numbers), 2.3)},
    )


def with_statistic(base: Window, name: str, values: ArrayLike) -> Window:
    return replace(base, statistics={**base.statistics, name: np.asarray(values, dtype=np.float32)})


def with_loss(base: Window, values: ArrayLike, reported: ArrayLike | None = None) -> Window:
    told = {} if reported is None else {"loss": np.asarray(reported, dtype=np.bool_)}
    return replace(base, scalars={"loss": np.asarray(values, dtype=np.float64)}, reported=told)


def rows(base: Window, keep: NDArray[np.intp] | slice) -> Window:
    """The same window with only some of its steps."""
    return replace(
        base,
        steps=base.steps[keep],
        statistics={name: values[keep] for name, values in base.statistics.items()},
        scalars={name: values[keep] for name, values in base.scalars.items()},
        reported={name: values[keep] for name, values in base.reported.items()},
    )
