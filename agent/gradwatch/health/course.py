"""The course of a run: what its loss did, and how far its weights moved."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import broken_steps, links, links_of, weight_norms
from gradwatch.health.robust import median, middle, root_sum_squares
from gradwatch.health.window import Layers, Window

# Median absolute deviation of a normal distribution, in standard deviations.
MAD_SIGMA = 0.6745
# A run's beginning must be in view before anything is said of what it has not achieved.
FIRST_STEPS = 10
# Losses that stand for it.
FIRST_LOSSES = 5
# More than this share of the first losses below 0 makes it a loss that measures nothing.
SIGN_LOSSES, SIGN_SHARE = 20, 0.1


class Course(NamedTuple):
    """The finite losses of a window. n: their number; 0 when none was logged."""

    steps: NDArray[np.int64]  # [n]
    loss: NDArray[np.float64]  # [n]
    from_start: bool  # whether the run's first steps are in view

    def since(self, step: int) -> NDArray[np.float64]:
        """Losses after `step`."""
        return self.loss[self.steps > step]


def course(window: Window) -> Course:
    """The losses of the window's steps that were not broken."""
    return window.once(_course)


def _course(window: Window) -> Course:
    loss = window.scalar("loss")
    known = np.isfinite(loss) & ~broken_steps(window)
    steps = window.steps[known]
    return Course(steps, loss[known], len(steps) > 0 and int(steps[0]) <= FIRST_STEPS)


def telling(known: Course) -> bool:
    """Whether the loss measures what was learnt.

    One that is below 0 at first is a difference, of rewards, critics or likelihoods: a policy's
    loss wanders about 0 while it learns.
    """
    return len(known.loss) == 0 or float((known.loss[:SIGN_LOSSES] < 0).mean()) <= SIGN_SHARE


def noise(values: NDArray[np.float64]) -> float:
    """Robust standard deviation of what changes from one value to the next, trends left out.

    Differences of neighbours: a trend of many steps hardly shows in them.
    """
    if len(values) < 3:
        return float("nan")
    return middle(np.abs(np.diff(values))) / MAD_SIGMA / 2**0.5


class Outcome(NamedTuple):
    """How the loss stands beside the run's beginning, in units of its noise from batch to batch."""

    start: float  # median of the first steps, or the very first if that is lower
    now: float  # median of the last ones
    low: float  # a tenth of the last ones lie below
    high: float  # a tenth of the last ones lie above
    gain: float  # (start - now) / standard error: large and positive when it learns


def outcome(window: Window, last: int = 25) -> Outcome | None:
    """Where the loss stands; None when the beginning or the present is not in view, or it measures
    nothing.

    last: losses that stand for the present.
    """
    return window.once(_outcome, last)


def _outcome(window: Window, last: int) -> Outcome | None:
    known, first = course(window), FIRST_LOSSES
    if not (known.from_start and len(known.loss) >= first + last and telling(known)):
        return None
    beginning, present = known.loss[:first], known.loss[-last:]
    # The first step may throw the weights away: then the very first loss alone is the start.
    start = min(middle(beginning), float(beginning[0]))
    now = middle(present)
    spread = max(noise(present), noise(known.loss[: 2 * last]), 1e-9 * abs(start))
    # Error of the difference of two medians, each 1.25 sigma / sqrt(n).
    error = 1.25 * spread * (1 / first + 1 / last) ** 0.5
    low, high = np.quantile(present, [0.1, 0.9])
    return Outcome(start, now, float(low), float(high), (start - now) / max(error, 1e-300))


class Movement(NamedTuple):
    """How far the weight layers moved, seen at the detail frames. m: their number.

    ratio: change a step / norm, of all weight layers together; NaN at the first detail frame.
    """

    steps: NDArray[np.int64]  # [m]
    rows: NDArray[np.int64]  # [m] of the sound window
    ratio: NDArray[np.float64]  # [m]
    layers: NDArray[np.float64]  # [m, layers], each layer's own
    weight: NDArray[np.float64]  # [m] norm of all weight layers together


def movement(sound: Window) -> Movement:
    """The movement of the weights in a window of sound steps."""
    return sound.once(_movement)


def _movement(sound: Window) -> Movement:
    norms = sound.statistic("weight_norm")
    rows = np.flatnonzero(np.isfinite(norms).any(axis=1))
    norms = norms[rows].astype(np.float64)
    moved = sound.statistic("update_ratio")[rows].astype(np.float64)
    places = sound.of_layers(_moved)
    here, size = moved[:, places], norms[:, places]
    known = np.isfinite(here) & np.isfinite(size)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        squares = np.where(known, size, 0.0) ** 2
        weight = np.sqrt(np.nansum(size**2, axis=1))
        ratio = np.sqrt((np.where(known, here, 0.0) ** 2 * squares).sum(axis=1))
        ratio = np.where(known.any(axis=1), ratio / np.sqrt(squares.sum(axis=1)), np.nan)
    return Movement(sound.steps[rows], rows, ratio, moved, weight)


def _moved(layers: Layers) -> list[int]:
    """Places of the weight layers that the optimizer moves, the input's first."""
    places = links_of(layers)
    return [place for place in places if layers[place].optimized and layers[place].trainable]


def network_weight(sound: Window) -> NDArray[np.float64]:
    """Norm of all weight layers together, held between detail frames. float64[steps]."""
    weights = weight_norms(sound)
    return root_sum_squares(weights.values[:, links(sound)])[weights.row]


def typical(values: NDArray[np.float64]) -> float:
    """Median of the finite values; NaN without one."""
    return float(median(np.where(np.isfinite(values), values, np.nan)))
