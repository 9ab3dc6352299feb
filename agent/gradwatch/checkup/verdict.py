"""What a check says, and the report that all of them make."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Number = float | int | str


class Status(StrEnum):
    """How a check ended. Only WRONG makes a report fail."""

    PASSED = "passed"
    WRONG = "wrong"
    ADVICE = "advice"  # worth knowing, and right in many jobs
    SKIPPED = "skipped"  # could not be looked at here, and why


@dataclass(frozen=True)
class Verdict:
    """What one check found, and what to do about it."""

    status: Status
    found: str
    action: str = ""
    numbers: Mapping[str, Number] = field(default_factory=dict[str, Number])


def passed(found: str, **numbers: Number) -> Verdict:
    return Verdict(Status.PASSED, found, numbers=numbers)


def wrong(found: str, action: str, **numbers: Number) -> Verdict:
    return Verdict(Status.WRONG, found, action, numbers)


def advice(found: str, action: str, **numbers: Number) -> Verdict:
    return Verdict(Status.ADVICE, found, action, numbers)


def skipped(reason: str) -> Verdict:
    return Verdict(Status.SKIPPED, reason)


GRAVITY = (Status.SKIPPED, Status.PASSED, Status.ADVICE, Status.WRONG)


def gravest(verdicts: list[Verdict]) -> Verdict:
    """The verdict that stands for several: the first of the worst."""
    return max(verdicts, key=lambda verdict: GRAVITY.index(verdict.status))


@dataclass(frozen=True)
class Line:
    """One check's verdict under its name."""

    check: str
    title: str
    verdict: Verdict


@dataclass(frozen=True)
class Report:
    """What the doctor found: one line a check, in the order in which to read them."""

    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """Nothing is wrong. Advice and checks that were skipped do not count."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[Line, ...]:
        """The lines that say that something is wrong."""
        return tuple(line for line in self.lines if line.verdict.status is Status.WRONG)

    def __getitem__(self, check: str) -> Verdict:
        """The verdict of one check, by its name. Raises KeyError for one that there is not."""
        for line in self.lines:
            if line.check == check:
                return line.verdict
        raise KeyError(check)

    def table(self) -> str:
        """The report as plain text, for a log or a terminal."""
        width = max(len(line.title) for line in self.lines)
        rows: list[str] = []
        for line in self.lines:
            verdict = line.verdict
            rows.append(f"{verdict.status:<8} {line.title:<{width}}  {verdict.found}")
            if verdict.action:
                rows.append(f"{'':<8} {'':<{width}}  -> {verdict.action}")
        return "\n".join([*rows, "", self.summary()])

    def summary(self) -> str:
        """One sentence: how many checks ended how."""
        counts = dict.fromkeys(Status, 0)
        for line in self.lines:
            counts[line.verdict.status] += 1
        told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return f"{len(self.lines)} checks: {told}."

    def to_json(self) -> str:
        """The report as JSON: ok, and for each check its status, what was found and what to do."""
        checks = [
            {
                "check": line.check,
                "title": line.title,
                "status": str(line.verdict.status),
                "found": line.verdict.found,
                "action": line.verdict.action,
                "numbers": {key: _plain(value) for key, value in line.verdict.numbers.items()},
            }
            for line in self.lines
        ]
        return json.dumps({"ok": self.ok, "checks": checks}, indent=2, allow_nan=False)


def _plain(value: Number) -> Number | None:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
