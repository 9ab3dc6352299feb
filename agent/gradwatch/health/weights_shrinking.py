"""Weights that melt away."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch.health.chain import links, sound_part
from gradwatch.health.course import FIRST_STEPS, course, movement, outcome
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, spoken


@dataclass(frozen=True)
class Thresholds:
    """When shrinking weights are told."""

    remaining: float = threshold(
        0.5, "1", "weight norm now / at first, with a loss that is no better than at first"
    )
    collapsed: float = threshold(0.15, "1", "the same, where no loss is known")
    share: float = threshold(0.7, "1", "part of the weight layers that shrank so")
    detail_frames: int = threshold(4, "detail frames", "fewest that show the decline")
    gain: float = threshold(4.0, "standard errors", "fall of the loss that shows that it learns")


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Weight norms that fall in nearly every layer while nothing is learnt."""
    sound = sound_part(window)
    moved = movement(sound)
    places = [place for place in links(sound) if sound.layers[place].optimized]
    if len(moved.rows) < settings.detail_frames or not places:
        return None
    if int(sound.steps[0]) > FIRST_STEPS:
        return None
    norms = sound.statistic("weight_norm")[moved.rows].astype(np.float64)[:, places]
    with np.errstate(divide="ignore", invalid="ignore"):
        left = norms[-1] / norms[0]
        whole = float(moved.weight[-1] / moved.weight[0])
    result = outcome(course(window))
    useless = result is not None and result.gain < settings.gain
    if result is not None and not useless:
        return None
    limit = settings.remaining if useless else settings.collapsed
    if not (whole <= limit and (left <= limit).mean() >= settings.share):
        return None
    if not moved.weight[-1] <= moved.weight[len(moved.weight) // 2]:
        return None
    order = np.argsort(np.nan_to_num(left, nan=np.inf), kind="stable")
    names = tuple(sound.layers[places[link]].name for link in order if left[link] <= limit)
    first = int(moved.steps[np.flatnonzero(moved.weight <= 0.8 * moved.weight[0])[0]])
    return Finding(
        kind="weights_shrinking",
        severity=Severity.WARNING,
        layers=names,
        first_step=first,
        last_step=int(sound.steps[-1]),
        summary=(
            f"The weights have shrunk to {spoken(100 * whole)} % of their first norm"
            + (" while the loss is no better than at first." if useless else ".")
        ),
        evidence={
            "weight norm now / at first": kept(whole),
            "layers that shrank": f"{len(names)} of {len(places)}",
        },
    )
