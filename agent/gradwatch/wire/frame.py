"""What an agent sends: the run, the manifest of its layers, and frames.

A frame's numbers travel as little-endian float32 bytes, one row of `layers` values a statistic,
so that reading one statistic of a frame is one slice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from gradwatch.wire.statistics import BY_NAME

MAX_LAYERS = 100_000
MAX_LAYER_NAME = 500
MAX_OPERANDS = 8
# What the first non-finite value can have come from.
ORIGINS = ("operation", "gradient", "input", "constant", "weights", "batch", "nothing")

RunId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$", description="32 hexadecimal digits")]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
LayerName = Annotated[str, Meta(min_length=1, max_length=MAX_LAYER_NAME)]
Step = Annotated[int, Meta(ge=0, le=2**53)]
Rank = Annotated[int, Meta(ge=0, le=1_000_000)]
Text = Annotated[str, Meta(max_length=500)]


class FrameError(ValueError):
    """A frame whose fields contradict each other. The message names the field and the reason."""


class Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A type that crosses the network. Unknown fields are refused, so their nesting is too."""


class RunInfo(Wire, frozen=True, kw_only=True):
    """One training job, as it introduces itself."""

    id: RunId
    project: Name
    name: Name
    started_at: float  # Unix seconds
    world_size: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    config: dict[str, Any] = {}
    tags: Annotated[list[Name], Meta(max_length=100)] = []
    host: Annotated[str, Meta(max_length=200)] = ""
    agent_version: Annotated[str, Meta(max_length=50)] = ""


class LayerInfo(Wire, frozen=True, kw_only=True):
    """One named parameter tensor of the model."""

    name: LayerName
    shape: tuple[int, ...]
    dtype: Annotated[str, Meta(max_length=50)]
    module: Annotated[str, Meta(max_length=200)]  # class of the module that owns it, as "Linear"
    role: Annotated[str, Meta(pattern="^(weight|bias|norm|embedding)$")]
    depth: Annotated[int, Meta(ge=0)]  # order of execution in the forward pass, input first
    trainable: bool = True
    optimized: bool = True  # held by the optimizer
    tied_to: tuple[str, ...] = ()  # other names of the same tensor
    sharding: Annotated[str, Meta(max_length=200)] = ""  # "" when each rank holds all of it
    held: Annotated[int, Meta(ge=0)] | None = None  # elements on this rank; None: all of them


class Manifest(Wire, tag="manifest", frozen=True, kw_only=True):
    """The layers that the frames of one optimizer speak of; `version` grows when they change."""

    optimizer: Name
    version: Annotated[int, Meta(ge=1)]
    layers: Annotated[list[LayerInfo], Meta(max_length=MAX_LAYERS)]
    rank: Rank = 0


class Frame(Wire, tag="frame", frozen=True, kw_only=True):
    """What one rank says about one optimizer step.

    `values` is float32[len(columns), layers]: a statistic that was not measured has no row, and a
    layer without a gradient has NaN. Non-finite gradients are told by `nonfinite`, never by NaN.
    """

    optimizer: Name
    rank: Rank
    step: Step
    time: float  # Unix seconds
    manifest: Annotated[int, Meta(ge=1)]  # version of the manifest that names the layers
    columns: Annotated[tuple[str, ...], Meta(max_length=64)]
    values: memoryview
    scalars: Annotated[dict[Name, float], Meta(max_length=200)] = {}
    events: Annotated[tuple[Name, ...], Meta(max_length=20)] = ()
    histograms: memoryview | None = None  # zstd of uint16[layers, BUCKETS]

    def check(self) -> None:
        """Raise FrameError when fields contradict each other."""
        _check_columns(self.columns)
        rows = len(self.columns)
        size = self.values.nbytes
        if (size and not rows) or (rows and size % (4 * rows)):
            raise FrameError(
                f"values: {size} bytes are not {rows} columns of float32[layers]; "
                f"a multiple of {4 * rows} bytes was expected"
            )

    @property
    def layers(self) -> int:
        """Number of layers that the frame speaks of."""
        return self.values.nbytes // (4 * len(self.columns)) if self.columns else 0

    def matrix(self) -> NDArray[np.float32]:
        """The numbers, read-only and without a copy. float32[len(columns), layers]."""
        return np.frombuffer(self.values, dtype="<f4").reshape(len(self.columns), self.layers)

    def row(self, statistic: str) -> NDArray[np.float32] | None:
        """One statistic of every layer, or None when this frame did not measure it."""
        if statistic not in self.columns:
            return None
        return self.matrix()[self.columns.index(statistic)]


