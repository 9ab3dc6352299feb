"""All detectors over one window, and the verdict on a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple, cast

import numpy as np

from gradwatch.health import (
    amp_skips,
    clipping,
    dead_units,
    disconnected,
    divergence,
    exploding,
    learning_rate_too_high,
    learning_rate_too_low,
    loss_spike,
    missing_zero_grad,
    never_updated,
    non_finite,
    oscillation,
    plateau,
    poor_initialisation,
    rank_drift,
    reference_mismatch,
    saturation,
    stalled_run,
    straggler,
    symmetric_units,
    underflow,
    vanishing,
    weights_shrinking,
)
from gradwatch.health.causes import root_causes
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import ThresholdError, ThresholdsOf, changed
from gradwatch.health.window import Window


class Detector(NamedTuple):
    """A row of the table of detectors."""

    kind: str  # see gradwatch.health.kinds; also the name of its thresholds in Settings
    thresholds: type[ThresholdsOf]
    detect: Callable[[Window, Settings], Finding | None]


def _row(
    kind: str, thresholds: type[ThresholdsOf], detect: Callable[..., Finding | None], *others: str
) -> Detector:
    """others: kinds whose thresholds `detect` takes after those of its own."""

    def judged(window: Window, settings: Settings) -> Finding | None:
        return detect(window, *(settings[each] for each in (kind, *others)))

    return Detector(kind, thresholds, judged)


# In the order of gradwatch.health.kinds.
DETECTORS: tuple[Detector, ...] = (
    _row("vanishing", vanishing.Thresholds, vanishing.detect, "dead_units"),
    _row("exploding", exploding.Thresholds, exploding.detect),
    _row("dead_units", dead_units.Thresholds, dead_units.detect),
    _row("non_finite", non_finite.Thresholds, non_finite.detect),
    _row("saturation", saturation.Thresholds, saturation.detect),
    _row("never_updated", never_updated.Thresholds, never_updated.detect),
    _row("disconnected", disconnected.Thresholds, disconnected.detect),
    _row("missing_zero_grad", missing_zero_grad.Thresholds, missing_zero_grad.detect),
    _row(
        "learning_rate_too_high", learning_rate_too_high.Thresholds, learning_rate_too_high.detect
    ),
    _row("divergence", divergence.Thresholds, divergence.detect),
    _row("oscillation", oscillation.Thresholds, oscillation.detect, "learning_rate_too_high"),
    _row("learning_rate_too_low", learning_rate_too_low.Thresholds, learning_rate_too_low.detect),
    _row("loss_spike", loss_spike.Thresholds, loss_spike.detect),
    _row("plateau", plateau.Thresholds, plateau.detect),
    _row("poor_initialisation", poor_initialisation.Thresholds, poor_initialisation.detect),
    _row("symmetric_units", symmetric_units.Thresholds, symmetric_units.detect),
    _row("weights_shrinking", weights_shrinking.Thresholds, weights_shrinking.detect),
    _row("clipping", clipping.Thresholds, clipping.detect),
    _row("underflow", underflow.Thresholds, underflow.detect),
    _row("amp_skips", amp_skips.Thresholds, amp_skips.detect),
    _row("rank_drift", rank_drift.Thresholds, rank_drift.detect),
    _row("straggler", straggler.Thresholds, straggler.detect),
    _row("stalled_run", stalled_run.Thresholds, stalled_run.detect),
    _row("reference_mismatch", reference_mismatch.Thresholds, reference_mismatch.detect),
)


class Settings:
    """The thresholds of every detector, by kind of finding. Raises ValueError for no such kind."""

    def __init__(self, **given: ThresholdsOf) -> None:
        self._table = {row.kind: given.pop(row.kind, row.thresholds()) for row in DETECTORS}
        if given:
            raise ValueError(
                f"{next(iter(given))!r} is no kind of finding; known are {', '.join(self._table)}"
            )

    def __getitem__(self, kind: str) -> ThresholdsOf:
        return self._table[kind]


DEFAULTS = Settings()


def settings_of(table: Mapping[str, object]) -> Settings:
    """Settings from a table of tables: kind -> threshold -> number, as a TOML file has them.

    Raises ThresholdError for a kind, a threshold or a value that does not exist.
    """
    kinds = {row.kind: row.thresholds for row in DETECTORS}
    given: dict[str, ThresholdsOf] = {}
    for kind, values in table.items():
        if kind not in kinds:
            raise ThresholdError(f"{kind!r} is no kind of finding; known are {', '.join(kinds)}")
        if not isinstance(values, Mapping):
            raise ThresholdError(f"{kind} must be a table, as [{kind}], not {values!r}")
        given[kind] = changed(kinds[kind], cast(Mapping[str, object], values), kind)
    return Settings(**given)


def judge(window: Window, settings: Settings = DEFAULTS) -> list[Finding]:
    """What is wrong in this window: the gravest first, and of equals the earliest.

    Causes are told, and what follows from them is left out: see gradwatch.health.causes.
    """
    if not len(window.steps):
        return []
    # Numbers of a broken run overflow; what comes of it compares as false, and says nothing.
    with np.errstate(all="ignore"):
        found = [detector.detect(window, settings) for detector in DETECTORS]
    findings = root_causes([finding for finding in found if finding is not None])
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
