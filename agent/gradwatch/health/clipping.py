"""Clipping that cuts every step, and down to almost nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch.health.chain import sound_part, total_norm
from gradwatch.health.course import network_weight, outcome
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, spoken


@dataclass(frozen=True)
class Thresholds:
    """When clipping is told."""

    steps: int = threshold(50, "steps", "many healthy jobs clip each of their first steps")
    frames: int = threshold(20, "frames", "fewest of them")
    share: float = threshold(0.95, "1", "part of the frames that are clipped")
    same: float = threshold(
        1e-3, "1", "variation of the total norm that nothing but clipping leaves"
    )
    crushed: float = threshold(
        1e-4, "1", "clipped norm / weight norm: a usual limit of 1 leaves 0.01 to 0.1"
    )
    cut: float = threshold(1000.0, "1", "norm before / after clipping, where it was recorded")
    gain: float = threshold(4.0, "standard errors", "fall of the loss that shows that it learns")
    patience: int = threshold(100, "steps", "after which a loss that does not fall counts")


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """A total norm that is the same at every step, and too small or without any gain."""
    sound = sound_part(window)
    count = len(sound.steps)
    if count < settings.frames or int(sound.steps[-1] - sound.steps[0]) + 1 < settings.steps:
        return None
    sizes = total_norm(sound)
    limit = float(np.median(sizes))
    if not (limit > 0 and np.isfinite(limit)):
        return None
    clipped = np.abs(sizes - limit) <= settings.same * limit
    if clipped.mean() < settings.share:
        return None
    before = sound.scalar("total_norm_before_clip")
    cut = float(np.nanmedian(before / sizes)) if np.isfinite(before).any() else float("nan")
    relative = limit / max(float(network_weight(sound)[-1]), 1e-300)
    result = outcome(window)
    now = int(sound.steps[-1])
    stuck = result is not None and result.gain < settings.gain and now >= settings.patience
    if not (relative <= settings.crushed or cut >= settings.cut or stuck):
        return None
    evidence: dict[str, float | int | str] = {
        "clipped steps": f"{int(clipped.sum())} of {count}",
        "norm after clipping": kept(limit),
        "times the weights' norm": kept(relative),
    }
    if np.isfinite(cut):
        evidence["norm before / after"] = kept(cut)
    return Finding(
        kind="clipping",
        severity=Severity.WARNING,
        layers=(),
        first_step=int(sound.steps[np.flatnonzero(clipped)[0]]),
        last_step=now,
        summary=(
            f"Every step is clipped, to a norm of {spoken(limit)}, {spoken(relative)} of the "
            "weights' norm"
            + (f" and a {spoken(cut)}th of what it was" if np.isfinite(cut) else "")
            + ("; the loss does not fall." if stuck else ".")
        ),
        evidence=evidence,
    )
