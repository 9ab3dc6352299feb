"""A loss that stays where it began."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import chain_of, sound_part, total_norm
from gradwatch.health.course import course, noise, outcome
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.robust import median, middle
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, spoken


@dataclass(frozen=True)
class Thresholds:
    """When a plateau is told."""

    steps: int = threshold(180, "steps", "deep plain networks learn nothing for their first 100")
    deep: float = threshold(
        2.5, "1", "times that for a deep chain whose early layers get little at first"
    )
    deep_links: int = threshold(5, "layers", "fewest weight layers of such a chain")
    deep_front: float = threshold(0.2, "1", "early / late layers' gradients of such a chain")
    losses: int = threshold(60, "frames", "fewest losses to judge from")
    blocks: int = threshold(6, "blocks", "of the recent losses, whose medians must agree")
    agree: float = threshold(
        5.0, "standard errors", "range of the blocks' medians; chance has 2.5 (six normal values)"
    )
    trend: float = threshold(3.0, "standard errors", "slope of the recent losses; chance has 1")
    gain: float = threshold(
        2.5, "noise", "fall since the first losses, in units of the noise between batches"
    )
    rise: float = threshold(10.0, "noise", "rise that is a divergence, and no plateau")
    noisy: float = threshold(
        0.4, "1", "noise between batches / loss, beyond which a fall may hide in it"
    )
    awake: float = threshold(
        1.5, "1", "growth of the gradient norm that says that learning is about to begin"
    )


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """No trend in the recent losses, and hardly any fall since the beginning."""
    known = course(window)
    sound = sound_part(window)
    if not known.from_start or min(len(known.loss), len(sound.steps)) < settings.losses:
        return None
    recent = known.loss[len(known.loss) // 4 :]
    blocks = np.array_split(recent, settings.blocks)
    medians = np.array([middle(block) for block in blocks])
    # Repeated batches have no noise of their own: what the loss varies by is all there is.
    spread = max(noise(recent), 1e-6 * abs(float(medians[-1])))
    error = 1.25 * spread / len(blocks[-1]) ** 0.5
    result = outcome(window)
    if result is None or np.ptp(medians) > settings.agree * error:
        return None
    if abs(_trend(recent, spread)) > settings.trend:
        return None
    if spread > settings.noisy * min(abs(result.start), abs(result.now)):
        return None
    if result.start - result.now > settings.gain * spread:
        return None
    if result.now - result.start > settings.rise * spread:
        return None
    sizes = total_norm(sound)
    part = max(len(sizes) // 4, 1)
    before, after = middle(sizes[:part]), middle(sizes[-part:])
    if after > settings.awake * before:
        return None
    # Asked last: it has the chain's gradients sorted.
    patience = settings.steps * (settings.deep if _slow_start(sound, settings) else 1.0)
    if int(known.steps[-1]) < patience:
        return None
    return Finding(
        kind="plateau",
        severity=Severity.WARNING,
        layers=(),
        first_step=int(known.steps[0]),
        last_step=int(known.steps[-1]),
        summary=(
            f"After {int(known.steps[-1])} steps the loss is {spoken(result.now, 3)}, as good as "
            f"its start of {spoken(result.start, 3)}, and no trend shows."
        ),
        evidence={
            "first loss": kept(result.start),
            "loss now": kept(result.now),
            "noise between batches": kept(spread),
            "range of six medians / standard error": kept(float(np.ptp(medians)) / error),
        },
    )


def _slow_start(sound: Window, settings: Thresholds) -> bool:
    """Whether a deep network has yet to wake its first layers; it learns nothing until then."""
    chain = chain_of(sound)
    count = len(chain.layers)
    if count < settings.deep_links:
        return False
    third = max(count // 3, 1)
    size = median(chain.rms)
    return float(median(size[:third])) <= settings.deep_front * float(median(size[-third:]))


def _trend(losses: NDArray[np.float64], spread: float) -> float:
    """Slope by least squares, outliers cut off, in standard errors of independent noise."""
    center = middle(losses)
    cut = np.clip(losses, center - 3 * spread, center + 3 * spread)
    time = np.arange(len(losses)) - (len(losses) - 1) / 2
    return float(time @ cut / np.sqrt(time @ time) / spread)
