"""How a threshold is declared: its default, its unit and the reason for it, in one place."""

from __future__ import annotations

from dataclasses import Field, field, fields
from typing import Any, ClassVar, NamedTuple, Protocol, cast


class ThresholdsOf(Protocol):
    """Any dataclass of thresholds."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


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
