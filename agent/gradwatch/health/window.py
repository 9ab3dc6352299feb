"""What a detector is given: the last steps of one optimizer, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self, TypeVar, TypeVarTuple, cast

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Given = TypeVarTuple("Given")


class Layer(Protocol):
    """The facts about a layer that detectors reason with."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def module(self) -> str: ...  # class of the owning module, as "Linear"
    @property
    def role(self) -> str: ...  # weight, bias, norm or embedding
    @property
    def depth(self) -> int: ...  # order of execution, the input's layer first
    @property
    def trainable(self) -> bool: ...
    @property
    def optimized(self) -> bool: ...  # held by the optimizer
    @property
    def dtype(self) -> str: ...  # as "float32"
    @property
    def sharding(self) -> str: ...  # how ranks share it, as torch writes placements; "" for unknown


class Layers(tuple[Layer, ...]):
    """The layers of an optimizer, and what was found out of them alone.

    All windows of one manifest may share it: what follows from it is then made once for them.
    """

    _known: dict[Any, Any]

    def __new__(cls, layers: Iterable[Layer] = ()) -> Self:
        made = super().__new__(cls, layers)
        made._known = {}
        return made

    def once(self, make: Callable[[Layers], T]) -> T:
        """What `make` makes of the layers; made once, however many windows ask for it."""
        if make not in self._known:
            self._known[make] = make(self)
        return cast(T, self._known[make])


class Silence(NamedTuple):
    """How long a run that has not ended has said nothing, by the clock of whoever judges it."""

    seconds: float  # since its last step was heard of
    longest_s: float  # the longest pause between two of its steps before


class Compared(NamedTuple):
    """A layer's gradient beside what a reference computed of the same numbers."""

    layer: str
    rank: int
    method: str  # see gradwatch.health.reference_mismatch.METHODS
    step: int
    dtype: str  # that the job computed in, as "float32"
    error: float  # relative; NaN where it is not known
    tolerance: float | None = None  # None: by method and type
    nonfinite: int = 0  # elements of the gradient that are NaN or Inf
    reference_nonfinite: int = 0


@dataclass(frozen=True)
class Window:
    """Recorded steps in ascending order.

    statistics: name -> float32[steps, layers], NaN where not measured.
    scalars: name -> float64[steps], NaN where not measured.
    reported: scalar name -> bool[steps], whether the frame carried it; tells a NaN loss from none.
    measured: bool[steps], whether gradients were looked at; None when they always were. A frame may
    hold a loss alone, or say that its step was skipped.
    silence: of a run that is looked at by the clock; None when by its frames alone.
    audits: what was compared with a reference, in any order.
    """

    steps: NDArray[np.int64]
    layers: Sequence[Layer]
    statistics: Mapping[str, NDArray[np.float32]]
    scalars: Mapping[str, NDArray[np.float64]]
    reported: Mapping[str, NDArray[np.bool_]] = field(
        default_factory=dict[str, "NDArray[np.bool_]"]
    )
    measured: NDArray[np.bool_] | None = None
    silence: Silence | None = None
    audits: Sequence[Compared] = ()
    _known: dict[Any, Any] = field(
        default_factory=dict[Any, Any], init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Layers):
            object.__setattr__(self, "layers", Layers(self.layers))

    def of_layers(self, make: Callable[[Layers], T]) -> T:
        """What `make` makes of the layers; made once for all windows that share them."""
        return cast(Layers, self.layers).once(make)

    def once(self, make: Callable[[Window, *Given], T], *given: *Given) -> T:
        """What `make` makes of this window; made once, however many detectors ask for it.

        given: what else it depends on; must be hashable.
        """
        # Whoever keeps the window itself here makes a circle: see chain.sound_part.
        key = (make, *given)
        if key not in self._known:
            self._known[key] = make(self, *given)
        return cast(T, self._known[key])

    def only(self, keep: NDArray[np.bool_] | NDArray[np.intp] | slice) -> Window:
        """Some of the steps; itself for all of them."""
        if isinstance(keep, np.ndarray) and keep.dtype == np.bool_ and keep.all():
            return self
        return Window(
            steps=self.steps[keep],
            layers=self.layers,
            statistics={name: values[keep] for name, values in self.statistics.items()},
            scalars={name: values[keep] for name, values in self.scalars.items()},
            reported={name: values[keep] for name, values in self.reported.items()},
            measured=None if self.measured is None else self.measured[keep],
        )

    def until(self, step: int) -> Window:
        """The steps up to and with `step`."""
        return self.only(slice(0, int(np.searchsorted(self.steps, step, side="right"))))

    def statistic(self, name: str) -> NDArray[np.float32]:
        """float32[steps, layers]; all NaN when no frame of the window measured it."""
        known = self.statistics.get(name)
        if known is not None:
            return known
        return np.broadcast_to(np.float32(np.nan), (len(self.steps), len(self.layers)))

    def scalar(self, name: str) -> NDArray[np.float64]:
        """float64[steps]; all NaN when no frame of the window measured it."""
        known = self.scalars.get(name)
        return known if known is not None else np.full(len(self.steps), np.nan)

    def broken_scalar(self, name: str) -> NDArray[np.bool_]:
        """Steps at which a frame carried this scalar as NaN or Inf. bool[steps]."""
        values = self.scalar(name)
        reported = self.reported.get(name, np.zeros(len(self.steps), dtype=np.bool_))
        return np.isinf(values) | (np.isnan(values) & reported)