def _check_columns(columns: Sequence[str]) -> None:
    unknown = [name for name in columns if name not in BY_NAME]
    if unknown:
        raise FrameError(f"columns: {unknown[0]!r} is no statistic; known are {list(BY_NAME)}")
    if len(set(columns)) != len(columns):
        raise FrameError("columns: a statistic is named twice")


class RunEnd(Wire, tag="end", frozen=True, kw_only=True):
    """The last word of one rank: how its process left the training loop."""

    rank: Rank
    time: float  # Unix seconds
    status: Annotated[str, Meta(pattern="^(finished|failed)$")]
    reason: Annotated[str, Meta(max_length=2000)] = ""


class Drops(Wire, tag="drops", frozen=True, kw_only=True):
    """Frames that one rank had to drop since it last said so, by reason."""

    rank: Rank
    time: float  # Unix seconds
    counts: Annotated[dict[Name, Annotated[int, Meta(ge=0)]], Meta(max_length=50)]


class Operand(Wire, frozen=True, kw_only=True):
    """A tensor that the operation was given: its shape, and the range of its elements."""

    shape: tuple[int, ...]
    dtype: Annotated[str, Meta(max_length=50)]
    low: float  # NaN when it holds one
    high: float

    def __str__(self) -> str:
        size = ", ".join(map(str, self.shape))
        if math.isnan(self.low):
            return f"NaN in {self.dtype}[{size}]"
        return f"{self.low:.4g} to {self.high:.4g}, {self.dtype}[{size}]"


class Origin(Wire, tag="origin", frozen=True, kw_only=True):
    """The first value that was not finite in a traced step of one rank.

    kind "gradient": the operation's derivative, though its value was finite. "input": a tensor
    that came from outside, as a batch does; the operation is the first that used it. "weights": a
    parameter or buffer was non-finite before the step. "batch": a variable of the training loop,
    named in `operation`, held it at the step that broke, and no later step did it again.
    "nothing": no traced step showed any.
    """

    optimizer: Name
    rank: Rank
    step: Step  # the step that was traced
    kind: Annotated[str, Meta(pattern=f"^({'|'.join(ORIGINS)})$")]
    operation: Annotated[str, Meta(max_length=200)] = ""
    module: Text = ""  # path in the model; "" outside of it, as in a loss
    module_class: Annotated[str, Meta(max_length=200)] = ""
    source: Text = ""  # file:line in function
    operands: Annotated[tuple[Operand, ...], Meta(max_length=MAX_OPERANDS)] = ()
    replayed: bool = False  # computed beside the step, with the weights of before the first NaN
    note: Text = ""

    @property
    def place(self) -> str:
        """The operation, module and line in a few words."""
        what = {
            "gradient": f"the derivative of {self.operation}",
            "input": f"the data given to {self.operation}",
            "constant": f"a value written by {self.operation}",
            "weights": "the weights, non-finite before the step",
            "batch": f"the data of the step that broke: `{self.operation}`",
            "nothing": "no operation of the traced steps",
        }.get(self.kind, self.operation)
        where = f" in {self.module or self.module_class}" if self.module_class else ""
        kind = f" ({self.module_class})" if self.module else ""
        line = f" at {self.source}" if self.source else ""
        return f"{what}{where}{kind}{line}"

    @property
    def sentence(self) -> str:
        """What to add to a finding's summary; "" where it says only where it did not begin."""
        return "" if self.kind in ("weights", "nothing") else f"It began in {self.place}."

    def evidence(self, ranks: int = 1) -> dict[str, float | int | str]:
        """Labels and values for a finding's evidence. ranks: processes of the run."""
        told: dict[str, float | int | str] = {"began in": self.place}
        for place, operand in enumerate(self.operands):
            told["its input" if place == 0 else f"its input {place + 1}"] = str(operand)
        if ranks > 1 and self.kind != "nothing":
            told["began on rank"] = self.rank
        again = ", computed again with the weights of before" if self.replayed else ""
        told["found by tracing step"] = f"{self.step}{again}"
        if self.note:
            told["note"] = self.note
        return told


