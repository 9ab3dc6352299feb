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

    halvings: float = threshold(
        8.0, "halvings", "of the scale within the window, after the first steps' settling"
    )
    settling: int = threshold(
        30, "steps", "in which a scale that starts at 2^16 or more finds its level"
    )
    skips: int = threshold(10, "steps", "skipped, of those recorded, where the agent counts them")
    share: float = threshold(0.3, "1", "part of the recent steps that were skipped")


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """The scale fell and fell after it should have settled, or most recent steps were skipped."""
    scale = window.scalar("grad_scale")
    known = np.flatnonzero(np.isfinite(scale) & (scale > 0) & (window.steps > settings.settling))
    skipped = np.nan_to_num(window.scalar("amp_skipped"))
    halvings = 0.0
    first = 0
    if len(known) > 1:
        change = np.diff(np.log2(scale[known]))
        halvings = float(-change[change < 0].sum() - change[change > 0].sum())
        falls = np.flatnonzero(change < 0)
        first = int(window.steps[known[falls[0] + 1]]) if len(falls) else 0
    late = window.steps > settings.settling
    recent = skipped[late][-50:]
    steps = int(window.steps[-1] - window.steps[late][-50:][0]) + 1 if late.any() else 0
    told = recent.sum() >= settings.skips and recent.sum() >= settings.share * (
        steps + recent.sum()
    )
    if not (halvings >= settings.halvings or told):
        return None
    if not first or told:
        first = int(window.steps[late][-50:][np.flatnonzero(recent)[0]])
    total = int(skipped.sum())
    return Finding(
        kind="amp_skips",
        severity=Severity.CRITICAL,
        layers=(),
        first_step=first,
        last_step=int(window.steps[-1]),
        summary=(
            f"Mixed precision skips step after step since step {first}"
            + (f": the loss scale was halved {halvings:.0f} times" if halvings else "")
            + (f", {spoken(total)} steps were lost." if total else ".")
        ),
        evidence={
            "halvings of the scale": kept(halvings),
            "skipped steps": total,
            "scale now": kept(float(scale[known[-1]])) if len(known) else "not recorded",
        },
    )
