"""Activations driven to their flat ends, where they pass no gradient on."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import bias_places_of, links_of, sound_part
from gradwatch.health.course import movement
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.robust import median, onset
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Layer, Layers, Window
from gradwatch.health.words import kept, listed, spoken

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Thresholds:
    """When saturation is told."""

    detail_frames: int = threshold(4, "detail frames", "fewest that show it")
    share: float = threshold(0.7, "1", "part of the recent detail frames that show it")
    recent: int = threshold(10, "detail frames", "the present")
    ends: float = threshold(
        0.75,
        "1",
        "share of the outputs at the flat ends; the rest passes half of the gradient at best",
    )
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

    The agent samples what activations put out. Where it could not, as of compiled models, a layer
    is judged by the gradients before and behind its activation.
    """
    sound = sound_part(window)
    rows = movement(sound).rows
    if len(rows) < settings.detail_frames:
        return None
    found = sorted(at_ends(sound, rows, settings) + inferred(sound, rows, settings))
    if not found:
        return None
    names = tuple(sound.layers[layer.place].name for layer in found)
    sampled = [layer.ends for layer in found if not math.isnan(layer.ends)]
    slopes = [layer.slope for layer in found if not math.isnan(layer.slope)]
    evidence: dict[str, float | int | str] = {}
    if sampled:
        evidence["outputs at the flat ends"] = kept(max(sampled))
    if slopes:
        evidence["estimated slope of the activation"] = kept(min(slopes))
        evidence["units without gradient in a batch"] = kept(max(layer.silent for layer in found))
    evidence["layers"] = len(names)
    shown = (
        f"{spoken(100 * max(sampled))} % of its outputs lie at its flat ends"
        if sampled
        else f"it passes about {spoken(100 * min(slopes))} % of the gradient on"
    )
    return Finding(
        kind="saturation",
        severity=Severity.WARNING,
        layers=names,
        first_step=int(sound.steps[min(layer.row for layer in found)]),
        last_step=int(sound.steps[rows[-1]]),
        summary=f"The activation after {listed(names)} is saturated: {shown}.",
        evidence=evidence,
    )


class Saturated(NamedTuple):
    """A layer whose activation is flat."""

    place: int  # in the window's layers
    row: int  # of the window, since which it has been so
    ends: float = math.nan  # share of the activation's outputs at its flat ends, sampled
    slope: float = math.nan  # of the activation, estimated from gradients
    silent: float = -math.inf  # share of units without gradient in a batch


def at_ends(sound: Window, rows: NDArray[np.int64], settings: Thresholds) -> list[Saturated]:
    """The layers whose activation's outputs lie at its flat ends now. rows: detail frames."""
    share = sound.statistic("saturated_fraction")[rows].astype(np.float64)
    shown = share >= settings.ends
    return [
        Saturated(place, int(rows[since]), ends=float(median(_recent(share, settings)[:, place])))
        for place, since in _lasting(shown, ~np.isnan(share), settings)
    ]


def inferred(sound: Window, rows: NDArray[np.int64], settings: Thresholds) -> list[Saturated]:
    """The layers that are saturated now by their gradients, of those that were never sampled.

    A unit that is off, as a ReLU's, gives the next layer exactly 0, and so a column of zeros in its
    gradient. A saturated unit has no gradient either, but its output is not 0. rows: detail frames.
    """
    pairs = sound.of_layers(_pairs)
    if not len(pairs):
        return []
    here, bias, after, next_bias = pairs.T
    norm = sound.statistic("norm")[rows].astype(np.float64)
    weight = sound.statistic("weight_norm")[rows].astype(np.float64)
    zero = sound.statistic("zero_fraction")[rows].astype(np.float64)
    share = sound.statistic("saturated_fraction")
    sampled: NDArray[np.bool_] = np.logical_or.reduce(np.isfinite(share), axis=0)
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
    known = np.isfinite(slope) & ~sampled[here]
    recent = _recent(slope, settings), _recent(silent, settings)
    return [
        Saturated(
            int(here[pair]),
            int(rows[since]),
            slope=float(median(recent[0][:, pair])),
            silent=float(median(recent[1][:, pair])),
        )
        for pair, since in _lasting(shown, known, settings)
    ]


def _lasting(
    shown: NDArray[np.bool_], known: NDArray[np.bool_], settings: Thresholds
) -> list[tuple[int, int]]:
    """Columns that show it now and on most of the recent frames, each with its first such row.

    shown, known: bool[detail frames, n]; where it is not known it is not shown either.
    """
    shown = shown & known
    count = _recent(known, settings).sum(axis=0)
    often = _recent(shown, settings).sum(axis=0) >= settings.share * count
    newest = len(known) - 1 - known[::-1].argmax(axis=0)
    now = shown[newest, np.arange(known.shape[1])]
    told = np.flatnonzero(often & now & (count >= settings.detail_frames))
    return [(int(place), onset(shown[:, place], settings.share) or 0) for place in told]


def _recent(values: NDArray[T], settings: Thresholds) -> NDArray[T]:
    return values[-settings.recent :]


def _pairs(layers: Layers) -> NDArray[np.int64]:
    """Dense layers that feed one another: place of the first, its bias, the second, its bias."""
    places, biases = links_of(layers), bias_places_of(layers)
    others = sorted(layer.depth for layer in layers if layer.role not in ("bias", "weight"))
    found = [
        (here, bias, after, next_bias)
        for (here, bias), (after, next_bias) in pairwise(zip(places, biases, strict=True))
        if min(bias, next_bias) >= 0
        and layers[bias].role == layers[next_bias].role == "bias"
        and _follows(layers[here], layers[after], others)
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def _follows(first: Layer, second: Layer, others: list[int]) -> bool:
    """Whether a dense layer is fed by another one, with nothing but an activation between.

    others: depths of what is neither weight nor bias, ascending.
    """
    dense = first.module == second.module == "Linear"
    # Side by side in one container; else nothing says that the one feeds the other.
    dense &= _parent(first.name) == _parent(second.name)
    if not dense or first.shape[0] != second.shape[1]:
        return False
    return bisect_left(others, second.depth) == bisect_right(others, first.depth)


def _parent(name: str) -> str:
    """Name of the module that holds the layer's module: "encoder" for "encoder.2.weight"."""
    return ".".join(name.split(".")[:-2])
