"""Runs made by hand: manifests and frames as an agent would send them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradwatch.wire.frame import Frame, LayerInfo, Manifest, RunInfo

NORMS = ("norm", "nonfinite")
DETAILS = ("norm", "mean_abs", "absmax", "std", "zero_fraction", "nonfinite", "weight_norm")
UNITS = 64
OPTIMIZER = "SGD"


def new_run(**given: Any) -> RunInfo:
    facts: dict[str, Any] = {"project": "tests", "name": "a run", "started_at": 1.0}
    return RunInfo(id=uuid.uuid4().hex, **(facts | given))


def layer(name: str, depth: int) -> LayerInfo:
    return LayerInfo(
        name=name,
        shape=(UNITS, UNITS),
        dtype="float32",
        module="Linear",
        role="weight",
        depth=depth,
    )


def dense(count: int) -> list[LayerInfo]:
    """Weights of dense layers "0.weight" to "count - 1.weight", the input's first."""
    return [layer(f"{depth}.weight", depth) for depth in range(count)]


def manifest(layers: Sequence[LayerInfo], version: int = 1, **given: Any) -> Manifest:
    return Manifest(**({"optimizer": OPTIMIZER} | given), version=version, layers=list(layers))


def frame(
    step: int,
    matrix: ArrayLike,
    columns: tuple[str, ...] = NORMS,
    scalars: Mapping[str, float] | None = None,
    **given: Any,
) -> Frame:
    """One frame. matrix: [columns, layers]."""
    facts: dict[str, Any] = {"optimizer": OPTIMIZER, "rank": 0, "time": 1e9 + step, "manifest": 1}
    values = np.ascontiguousarray(matrix, dtype="<f4")
    return Frame(
        **(facts | given),
        step=step,
        columns=columns,
        values=memoryview(values.tobytes()),
        scalars=dict(scalars or {}),
    )


def detail(
    step: int, rms: ArrayLike, broken: ArrayLike = 0.0, loss: float = 1.0, **given: Any
) -> Frame:
    """A frame with every statistic, of layers whose gradients have these element RMS."""
    size = np.asarray(rms, dtype=np.float64)
    root = float(UNITS)  # square root of the number of elements
    rows: dict[str, NDArray[Any]] = {
        "norm": size * root,
        "mean_abs": size * 0.8,
        "absmax": size * 4,
        "std": size,
        "zero_fraction": np.zeros_like(size),
        "nonfinite": np.broadcast_to(np.asarray(broken, dtype=np.float64), size.shape),
        "weight_norm": np.full_like(size, 0.1 * root),
    }
    matrix = np.stack([rows[name] for name in DETAILS])
    return frame(step, matrix, DETAILS, {"loss": loss}, **given)


def healthy(steps: Sequence[int] | range, layers: int = 4) -> list[Frame]:
    return [detail(step, np.full(layers, 0.01)) for step in steps]


def vanishing(steps: Sequence[int] | range, layers: int = 10) -> list[Frame]:
    """Gradients that lose a factor of ten a layer on the way to the input."""
    rms = 10.0 ** -np.arange(layers, dtype=np.float64)[::-1]
    return [detail(step, rms) for step in steps]
