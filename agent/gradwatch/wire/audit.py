"""Audits: what was found when a job's gradients were computed again by other means.

They are sent and shown as JSON, a number that is not finite as null.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gradwatch.wire.frame import FrameError, LayerName, Name, Rank, Step, Wire

# Who compared: the reference engine in float64, or finite differences in float64.
Method = Literal["reference", "finite_difference"]

MAX_AUDITED = 1000
Count = Annotated[int, Meta(ge=0, le=2**53)]
Tolerance = Annotated[float, Meta(ge=0, le=1)]


class AuditedLayer(Wire, frozen=True, kw_only=True):
    """One layer's gradient a beside its reference n.

    relative_error: ||a - n|| / (||a|| + ||n|| + 1e-8), from 0 to 1, of the elements that are finite
    in both; null where it is not known, which is within no tolerance. Of finite differences a and n
    are slopes along one direction.
    """

    layer: LayerName  # a parameter, or the module that calls a custom function
    relative_error: Annotated[float, Meta(ge=0)] | None
    module: Annotated[str, Meta(max_length=200)] = ""  # class of the module, as "Linear"
    nonfinite: Count = 0  # elements of a that are NaN or Inf
    reference_nonfinite: Count = 0  # and of n
    tolerance: Tolerance | None = None  # null: the collector's for the method and type


class Audit(Wire, frozen=True, kw_only=True):
    """One comparison of a job's gradients with a reference, at one step of one rank.

    Its key is (run, optimizer, rank, step, method).
    """

    optimizer: Name
    step: Step
    method: Method
    dtype: Annotated[str, Meta(min_length=1, max_length=50)]  # the job's, as "float32"
    layers: Annotated[list[AuditedLayer], Meta(min_length=1, max_length=MAX_AUDITED)]
    rank: Rank = 0

    def check(self) -> None:
        """Raise FrameError when fields contradict each other."""
        names = [item.layer for item in self.layers]
        if len(set(names)) < len(names):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise FrameError(f"layers: {twice!r} is named twice")


class AuditedLayerView(msgspec.Struct, frozen=True, kw_only=True):
    """One layer of an audit, with the verdict on it."""

    layer: str
    module: str
    relative_error: float | None  # null where it is not known or not finite
    tolerance: float
    passed: bool  # within its tolerance, and as finite as the reference
    nonfinite: int = 0
    reference_nonfinite: int = 0


class AuditView(msgspec.Struct, frozen=True, kw_only=True):
    """An audit as it was stored."""

    id: int
    optimizer: str
    rank: int
    step: int
    method: str
    dtype: str
    passed: bool  # every layer did
    received_at: float  # Unix seconds
    layers: list[AuditedLayerView]


class AuditPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a run's audits, the last received first."""

    audits: list[AuditView]
    next: str | None = None  # the `after` of the next page