class Flight(Wire, tag="flight", frozen=True, kw_only=True):
    """What one rank recorded of the steps before its first non-finite value.

    values: float32[steps, columns, layers], NaN where not measured. The norm and the count are
    those of the steps' frames; the others are those of a sample of each gradient. scalars: one
    value a step, NaN for none.
    """

    optimizer: Name
    rank: Rank
    manifest: Annotated[int, Meta(ge=1)]  # version of the manifest that names the layers
    step: Step  # the first with a non-finite value
    steps: Annotated[tuple[Step, ...], Meta(min_length=1, max_length=100)]  # ascending
    columns: Annotated[tuple[str, ...], Meta(min_length=1, max_length=64)]
    values: memoryview
    scalars: Annotated[dict[Name, tuple[float, ...]], Meta(max_length=200)] = {}

    def check(self) -> None:
        """Raise FrameError when fields contradict each other."""
        _check_columns(self.columns)
        if list(self.steps) != sorted(set(self.steps)):
            raise FrameError("steps: not in ascending order")
        cells = 4 * len(self.steps) * len(self.columns)
        if self.values.nbytes % cells:
            raise FrameError(
                f"values: {self.values.nbytes} bytes are not {len(self.steps)} steps of "
                f"{len(self.columns)} columns of float32[layers]"
            )
        uneven = [name for name, told in self.scalars.items() if len(told) != len(self.steps)]
        if uneven:
            raise FrameError(f"scalars: {uneven[0]!r} has no value for each step")

    def of(self, statistic: str) -> NDArray[np.float32]:
        """One statistic, read-only and without a copy. float32[steps, layers]."""
        shape = (len(self.steps), len(self.columns), -1)
        table = np.frombuffer(self.values, dtype="<f4").reshape(shape)
        return table[:, self.columns.index(statistic)]

    def evidence(self, layers: Sequence[str]) -> dict[str, float | int | str]:
        """Labels and values for a finding's evidence. layers: names, as the manifest has them."""
        told: dict[str, float | int | str] = {
            "steps recorded before": f"{len(self.steps)}, from {self.steps[0]} to {self.steps[-1]}"
        }
        for name, label in (("loss", "loss before"), ("total_norm", "gradient norm before")):
            known = [value for value in self.scalars.get(name, ()) if not math.isnan(value)]
            if known:
                told[label] = f"{known[0]:.4g} at first, {known[-1]:.4g} at last"
        norms = self.of("norm") if "norm" in self.columns else np.empty((0, 0), dtype=np.float32)
        measured = norms[~np.isnan(norms).all(axis=1)]
        if len(measured) and measured.shape[1] == len(layers):
            place = int(np.nanargmax(measured[-1]))
            told["largest norm just before"] = (
                f"{measured[-1, place]:.4g} in {layers[place]}, {measured[0, place]:.4g} at first"
            )
        return told


Record = Manifest | Frame | RunEnd | Drops | Origin | Flight


class Rejection(Wire, frozen=True, kw_only=True):
    """Why one record of a batch was not stored."""

    place: int  # in the batch, from 0
    reason: str  # names the field
    conflict: bool = False  # another record of the same key was stored before


class Receipt(Wire, frozen=True, kw_only=True):
    """The collector's answer to a batch, sent after the commit."""

    stored: int
    repeated: int  # already known, byte for byte
    rejected: list[Rejection] = []
