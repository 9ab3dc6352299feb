"""What an agent sends: the run, the manifest of its layers, and frames.

A frame's numbers travel as little-endian float32 bytes, one row of `layers` values a statistic,
so that reading one statistic of a frame is one slice.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from gradwatch.wire.statistics import BY_NAME

MAX_LAYERS = 100_000

RunId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$", description="32 hexadecimal digits")]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
LayerName = Annotated[str, Meta(min_length=1, max_length=500)]
Step = Annotated[int, Meta(ge=0, le=2**53)]
Rank = Annotated[int, Meta(ge=0, le=1_000_000)]


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
        unknown = [name for name in self.columns if name not in BY_NAME]
        if unknown:
            raise FrameError(f"columns: {unknown[0]!r} is no statistic; known are {list(BY_NAME)}")
        if len(set(self.columns)) != len(self.columns):
            raise FrameError("columns: a statistic is named twice")
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


Record = Manifest | Frame | RunEnd | Drops


class Rejection(Wire, frozen=True, kw_only=True):
    """Why one record of a batch was not stored."""

    place: int  # in the batch, from 0
    reason: str  # names the field


class Receipt(Wire, frozen=True, kw_only=True):
    """The collector's answer to a batch, sent after the commit."""

    stored: int
    repeated: int  # already known, byte for byte
    rejected: list[Rejection] = []
