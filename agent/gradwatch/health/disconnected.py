"""Layers that should learn and never get a gradient."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from gradwatch.health.chain import is_stray, optimized, trainable
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import listed

# Experts are used when a router chooses them: to be left out is no mistake in the graph.
CONDITIONAL = re.compile(r"expert|\bmoe\b", re.IGNORECASE)


@dataclass(frozen=True)
class Thresholds:
    """When disconnected layers are told."""

    steps: int = threshold(15, "steps", "a head that is used each 10th step gets its gradient")
    frames: int = threshold(5, "frames", "fewest frames in which the layer had no gradient")
    gaps: float = threshold(
        10.0, "1", "a layer that had gradients before must miss this many of its longest gaps"
    )


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Trainable layers of the optimizer whose gradient is None, or where no layer has one at all.

    None is told from 0: it means that backpropagation never reached the layer.
    """
    if window.measured is not None:
        window = window.only(window.measured)
    if len(window.steps) < settings.frames or "norm" not in window.statistics:
        return None
    held = optimized(window)
    wanted = held & trainable(window)
    present = ~np.isnan(window.statistic("norm")) | (window.statistic("nonfinite") > 0)
    if not (wanted & ~present[-1]).any() and (present[-1] & held).any():
        return None
    nothing = bool(held.any()) and not present[:, held].any()
    if nothing:
        wanted = held
    silent: list[int] = []
    starts: list[int] = []
    for place in np.flatnonzero(wanted & ~present[-1]).tolist():
        if not nothing and CONDITIONAL.search(window.layers[place].name):
            continue
        seen = np.flatnonzero(present[:, place])
        start = int(seen[-1]) + 1 if len(seen) else 0
        span = int(window.steps[-1] - window.steps[start]) + 1
        needed = float(settings.steps)
        if len(seen) > 1:
            needed = max(needed, settings.gaps * float(np.diff(window.steps[seen]).max()))
        if span >= needed and len(window.steps) - start >= settings.frames:
            silent.append(place)
            starts.append(start)
    if not silent:
        return None
    # What was replaced or tied to another after the optimizer was built is missed by nobody.
    stray = [not nothing and is_stray(window.layers[place]) for place in silent]
    strays = all(stray)
    if not strays:
        silent = [place for place, apart in zip(silent, stray, strict=True) if not apart]
        starts = [start for start, apart in zip(starts, stray, strict=True) if not apart]
    order = sorted(range(len(silent)), key=lambda item: (starts[item], silent[item]))
    names = tuple(window.layers[silent[item]].name for item in order)
    first = int(window.steps[starts[order[0]]])
    if nothing:
        summary = f"Not one of the {len(names)} layers that the optimizer holds gets a gradient."
    elif strays:
        summary = (
            f"The optimizer holds {listed(names)} that no model has: replaced, or tied to another "
            "layer, after it was built."
        )
    else:
        summary = (
            f"{listed(names)} {'has' if len(names) == 1 else 'have'} had no gradient at all "
            f"since step {first}, though trainable."
        )
    return Finding(
        kind="disconnected",
        severity=_severity(nothing, strays),
        layers=names,
        first_step=first,
        last_step=int(window.steps[-1]),
        summary=summary,
        evidence={
            "layers without gradient": f"{len(names)} of {int(wanted.sum())}",
            "steps without one": int(window.steps[-1]) - first + 1,
        },
    )


def _severity(nothing: bool, strays: bool) -> Severity:
    if strays:
        return Severity.INFO
    return Severity.CRITICAL if nothing else Severity.WARNING
