"""How a threshold is declared: its default, its unit and the reason for it, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, field, fields
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, cast


class ThresholdsOf(Protocol):
    """Any dataclass of thresholds."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


T = TypeVar("T", bound=ThresholdsOf)


class Threshold(NamedTuple):
    """One number that a detector compares with."""

    name: str
    default: float
    unit: str  # "1" for a ratio
    reason: str


def threshold(default: float, unit: str, reason: str) -> Any:
    """A dataclass field that carries its unit and its reason."""
    # dataclasses type a field as its default; only Any fits both int and float.
    return field(default=default, metadata={"unit": unit, "reason": reason})


def thresholds_of(table: type[ThresholdsOf] | ThresholdsOf) -> list[Threshold]:
    """The thresholds of one detector, in order of declaration."""
    return [
        Threshold(
            item.name, cast(float, item.default), item.metadata["unit"], item.metadata["reason"]
        )
        for item in fields(table)
    ]


class ThresholdError(ValueError):
    """A threshold that does not exist, or a value that it cannot have."""


def changed(table: type[T], given: Mapping[str, object], kind: str) -> T:
    """A detector's thresholds with some of them changed. Raises ThresholdError."""
    known = {item.name: item for item in fields(table)}
    for name, value in given.items():
        if name not in known:
            raise ThresholdError(f"[{kind}] has no {name!r}; known are {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ThresholdError(f"[{kind}] {name} must be a number, not {value!r}")
        if isinstance(known[name].default, int) and value != int(value):
            unit = known[name].metadata["unit"]
            raise ThresholdError(f"[{kind}] {name} must be a whole number of {unit}, not {value!r}")
    numbers = {
        name: int(cast(float, value)) if isinstance(known[name].default, int) else value
        for name, value in given.items()
    }
    return table(**numbers)
