"""A loss that bounces without falling, because each step leaps over the valley."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch.health import learning_rate_too_high
from gradwatch.health.chain import sound_part
from gradwatch.health.course import course
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, spoken

UPDATES = learning_rate_too_high.Thresholds()


@dataclass(frozen=True)
class Thresholds:
    """When oscillation is told."""

    steps: int = threshold(60, "steps", "a bounce or two are part of any start")


def detect(
    window: Window,
    settings: Thresholds = Thresholds(),
    of_updates: learning_rate_too_high.Thresholds = UPDATES,
) -> Finding | None:
    """Updates that are too large, and a loss that swings about where it began."""
    sound = sound_part(window)
    if not len(sound.steps) or int(sound.steps[-1]) < settings.steps:
        return None
    found = learning_rate_too_high.judged(window, of_updates)
    if found is None or not found.bounces:
        return None
    result = found.result
    losses = course(window).loss[-50:]
    turns = float((np.diff(np.sign(np.diff(losses))) != 0).mean()) if len(losses) > 2 else 0.0
    return Finding(
        kind="oscillation",
        severity=Severity.WARNING,
        layers=(),
        first_step=found.first,
        last_step=int(sound.steps[-1]),
        summary=(
            f"The loss swings between {spoken(result.low)} and {spoken(result.high)} and does not "
            f"fall below its start of {spoken(result.start)}: single steps change the weights by "
            f"up to {spoken(100 * found.largest)} %."
        ),
        evidence={
            "a tenth below": kept(result.low),
            "a tenth above": kept(result.high),
            "first loss": kept(result.start),
            "largest update / weight": kept(found.largest),
            "steps that turn": kept(turns),
        },
    )
