"""Weights that start too small or too large for the depth of the network."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import chain_of, links_of, sound_part
from gradwatch.health.course import FIRST_STEPS, movement
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.robust import largest, median
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Layers, Window
from gradwatch.health.words import kept, spoken


@dataclass(frozen=True)
class Thresholds:
    """When poor initialisation is told."""

    ratio: float = threshold(
        1e3, "1", "gradients of the first layers / of the last ones, or the inverse, at the start"
    )
    gain: float = threshold(
        2.5, "1", "the layers' typical gain must be off by this much from the 0.5 to 1.5 of use"
    )
    links: int = threshold(4, "layers", "fewest weight layers: a product needs factors")
    steps: int = threshold(10, "steps", "those that show the initial weights")
    frames: int = threshold(3, "frames", "fewest of them")


# gain = RMS of the weights * sqrt(fan in): torch's default has 0.58, Xavier 1, He 1.41.
LOW, HIGH = 0.5, 1.5


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """A gradient that vanishes or explodes along the chain at once, by the weights' own size."""
    sound = sound_part(window)
    rows = np.flatnonzero(sound.steps <= settings.steps)
    chain = chain_of(sound)
    count = len(chain.layers)
    if not len(sound.steps) or int(sound.steps[0]) > FIRST_STEPS or count < settings.links:
        return None
    first = movement(sound).rows
    # One step can explode the net at once: then its first frame alone shows the initial weights.
    if not len(first) or (len(rows) < settings.frames and len(rows) == len(window.steps)):
        return None
    sizes = sound.statistic("weight_norm").astype(np.float64)[first[0]]
    elements, fan_in = sound.of_layers(_roots)
    gains = sizes[list(chain.layers)] / elements * fan_in
    typical = float(median(gains))
    third = max(count // 3, 1)
    early, late = slice(0, third), slice(count - third, None)
    found = float("nan")
    for rms in (chain.rms[rows], chain.bias_rms[rows]):
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            here = float(median(largest(rms[:, early]) / largest(rms[:, late])))
        # Of weights and biases the one that tells more.
        if not np.isnan(here) and not abs(_log(here)) <= abs(_log(found)):
            found = here
    small = found <= 1 / settings.ratio and typical <= LOW / settings.gain
    large = found >= settings.ratio and typical >= HIGH * settings.gain
    if not (small or large):
        return None
    names = tuple(chain.names)
    word = "small" if small else "large"
    change = "shrinks to" if small else "grows"
    return Finding(
        kind="poor_initialisation",
        severity=Severity.WARNING,
        layers=names,
        first_step=int(sound.steps[0]),
        last_step=int(sound.steps[rows[-1]]),
        summary=(
            f"The weights start too {word}: a typical layer multiplies its signal by "
            f"{spoken(typical)}, and over {count} layers the gradient {change} {spoken(found)}"
            f"{'' if small else '-fold'} of its size at the output."
        ),
        evidence={
            "typical gain (RMS * sqrt of fan in)": kept(typical),
            "first / last layers' gradients": kept(found),
            "weight layers": count,
        },
    )


def _roots(layers: Layers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Square roots of each weight layer's number of elements, and of its fan in. float64[n]."""
    shapes = [layers[place].shape for place in links_of(layers)]
    elements = np.array([sqrt(prod(shape)) for shape in shapes])
    return elements, np.array([sqrt(prod(shape[1:])) for shape in shapes])


def _log(value: float) -> float:
    """Orders of magnitude; 0 for what is not known."""
    if np.isnan(value):
        return 0.0
    return float(np.log10(max(value, 1e-300))) if value != np.inf else 300.0
