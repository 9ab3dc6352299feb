"""What a detector says: a named problem, where, since when, and the numbers that show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    """How soon somebody should look. Ordered: INFO < WARNING < CRITICAL."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


@dataclass(frozen=True)
class Finding:
    """One problem of one optimizer's layers.

    layers: names of the layers concerned, the one where it began first.
    evidence: short label -> number or text, in the order in which to read it.
    """

    kind: str
    severity: Severity
    layers: tuple[str, ...]
    first_step: int
    last_step: int
    summary: str  # one sentence with the numbers, for a title or a message
    evidence: Mapping[str, float | int | str] = field(
        default_factory=dict[str, "float | int | str"]
    )
