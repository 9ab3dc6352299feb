"""All detectors over one window, and the verdict on a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from gradwatch.health import dead_units, exploding, non_finite, vanishing
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import ThresholdsOf
from gradwatch.health.window import Window


@dataclass(frozen=True)
class Settings:
    """The thresholds of every detector, by kind of finding."""

    vanishing: vanishing.Thresholds = field(default_factory=vanishing.Thresholds)
    exploding: exploding.Thresholds = field(default_factory=exploding.Thresholds)
    dead_units: dead_units.Thresholds = field(default_factory=dead_units.Thresholds)
    non_finite: non_finite.Thresholds = field(default_factory=non_finite.Thresholds)


class Detector(NamedTuple):
    """A row of the table of detectors."""

    kind: str  # see gradwatch.health.kinds; also the name of its thresholds in Settings
    thresholds: type[ThresholdsOf]
    detect: Callable[[Window, Settings], Finding | None]


def _vanishing(window: Window, settings: Settings) -> Finding | None:
    return vanishing.detect(window, settings.vanishing)


def _exploding(window: Window, settings: Settings) -> Finding | None:
    return exploding.detect(window, settings.exploding)


def _dead_units(window: Window, settings: Settings) -> Finding | None:
    return dead_units.detect(window, settings.dead_units)


def _non_finite(window: Window, settings: Settings) -> Finding | None:
    return non_finite.detect(window, settings.non_finite)


DETECTORS: tuple[Detector, ...] = (
    Detector("vanishing", vanishing.Thresholds, _vanishing),
    Detector("exploding", exploding.Thresholds, _exploding),
    Detector("dead_units", dead_units.Thresholds, _dead_units),
    Detector("non_finite", non_finite.Thresholds, _non_finite),
)

DEFAULTS = Settings()


def judge(window: Window, settings: Settings = DEFAULTS) -> list[Finding]:
    """What is wrong in this window: the gravest first, and of equals the earliest."""
    found = [detector.detect(window, settings) for detector in DETECTORS]
    findings = [finding for finding in found if finding is not None]
    return sorted(findings, key=lambda finding: (-finding.severity.rank, finding.first_step))


class Verdict(StrEnum):
    """The health of a run in one word."""

    HEALTHY = "healthy"
    WARNING = "warning"
    CRITICAL = "critical"


def verdict(findings: Iterable[Finding]) -> Verdict:
    """The gravest of the findings; information alone leaves a run healthy."""
    worst = max((finding.severity.rank for finding in findings), default=0)
    if worst >= Severity.CRITICAL.rank:
        return Verdict.CRITICAL
    return Verdict.WARNING if worst >= Severity.WARNING.rank else Verdict.HEALTHY
