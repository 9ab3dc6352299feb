"""Weights that melt away."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch.health.chain import links, sound_part
from gradwatch.health.course import FIRST_STEPS, Movement, movement, outcome, typical
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
    driven: float = threshold(
        0.7, "1", "shrinkage / update while the weights halve: decay moves them, not the gradient"
    )
    learnt: float = threshold(0.5, "1", "loss now / at first that excuses even that")


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
    result = outcome(window)
    useless = result is not None and result.gain < settings.gain
    driven = result is not None and not useless
    if result is not None and driven:
        driven = result.now > settings.learnt * result.start
        if not (driven and _shrinkage(moved, settings.remaining) >= settings.driven):
            return None
    limit = settings.collapsed if result is None else settings.remaining
    # A layer is among those that shrink when it has gone half of the way, in octaves.
    shrunk = left <= limit**0.5
    if not (whole <= limit and shrunk.mean() >= settings.share):
        return None
    if not (driven or moved.weight[-1] <= moved.weight[len(moved.weight) // 2]):
        return None
    order = np.argsort(np.nan_to_num(left, nan=np.inf), kind="stable")
    names = tuple(sound.layers[places[link]].name for link in order if shrunk[link])
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


def _shrinkage(moved: Movement, remaining: float) -> float:
    """What part of a typical update was a loss of norm, until `remaining` of it was left."""
    small = np.flatnonzero(moved.weight <= remaining * moved.weight[0])
    count = int(small[0]) + 1 if len(small) else len(moved.weight)
    with np.errstate(divide="ignore", invalid="ignore"):
        left = moved.weight[1:count] / moved.weight[: count - 1]
        lost = 1 - left ** (1 / np.maximum(np.diff(moved.steps[:count]), 1))
        return typical(lost / moved.ratio[1:count])
