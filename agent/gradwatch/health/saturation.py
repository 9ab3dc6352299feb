"""Activations driven to their flat ends, where they pass no gradient on."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import bias_places, links, sound_part
from gradwatch.health.course import movement
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.robust import median, onset
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, listed, spoken


@dataclass(frozen=True)
class Thresholds:
    """When saturation is told."""

    detail_frames: int = threshold(4, "detail frames", "fewest that show it")
    share: float = threshold(0.7, "1", "part of the recent detail frames that show it")
    recent: int = threshold(10, "detail frames", "the present")
    silent: float = threshold(
        0.015, "1", "share of units whose bias gradient is exactly 0 while their output is not"
    )
    passed: float = threshold(
        0.5, "1", "slope of the activation, estimated, that goes with it; a tanh in range has 1"
    )
    flat: float = threshold(
        0.08, "1", "estimated slope that is enough by itself; a sigmoid has 0.25 at best"
    )


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Layers followed by an activation that is flat for most samples.

    A unit that is off, as a ReLU's, gives the next layer exactly 0, and so a column of zeros in its
    gradient. A saturated unit has no gradient either, but its output is not 0.
    """
    sound = sound_part(window)
    rows = movement(sound).rows
    if len(rows) < settings.detail_frames:
        return None
    found = saturated(sound, rows, settings)
    if not found:
        return None
    names = tuple(sound.layers[layer.place].name for layer in found)
    slope = min(layer.slope for layer in found)
    silent = max(layer.silent for layer in found)
    evidence: dict[str, float | int | str] = {
        "estimated slope of the activation": kept(slope),
        "units without gradient in a batch": kept(silent),
        "layers": len(names),
    }
    return Finding(
        kind="saturation",
        severity=Severity.WARNING,
        layers=names,
        first_step=int(sound.steps[min(layer.row for layer in found)]),
        last_step=int(sound.steps[rows[-1]]),
        summary=(
            f"The activation after {listed(names)} is saturated: it passes about "
            f"{spoken(100 * slope)} % of the gradient on."
        ),
        evidence=evidence,
    )


class Saturated(NamedTuple):
    """A layer whose activation is flat."""

    place: int  # in the window's layers
    slope: float  # of the activation, estimated
    silent: float  # share of units without gradient in a batch
    row: int  # of the window, since which it has been so


def saturated(sound: Window, rows: NDArray[np.int64], settings: Thresholds) -> list[Saturated]:
    """The layers that are saturated now. rows: detail frames."""
    pairs = sound.once(_pairs)
    if not len(pairs):
        return []
    here, bias, after, next_bias = pairs.T
    norm = sound.statistic("norm")[rows].astype(np.float64)
    weight = sound.statistic("weight_norm")[rows].astype(np.float64)
    zero = sound.statistic("zero_fraction")[rows].astype(np.float64)
    units = np.array([sound.layers[place].shape[0] for place in after], dtype=np.float64)
    silent = zero[:, bias]
    with np.errstate(divide="ignore", invalid="ignore"):
        # What arrives at a unit is a random mixture of what the next layer's units got.
        arriving = norm[:, next_bias] * weight[:, after] / np.sqrt(units)
        slope = norm[:, bias] / np.where(arriving > 0, arriving, np.nan)
        kept_on = zero[:, after] < settings.passed * silent
        # A bias whose gradient is nothing beside its weights' is cancelled by what follows.
        real = norm[:, bias] > 1e-5 * norm[:, here]
        shown = (silent >= settings.silent) & kept_on & (slope <= settings.passed)
        shown |= (slope <= settings.flat) & real & ~(zero[:, after] >= 0.3)
    known = np.isfinite(slope)
    recent = slice(max(len(rows) - settings.recent, 0), None)
    count = known[recent].sum(axis=0)
    often = (shown & known)[recent].sum(axis=0) >= settings.share * count
    newest = len(rows) - 1 - known[::-1].argmax(axis=0)
    now = shown[newest, np.arange(len(pairs))]
    told = np.flatnonzero(often & now & (count >= settings.detail_frames))
    return [
        Saturated(
            int(here[pair]),
            float(median(slope[recent, pair])),
            float(median(silent[recent, pair])),
            int(rows[onset(shown[:, pair], settings.share) or 0]),
        )
        for pair in told
    ]


def _pairs(sound: Window) -> NDArray[np.int64]:
    """Dense layers that feed one another: place of the first, its bias, the second, its bias."""
    places, biases = links(sound), bias_places(sound)
    others = sorted(layer.depth for layer in sound.layers if layer.role not in ("bias", "weight"))
    found = [
        (here, bias, after, next_bias)
        for (here, bias), (after, next_bias) in pairwise(zip(places, biases, strict=True))
        if min(bias, next_bias) >= 0
        and sound.layers[bias].role == sound.layers[next_bias].role == "bias"
        and _follows(sound, here, after, others)
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def _follows(sound: Window, here: int, after: int, others: list[int]) -> bool:
    """Whether a dense layer is fed by another one, with nothing but an activation between.

    others: depths of what is neither weight nor bias, ascending.
    """
    first, second = sound.layers[here], sound.layers[after]
    dense = first.module == second.module == "Linear"
    # Side by side in one container; else nothing says that the one feeds the other.
    dense &= _parent(first.name) == _parent(second.name)
    if not dense or first.shape[0] != second.shape[1]:
        return False
    return bisect_left(others, second.depth) == bisect_right(others, first.depth)


def _parent(name: str) -> str:
    """Name of the module that holds the layer's module: "encoder" for "encoder.2.weight"."""
    return ".".join(name.split(".")[:-2])
