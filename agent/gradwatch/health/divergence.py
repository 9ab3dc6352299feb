"""A loss that climbs and climbs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch.health.chain import sound_part, total_norm
from gradwatch.health.course import course, network_weight, noise
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.robust import middle
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, spoken


@dataclass(frozen=True)
class Thresholds:
    """When divergence is told."""

    losses: int = threshold(30, "frames", "fewest losses to judge from")
    last: int = threshold(10, "frames", "those that stand for the present")
    rise: float = threshold(
        3.0, "1", "rise above the first losses / the larger of their level and their noise"
    )
    faster: float = threshold(2.0, "1", "rise now / rise of the half of the run before it")
    growth: float = threshold(
        10.0, "1", "total gradient norm / its median before: a GAN's loss rises without"
    )
    relative: float = threshold(
        1.0,
        "1",
        "total gradient norm / weight norm: beyond it a step at rate 1 replaces the weights",
    )


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """The loss lately far above where it began and was before, with gradients that grew along."""
    known, sound = course(window), sound_part(window)
    if not known.from_start or min(len(known.loss), len(sound.steps)) < settings.losses:
        return None
    first = known.loss[: settings.last]
    now = middle(known.loss[-settings.last :])
    start = middle(first)
    scale = max(abs(start), 5 * noise(known.loss[: settings.losses]), 1e-12)
    before = middle(known.loss[-len(known.loss) // 2 : -settings.last])
    if not now - start > settings.rise * scale:
        return None
    # A GAN's losses rise and settle; what diverges rises ever faster.
    if not now - start >= settings.faster * max(before - start, 0.0):
        return None
    sizes = total_norm(sound)
    before = float(np.median(sizes[: settings.last]))
    size = float(np.median(sizes[-settings.last :]))
    weight = float(network_weight(sound)[-1])
    if not (size >= settings.growth * before and size >= settings.relative * weight):
        return None
    high = known.loss - start > settings.rise * scale
    onset = int(known.steps[np.flatnonzero(~high)[-1]]) if (~high).any() else int(known.steps[0])
    return Finding(
        kind="divergence",
        severity=Severity.CRITICAL,
        layers=(),
        first_step=onset,
        last_step=int(known.steps[-1]),
        summary=(
            f"The loss has climbed from {spoken(start)} to {spoken(now)}, and the gradient norm "
            f"from {spoken(before)} to {spoken(size)}."
        ),
        evidence={
            "first loss": kept(start),
            "loss now": kept(now),
            "gradient norm / its first size": kept(size / before) if before > 0 else "infinity",
        },
    )
