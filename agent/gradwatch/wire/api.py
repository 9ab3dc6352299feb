"""What the collector answers: the types of its HTTP API, version 1.

Numbers that may be non-finite are `float | None` with JSON in mind (null), and arrays travel as
little-endian bytes in msgpack.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradwatch.wire.frame import RunInfo


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A type that the collector sends. Unknown fields are ignored, so that it can gain some."""


class FindingView(Answer, frozen=True, kw_only=True):
    """A finding, with the words of its kind beside its numbers."""

    id: int
    run: str
    optimizer: str
    kind: str
    title: str
    severity: str
    state: str  # open or resolved
    layers: list[str]
    first_step: int
    last_step: int
    summary: str
    evidence: dict[str, float | int | str | None]
    meaning: str
    explanation: str
    action: str
    opened_at: float  # Unix seconds
    resolved_at: float | None = None


class OptimizerView(Answer, frozen=True, kw_only=True):
    """One optimizer of a run: how far it is, and how many layers it moves."""

    name: str
    layers: int
    frames: int
    first_step: int
    last_step: int


class RunView(Answer, frozen=True, kw_only=True):
    """A run, with its verdict."""

    info: RunInfo
    status: str  # running, finished, failed or silent (no frame for a while)
    reason: str  # why it failed, "" otherwise
    verdict: str  # healthy, warning, critical, or waiting before the first judgement
    judged: bool  # everything that was stored has been judged
    last_step: int
    last_frame_at: float | None  # Unix seconds
    optimizers: list[OptimizerView]
    findings: list[FindingView]
    dropped: dict[str, int] = {}  # frames that agents dropped, by reason
    conflicts: int = 0  # records refused because another one of the same key was stored before
    loss: float | None = None  # the last one logged; null when it was not finite
    loss_nonfinite: bool = False  # the last one logged was NaN or Inf


class RunPage(Answer, frozen=True, kw_only=True):
    """One page of the list of runs, newest first."""

    runs: list[RunView]
    next: str | None = None  # the `after` of the next page


class Heatmap(Answer, frozen=True, kw_only=True):
    """One statistic over layers and steps, folded to at most the columns asked for.

    steps: int64[columns], the first step of each column. low, high: float32[layers, columns], the
    smallest and largest finite value of the column's steps, NaN where nothing was measured.
    nonfinite: bool[layers, columns], a NaN or Inf gradient in one of the column's steps.
    """

    statistic: str
    layers: list[str]
    steps_bytes: bytes
    low_bytes: bytes
    high_bytes: bytes
    nonfinite_bytes: bytes

    @property
    def steps(self) -> NDArray[np.int64]:
        return np.frombuffer(self.steps_bytes, dtype="<i8")

    def _grid(self, data: bytes, dtype: str) -> NDArray[Any]:
        return np.frombuffer(data, dtype=dtype).reshape(len(self.layers), len(self.steps))

    @property
    def low(self) -> NDArray[np.float32]:
        return self._grid(self.low_bytes, "<f4")

    @property
    def high(self) -> NDArray[np.float32]:
        return self._grid(self.high_bytes, "<f4")

    @property
    def nonfinite(self) -> NDArray[np.bool_]:
        return self._grid(self.nonfinite_bytes, "?")


class Flow(Answer, frozen=True, kw_only=True):
    """Gradient flow: every statistic of every layer at one detail frame, in depth order.

    Values are null where not measured or non-finite; `nonfinite` counts the latter.
    """

    step: int
    layers: list[str]
    roles: list[str]
    statistics: dict[str, list[float | None]]


class Scalars(Answer, frozen=True, kw_only=True):
    """Scalars over steps. steps: int64[n]; series: name -> float64[n], NaN where absent.

    broken: name -> bool[n], where the scalar was logged and was NaN or Inf; no entry for none.
    """

    steps_bytes: bytes
    series_bytes: dict[str, bytes]
    broken_bytes: dict[str, bytes] = {}

    @property
    def steps(self) -> NDArray[np.int64]:
        return np.frombuffer(self.steps_bytes, dtype="<i8")

    def series(self, name: str) -> NDArray[np.float64]:
        """Raises KeyError when no frame carried this scalar."""
        return np.frombuffer(self.series_bytes[name], dtype="<f8")

    def broken(self, name: str) -> NDArray[np.bool_]:
        """Steps at which this scalar was logged as NaN or Inf. bool[n]."""
        told = self.broken_bytes.get(name)
        if told is None:
            return np.zeros(len(self.steps), dtype=np.bool_)
        return np.frombuffer(told, dtype="?")


class Problem(Answer, frozen=True, kw_only=True):
    """An error, as RFC 9457 has it."""

    title: str
    status: int
    detail: str
    type: str = "about:blank"
    rejected: list[dict[str, Any]] = []
