"""Gradients too small for 16-bit floating point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch.health.chain import links, sound_part
from gradwatch.health.course import course, movement
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, listed

# float16's smallest number: below its normal range (6.1e-5) all numbers are multiples of it.
QUANTUM = 2.0**-24
SMALLEST_NORMAL = 2.0**-14


@dataclass(frozen=True)
class Thresholds:
    """When underflow is told."""

    detail_frames: int = threshold(3, "detail frames", "fewest that show it")
    zeros: float = threshold(
        0.3, "1", "share of a layer's gradient that is exactly 0, beside multiples of 2^-24"
    )
    layers: float = threshold(0.3, "1", "part of the weight layers")


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Layers whose largest element is a few quanta of float16 and whose other ones are 0."""
    sound = sound_part(window)
    rows = movement(sound).rows[-10:]
    places = links(sound)
    if len(rows) < settings.detail_frames or not places:
        return None
    peak = sound.statistic("absmax")[rows].astype(np.float64)[:, places]
    zeros = sound.statistic("zero_fraction")[rows].astype(np.float64)[:, places]
    quanta = peak / QUANTUM
    with np.errstate(invalid="ignore"):
        whole = (quanta == np.round(quanta)) & (peak > 0) & (peak < SMALLEST_NORMAL)
        gone = peak == 0
    lost = (whole & (zeros >= settings.zeros)) | gone
    half = np.array([sound.layers[place].dtype == "float16" for place in places], dtype=np.bool_)
    # A layer of zeros alone may be dead; beside layers of quanta it is the same story, and when
    # nothing at all is left in 16 bits.
    nothing = bool(half.all()) and bool(gone.all()) and bool((course(sound).loss != 0).any())
    told = (lost.mean(axis=0) >= 0.7) & (whole.any() or nothing)
    if not told.mean() >= settings.layers:
        return None
    if not (nothing or (whole.mean(axis=0) >= 0.5).any()):
        return None
    names = tuple(sound.layers[places[link]].name for link in np.flatnonzero(told))
    share = float(np.nanmedian(zeros[:, told]))
    return Finding(
        kind="underflow",
        severity=Severity.CRITICAL,
        layers=names,
        first_step=int(sound.steps[movement(sound).rows[0]]),
        last_step=int(sound.steps[-1]),
        summary=(
            f"In {listed(names)} the gradients are below what 16 bits can hold: "
            f"{100 * share:.0f} % of the elements are 0, and the largest is "
            f"{np.nanmax(quanta):.0f} times the smallest number of float16."
        ),
        evidence={
            "share of zeros": kept(share),
            "largest element": kept(float(np.nanmax(peak))),
            "layers": f"{len(names)} of {len(places)}",
        },
    )
