"""What the collector answers: the types of its HTTP API, version 1.

Numbers that may be non-finite are `float | None` with JSON in mind (null), and arrays travel as
little-endian bytes in msgpack.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from gradwatch.wire.frame import LayerInfo, Name, RunInfo
from gradwatch.wire.histogram import BUCKETS, edges

# What a token is good for: to send, to read, or both and to change, delete and make tokens.
ScopeName = Literal["ingest", "read", "admin"]


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A type that people send, as JSON."""


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
    muted: bool = False  # counts for no verdict, and no message is sent of it
    acknowledged_at: float | None = None  # somebody has seen it


class FindingChangeView(Answer, frozen=True, kw_only=True):
    """One change in the life of a finding."""

    at: float  # Unix seconds
    change: str  # opened, resolved, muted, unmuted or acknowledged
    step: int  # the newest one that had shown the problem
    severity: str
    note: str = ""


class FindingHistory(Answer, frozen=True, kw_only=True):
    """A finding and all that became of it, the oldest change first."""

    finding: FindingView
    changes: list[FindingChangeView]


class FindingPage(Answer, frozen=True, kw_only=True):
    """One page of the findings of all runs, newest first."""

    findings: list[FindingView]
    next: str | None = None  # the `after` of the next page


class FindingPatch(Question, frozen=True, kw_only=True):
    """What somebody has to say of a finding."""

    muted: bool | None = None
    acknowledged: bool | None = None
    note: Annotated[str, Meta(max_length=2000)] = ""


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
    notes: str = ""
    score: float | None = None  # health from 0 to 100, see gradwatch.health.score; null if waiting


class LayerView(Answer, frozen=True, kw_only=True):
    """One layer of a run, and how it does."""

    name: str
    role: str  # weight, bias, norm or embedding
    score: float | None  # health from 0 to 100; null before the first judgement
    findings: list[str]  # kinds that are open and name it (each names 200 layers at most)
    norm: float | None  # of its gradient; null when it has none, or none that is finite


class LayersView(Answer, frozen=True, kw_only=True):
    """How the layers of an optimizer do, the input's first."""

    definition: str  # of the scores
    step: int | None  # of the norms: the last one at which gradients were looked at
    layers: list[LayerView]


class RunPatch(Question, frozen=True, kw_only=True):
    """What somebody wants to be told of a run, in place of what the job said of itself."""

    name: Name | None = None
    tags: Annotated[list[Name], Meta(max_length=100)] | None = None
    notes: Annotated[str, Meta(max_length=20_000)] | None = None


class RunFinish(Question, frozen=True, kw_only=True):
    """How a run ended whose job did not say so itself."""

    status: Annotated[str, Meta(pattern="^(finished|failed)$")] = "finished"
    reason: Annotated[str, Meta(max_length=2000)] = ""


class RunPage(Answer, frozen=True, kw_only=True):
    """One page of the list of runs, newest first."""

    runs: list[RunView]
    next: str | None = None  # the `after` of the next page


class HeatmapJson(Answer, frozen=True, kw_only=True):
    """One statistic over layers and steps, for people. Grids are [layers][columns], null for
    what was not measured."""

    statistic: str
    layers: list[str]
    steps: list[int]  # the first step of each column
    low: list[list[float | None]]
    mean: list[list[float | None]]
    high: list[list[float | None]]
    nonfinite: list[list[bool]]


class Heatmap(Answer, frozen=True, kw_only=True):
    """One statistic over layers and steps, folded to at most the columns asked for.

    steps: int64[columns], the first step of each column. low, mean, high: float32[layers, columns]
    of the finite values of the column's steps, NaN where nothing was measured; the mean of norms
    is their root mean square. nonfinite: bool[layers, columns], a NaN or Inf gradient in one of
    the column's steps.
    """

    statistic: str
    layers: list[str]
    steps_bytes: bytes
    low_bytes: bytes
    high_bytes: bytes
    nonfinite_bytes: bytes
    mean_bytes: bytes = b""

    @property
    def steps(self) -> NDArray[np.int64]:
        return np.frombuffer(self.steps_bytes, dtype="<i8")

    def _grid(self, data: bytes, dtype: str) -> NDArray[Any]:
        return np.frombuffer(data, dtype=dtype).reshape(len(self.layers), len(self.steps))

    @property
    def low(self) -> NDArray[np.float32]:
        return self._grid(self.low_bytes, "<f4")

    @property
    def mean(self) -> NDArray[np.float32]:
        return self._grid(self.mean_bytes, "<f4")

    @property
    def high(self) -> NDArray[np.float32]:
        return self._grid(self.high_bytes, "<f4")

    @property
    def nonfinite(self) -> NDArray[np.bool_]:
        return self._grid(self.nonfinite_bytes, "?")

    def plain(self) -> HeatmapJson:
        """The same for people."""
        return HeatmapJson(
            statistic=self.statistic,
            layers=self.layers,
            steps=self.steps.tolist(),
            low=numbers(self.low),
            mean=numbers(self.mean),
            high=numbers(self.high),
            nonfinite=self.nonfinite.tolist(),
        )

    def arrow(self) -> dict[str, Any]:
        """Columns of a table with one row a layer and step."""
        layers, columns = len(self.layers), len(self.steps)
        return {
            "layer": np.repeat(np.array(self.layers, dtype=object), columns),
            "step": np.tile(self.steps, layers),
            "low": self.low.ravel(),
            "mean": self.mean.ravel(),
            "high": self.high.ravel(),
            "nonfinite": self.nonfinite.ravel(),
        }


