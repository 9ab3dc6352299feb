"""Weights that are all equal: units that are born as copies of one another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import links, sound_part
from gradwatch.health.course import movement
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import listed


@dataclass(frozen=True)
class Thresholds:
    """When symmetric units are told."""

    spread: float = threshold(
        1e-4, "1", "standard deviation / RMS of a layer's weights; random ones have 1"
    )
    units: int = threshold(4, "units", "a layer of a few units may be an average on purpose")


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Weight layers whose elements are all alike, and not 0.

    Zero is left out: adapters and residual branches start there, and their neighbours differ.
    """
    sound = sound_part(window)
    rows = movement(sound).rows
    equal = sound.statistic("weight_spread")[rows] <= settings.spread
    equal &= sound.statistic("weight_norm")[rows] > 0
    shown: NDArray[np.bool_] = np.logical_or.reduce(equal, axis=0)
    places = [
        place
        for place in links(sound)
        if shown[place]
        and sound.layers[place].optimized
        and sound.layers[place].trainable
        and sound.layers[place].shape[0] >= settings.units
        and np.prod(sound.layers[place].shape[1:]) >= settings.units
    ]
    if not places:
        return None
    seen = sound.steps[rows[equal[:, places].any(axis=1)]]
    names = tuple(sound.layers[place].name for place in places)
    units = sound.layers[places[0]].shape[0]
    return Finding(
        kind="symmetric_units",
        severity=Severity.WARNING,
        layers=names,
        first_step=int(seen[0]),
        last_step=int(seen[-1]),
        summary=(
            f"All weights of {listed(names)} are equal, so its {units} units compute the same "
            "and learn the same."
        ),
        evidence={"layers": len(names), "units of the first": units},
    )
