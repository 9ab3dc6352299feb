"""A loss scale that is halved again and again, while steps are skipped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, spoken


@dataclass(frozen=True)
class Thresholds:
    """When repeated skips are told."""

    settling: int = threshold(
        30, "steps", "in which a scale that starts at 2^16 or more finds its level"
    )
    halvings: float = threshold(
        8.0,
        "halvings",
        "of the scale after that, net of its doublings: one in 2,000 steps is usual",
    )
    recent: int = threshold(50, "steps", "the present")
    skips: int = threshold(10, "steps", "fewest of the recent ones that were skipped")
    share: float = threshold(0.3, "1", "part of the recent steps that were skipped")


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """The scale fell and fell after it should have settled, or most recent steps were skipped."""
    late = np.flatnonzero(window.steps > settings.settling)
    if not len(late):
        return None
    steps = window.steps[late]
    skipped = window.scalar("amp_skipped")[late] > 0
    scale = window.scalar("grad_scale")[late]
    known = np.isfinite(scale) & (scale > 0)
    change = np.diff(np.log2(scale[known]))
    halvings = -float(change.sum()) if len(change) else 0.0
    now = int(steps[-1])
    span = min(now - settings.settling, settings.recent)
    count = int(skipped[steps > now - span].sum())
    often = count >= max(settings.skips, settings.share * span)
    if not (halvings >= settings.halvings or often):
        return None
    falls = steps[known][1:][change < 0]
    first = int(min([*falls[:1], *steps[skipped][:1]]))
    total = int(skipped.sum())
    return Finding(
        kind="amp_skips",
        severity=Severity.CRITICAL,
        layers=(),
        first_step=first,
        last_step=now,
        summary=(
            f"Mixed precision skips step after step since step {first}: "
            + (f"{total:,} steps were lost" if total else "steps are lost")
            + (
                f", and the loss scale was halved {spoken(halvings)} times."
                if halvings > 0
                else "."
            )
        ),
        evidence={
            "skipped steps": total,
            "of the recent ones": f"{count} of {span}",
            "halvings of the scale": kept(halvings),
            "scale now": kept(float(scale[known][-1])) if known.any() else "not recorded",
        },
    )
