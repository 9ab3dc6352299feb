"""A job that says nothing any more: it hangs, or was killed before it could say so.

The one kind that no frame shows: whoever judges must say how long there was none, by a clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Silence, Window
from gradwatch.health.words import duration


@dataclass(frozen=True)
class Thresholds:
    """When silence is told."""

    after_s: float = threshold(
        600.0,
        "s",
        "without a step, at least: torch's own collectives give up after 600 s on NCCL; a first "
        "evaluation or checkpoint is rarely longer",
    )
    pauses: float = threshold(
        3.0, "1", "silence / the longest pause that this run has come back from"
    )


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """No step for longer than the run has ever paused before."""
    silence = window.silence
    if silence is None or silence.seconds < limit_s(silence, settings):
        return None
    last = int(window.steps[-1])
    return Finding(
        kind="stalled_run",
        severity=Severity.CRITICAL,
        layers=(),
        first_step=last,
        last_step=last,
        summary=(
            f"No step for {duration(silence.seconds)} after step {last:,}: the job hangs or was "
            f"killed. Its longest pause before was {duration(silence.longest_s)}."
        ),
        evidence={
            "last step": last,
            "silent for": duration(silence.seconds),
            "longest pause before": duration(silence.longest_s),
        },
    )


def limit_s(silence: Silence, settings: Thresholds = Thresholds()) -> float:
    """How long this run may be silent."""
    return max(settings.after_s, settings.pauses * silence.longest_s)
