"""Updates too small to change anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch.health.chain import sound_part
from gradwatch.health.course import movement, outcome, typical
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, spoken


@dataclass(frozen=True)
class Thresholds:
    """When a learning rate that is too low is told."""

    ratio: float = threshold(
        1e-5,
        "1",
        "update / weight a step: a hundredth of what is usual; healthy slow jobs have 1e-4",
    )
    steps: int = threshold(100, "steps", "time that the loss has to fall all the same")
    detail_frames: int = threshold(3, "detail frames", "fewest of the recent ones that show it")
    gain: float = threshold(4.0, "standard errors", "fall of the loss that shows that it learns")
    fallen: float = threshold(
        1e-3, "1", "learning rate / its peak: a schedule that ran out long before the run did"
    )
    fallen_steps: int = threshold(50, "steps", "for which it has been so low")
    fallen_share: float = threshold(
        0.2, "1", "part of the run's steps: a cosine's own end has 0.02 of them"
    )


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """A rate that fell to almost nothing early, or weights that hardly move with no gain."""
    sound = sound_part(window)
    if not len(sound.steps):
        return None
    moved = movement(sound)
    recent = moved.ratio[-settings.detail_frames :]
    if len(recent) < settings.detail_frames or not np.isfinite(recent).any():
        return None
    ratio = typical(recent)
    now = int(sound.steps[-1])
    rate = sound.scalar("lr")
    fell = _fell(sound, settings)
    evidence: dict[str, float | int | str] = {"update / weight a step": kept(ratio)}
    if np.isfinite(rate).any():
        evidence["learning rate"] = kept(float(rate[np.isfinite(rate)][-1]))
    if fell is not None and ratio <= settings.ratio:
        peak = float(np.nanmax(rate))
        evidence["its peak"] = kept(peak)
        summary = (
            f"Since step {fell} the learning rate has been below a thousandth of its peak "
            f"({spoken(peak)}): {now - fell} steps have changed almost nothing."
        )
        first = fell
    else:
        result = outcome(window)
        rows = np.flatnonzero(np.isfinite(moved.ratio))
        if (
            result is None
            or now < settings.steps
            or not (moved.ratio[rows] <= settings.ratio).mean() >= 0.8
            or result.gain >= settings.gain
        ):
            return None
        evidence |= {"first loss": kept(result.start), "loss now": kept(result.now)}
        first = int(sound.steps[0])
        summary = (
            f"A step changes the weights by {spoken(ratio)} of their size, and after {now} steps "
            f"the loss is where it began ({spoken(result.now)})."
        )
    return Finding(
        kind="learning_rate_too_low",
        severity=Severity.WARNING,
        layers=(),
        first_step=first,
        last_step=now,
        summary=summary,
        evidence=evidence,
    )


def _fell(sound: Window, settings: Thresholds) -> int | None:
    """Step since which the rate has been almost nothing; None unless that is long."""
    rate = sound.scalar("lr")
    known = np.flatnonzero(np.isfinite(rate))
    if not len(known):
        return None
    # A peak that a single step had is no level: the schedule must have been there for a while.
    lasting = np.minimum.reduce([rate[known][shift : len(known) - 2 + shift] for shift in range(3)])
    if not len(lasting):
        return None
    peak = float(lasting.max())
    high = known[rate[known] > settings.fallen * peak]
    if not len(high) or high[-1] == known[-1]:
        return None
    # The first frame that is known to be low: between frames nobody knows.
    after = known[np.searchsorted(known, high[-1]) + 1]
    step, now = int(sound.steps[after]), int(sound.steps[-1])
    long = now - step >= max(settings.fallen_steps, settings.fallen_share * now)
    return step if long else None