def numbers(values: NDArray[Any]) -> Any:
    """Nested lists as JSON can carry them: null for what is not finite."""
    plain = values.astype(object)
    plain[~np.isfinite(values)] = None
    return plain.tolist()


class HistogramsJson(Answer, frozen=True, kw_only=True):
    """Histograms of one layer over steps, for people. counts: [steps][buckets]."""

    layer: str
    steps: list[int]
    edges: list[float | None]  # lower edge of each bucket but the last; null is minus infinity
    counts: list[list[int]]


class Histograms(Answer, frozen=True, kw_only=True):
    """Histograms of one layer's gradient over steps, added up to at most the columns asked for.

    steps: int64[columns], the first of each. counts: uint64[columns, BUCKETS]; the last bucket
    counts non-finite values. edges: float64[BUCKETS - 1], lower edges of the others.
    """

    layer: str
    steps_bytes: bytes
    counts_bytes: bytes

    @property
    def steps(self) -> NDArray[np.int64]:
        return np.frombuffer(self.steps_bytes, dtype="<i8")

    @property
    def counts(self) -> NDArray[np.uint64]:
        return np.frombuffer(self.counts_bytes, dtype="<u8").reshape(-1, BUCKETS)

    @property
    def edges(self) -> NDArray[np.float64]:
        return edges()

    def plain(self) -> HistogramsJson:
        """The same for people."""
        return HistogramsJson(
            layer=self.layer,
            steps=self.steps.tolist(),
            edges=numbers(self.edges),
            counts=self.counts.tolist(),
        )

    def arrow(self) -> dict[str, Any]:
        """Columns of a table with one row a step and bucket."""
        return {
            "step": np.repeat(self.steps, BUCKETS),
            "bucket": np.tile(np.arange(BUCKETS), len(self.steps)),
            "count": self.counts.ravel(),
        }


class Flow(Answer, frozen=True, kw_only=True):
    """Gradient flow: every statistic of every layer at one detail frame, in depth order.

    Values are null where not measured or non-finite; `nonfinite` counts the latter.
    """

    step: int
    layers: list[str]
    roles: list[str]
    statistics: dict[str, list[float | None]]


class ScalarsJson(Answer, frozen=True, kw_only=True):
    """Scalars over steps, for people: null where absent or not finite; `broken` tells which."""

    steps: list[int]
    series: dict[str, list[float | None]]
    broken: dict[str, list[bool]]
    low: dict[str, list[float | None]]
    mean: dict[str, list[float | None]]
    high: dict[str, list[float | None]]


class Scalars(Answer, frozen=True, kw_only=True):
    """Scalars over steps. steps: int64[n]; series: name -> float64[n], NaN where absent.

    A column stands for the steps after that of the column before it, up to its own: series is what
    was logged last in them, low, mean and high (float64[n] each) are of their finite values, NaN
    for none. broken: name -> bool[n], where one of them was NaN or Inf; no entry for none.
    """

    steps_bytes: bytes
    series_bytes: dict[str, bytes]
    broken_bytes: dict[str, bytes] = {}
    # No entry for a scalar that was logged at most once a column: the series says it all.
    low_bytes: dict[str, bytes] = {}
    mean_bytes: dict[str, bytes] = {}
    high_bytes: dict[str, bytes] = {}

    @property
    def steps(self) -> NDArray[np.int64]:
        return np.frombuffer(self.steps_bytes, dtype="<i8")

    def series(self, name: str) -> NDArray[np.float64]:
        """Raises KeyError when no frame carried this scalar."""
        return np.frombuffer(self.series_bytes[name], dtype="<f8")

    def low(self, name: str) -> NDArray[np.float64]:
        """Raises KeyError as `series` does, and so do `mean` and `high`."""
        return self._folded(self.low_bytes, name)

    def mean(self, name: str) -> NDArray[np.float64]:
        return self._folded(self.mean_bytes, name)

    def high(self, name: str) -> NDArray[np.float64]:
        return self._folded(self.high_bytes, name)

    def _folded(self, told: dict[str, bytes], name: str) -> NDArray[np.float64]:
        if name in told:
            return np.frombuffer(told[name], dtype="<f8")
        series = self.series(name)
        return np.where(np.isfinite(series), series, np.nan)

    def broken(self, name: str) -> NDArray[np.bool_]:
        """Columns in which this scalar was logged as NaN or Inf. bool[n]."""
        told = self.broken_bytes.get(name)
        if told is None:
            return np.zeros(len(self.steps), dtype=np.bool_)
        return np.frombuffer(told, dtype="?")

    def plain(self) -> ScalarsJson:
        """The same for people."""
        return ScalarsJson(
            steps=self.steps.tolist(),
            series={name: numbers(self.series(name)) for name in self.series_bytes},
            broken={name: self.broken(name).tolist() for name in self.broken_bytes},
            low={name: numbers(self.low(name)) for name in self.series_bytes},
            mean={name: numbers(self.mean(name)) for name in self.series_bytes},
            high={name: numbers(self.high(name)) for name in self.series_bytes},
        )

    def arrow(self) -> dict[str, Any]:
        """Columns of a table with one row a step."""
        folds = {
            f"{name}.{fold}": read(name)
            for name in self.series_bytes
            for fold, read in (("low", self.low), ("mean", self.mean), ("high", self.high))
        }
        # The series last: a scalar may be called as the fold of another one.
        return (
            {"step": self.steps} | folds | {name: self.series(name) for name in self.series_bytes}
        )


class ManifestView(Answer, frozen=True, kw_only=True):
    """One version of an optimizer's layers; rank -1 for those of all ranks together."""

    optimizer: str
    rank: int
    version: int
    layers: list[LayerInfo]


class FrameView(Answer, frozen=True, kw_only=True):
    """One frame, with its numbers by name of statistic, in the order of its manifest's layers.

    Values are null where not measured or not finite; `nonfinite` counts the latter.
    """

    optimizer: str
    rank: int  # -1 for all ranks together
    step: int
    time: float | None  # Unix seconds
    manifest: int  # version of the manifest that names the layers
    statistics: dict[str, list[float | None]]
    scalars: dict[str, float | None]
    events: list[str]
    missing_ranks: list[tuple[int, int]] = []  # first and last of each range


class FramePage(Answer, frozen=True, kw_only=True):
    """One page of frames, in the order of steps."""

    frames: list[FrameView]
    next: str | None = None  # the `after` of the next page


class EventView(Answer, frozen=True, kw_only=True):
    """Something that a rank said happened at a step."""

    optimizer: str
    rank: int
    step: int
    name: str


class EventPage(Answer, frozen=True, kw_only=True):
    """One page of events, in the order of steps."""

    events: list[EventView]
    next: str | None = None  # the `after` of the next page


class RunSummary(Answer, frozen=True, kw_only=True):
    """One run beside others."""

    run: str
    name: str
    status: str
    verdict: str
    steps: int
    findings: list[str]  # kinds of those that are open
    config: dict[str, Any]  # what differs between the runs


class Comparison(Answer, frozen=True, kw_only=True):
    """Runs side by side: how they went, in what their configurations differ, and one scalar."""

    runs: list[RunSummary]
    scalar: str
    steps: list[int]
    series: dict[str, list[float | None]]  # by run: the last value at or before each step


class TokenRequest(Question, frozen=True, kw_only=True):
    """A token that somebody wants."""

    name: Name
    scopes: Annotated[list[ScopeName], Meta(min_length=1, max_length=3)]
    project: Name | None = None  # null for all projects


class TokenView(Answer, frozen=True, kw_only=True):
    """A token without its secret."""

    key: str
    name: str
    scopes: list[str]
    project: str | None
    created_at: float  # Unix seconds
    last_used_at: float | None
    revoked_at: float | None


class NewToken(Answer, frozen=True, kw_only=True):
    """A token as it is shown once."""

    token: str
    view: TokenView


class ChannelRequest(Question, frozen=True, kw_only=True):
    """A channel for alerts that somebody wants."""

    name: Name
    url: Annotated[str, Meta(min_length=1, max_length=2000)]  # of Apprise, as slack://...
    project: Name | None = None  # null for all projects


class ChannelPatch(Question, frozen=True, kw_only=True):
    """What is to change of a channel; null leaves it as it is."""

    name: Name | None = None
    url: Annotated[str, Meta(min_length=1, max_length=2000)] | None = None
    paused: bool | None = None  # gets no message


class ChannelView(Answer, frozen=True, kw_only=True):
    """Where alerts are sent, without its secrets, and what became of them."""

    channel: str  # its key
    scheme: str
    pending: int
    sent: int
    failed: int
    last_error: str
    name: str = ""  # GRADWATCH_NOTIFY for one of the collector's settings
    url: str = ""  # all but the scheme is masked
    project: str | None = None  # whose alerts it gets; null for all
    paused: bool = False
    created_at: float | None = None  # Unix seconds; null for one of the settings


class Problem(Answer, frozen=True, kw_only=True):
    """An error, as RFC 9457 has it."""

    title: str
    status: int
    detail: str
    type: str = "about:blank"
    rejected: list[dict[str, Any]] = []
