"""Gradients that add up from step to step, because nobody sets them to zero."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import optimized, sound_part
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, spoken


@dataclass(frozen=True)
class Thresholds:
    """When a missing zero_grad is told."""

    steps: int = threshold(20, "steps", "the run's first ones, in which sums grow most")
    frames: int = threshold(14, "frames", "fewest of them; 8 took a healthy transformer for a sum")
    slope: float = threshold(
        0.4, "1", "growth as a power of the step: sums of independent gradients have 0.5, of equal "
        "ones 1"
    )  # fmt: skip
    steepest: float = threshold(
        1.7, "1", "the same power; beyond it, on the whole or from second to last, is an explosion"
    )
    error: float = threshold(
        0.2, "1", "RMS deviation of log(norm) from that power; sums have 0.03 to 0.11"
    )
    first: float = threshold(
        1.15,
        "1",
        "norm at the second step / at the first; a sum has 1.4 to 2, less where batches pull apart",
    )
    start: float = threshold(
        0.8,
        "1",
        "the same / what that power of the step says; sums have 0.88 and more, a generator whose "
        "gradients grow faster and faster 0.7",
    )
    jitter: float = threshold(
        0.05,
        "1",
        "standard deviation of log(norm)'s changes in the second half: one more gradient changes a "
        "sum of t by a 1/t at most, fresh batches by 0.1 and more",
    )
    share: float = threshold(0.9, "1", "part of the layers that grow so")
    keeps: float = threshold(
        0.5, "1", "norm / that of the step before: a step that halves a sum has to undo half of it"
    )
    growth: float = threshold(1.3, "1", "growth in the first steps where the power is not clear")
    follows: float = threshold(
        -0.2,
        "1",
        "autocorrelation of the changes of a layer's log(norm) from step to step: that of "
        "independent batches is -0.5, for what one step adds the next one takes; a sum's is 0 or "
        "more",
    )
    to_and_fro: float = threshold(
        0.35, "1", "the same of the loss, above which it does not show that its batches differ"
    )
    calm: float = threshold(
        0.15,
        "1",
        "jitter of the typical layer / its growth in log(norm): sums have 0.002 to 0.11, with gaps "
        "between frames 0.146, gradients that grow as learning begins 0.19 and more",
    )
    leaps: float = threshold(
        0.4,
        "1",
        "the same jitter by itself: sums under large steps have 0.25, gradients of weights that a "
        "far too large rate throws about 0.6",
    )


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Norms that grow from the first step on like a sum does, in nearly every layer at once."""
    sound = sound_part(window)
    rows = np.flatnonzero((sound.steps >= 1) & (sound.steps <= settings.steps))
    if len(rows) < settings.frames or int(sound.steps[0]) > 2:
        return None
    held = np.flatnonzero(optimized(sound)).tolist()
    norms = sound.statistic("norm")[rows].astype(np.float64)[:, held]
    norms = norms[:, (norms > 0).all(axis=0)]
    if not norms.shape[1]:
        return None
    total = np.log(np.sqrt((norms**2).sum(axis=1)))
    time = np.log(sound.steps[rows].astype(np.float64))
    slopes = _slopes(time, np.log(norms))
    slope = float(_slopes(time, total[:, None])[0])
    error = float(np.std(total - slope * time))
    growth = float(np.exp(total[1] - total[0]))
    expected = settings.first if sound.steps[rows[1]] == sound.steps[rows[0]] + 1 else 1.0
    grown = float((slopes > settings.slope / 4).mean())
    if not (growth >= expected and grown >= settings.share):
        return None
    changes = np.diff(total)
    late = float(np.std(changes[len(changes) // 2 :]))
    power = settings.slope <= slope <= settings.steepest and error <= settings.error
    power &= total[1] - total[0] >= np.log(settings.start) + slope * (time[1] - time[0])
    power &= late <= settings.jitter and float(changes.min()) >= -settings.jitter
    smooth = slope <= settings.steepest and _smooth(
        time, np.log(norms), _losses(sound, rows), settings
    )
    if not (power or smooth):
        return None
    step = int(sound.steps[0])
    times = float(np.exp(total[-1] - total[0]))
    names = tuple(sound.layers[place].name for place in held)
    return Finding(
        kind="missing_zero_grad",
        severity=Severity.CRITICAL,
        layers=names,
        first_step=step,
        last_step=int(sound.steps[-1]),
        summary=(
            f"From the first step on the gradients add up: their norm grew {spoken(times)}-fold in "
            f"{int(sound.steps[rows[-1]])} steps, as the step number to the power of "
            f"{spoken(slope)}. zero_grad is missing, or comes after backward."
        ),
        evidence={
            "power of growth": kept(slope),
            "second / first step's norm": kept(growth),
            "jitter of log(norm)": kept(late),
            "share of layers that grow so": kept(grown),
        },
    )


def _smooth(
    time: NDArray[np.float64],
    sizes: NDArray[np.float64],
    losses: NDArray[np.float64],
    settings: Thresholds,
) -> bool:
    """Whether the layers' log(norm) grows as smoothly as a sum does, of batches that differ.

    time: log(step). sizes: float64[rows, layers]. losses: those of the same steps. Gradients of
    differing batches go to and fro as their losses do.
    """
    if len(losses) < settings.frames:
        return False
    half = len(sizes) // 2
    typical = np.median(sizes - sizes[0], axis=1)
    # From the second step on: the first update may throw the weights far off.
    most = typical[1] + settings.steepest * (time[-1] - time[1])
    grows = np.log(settings.growth) <= typical[-1] <= most
    holds = np.diff(typical).min() >= np.log(settings.keeps)
    # Of three frames each: one that dips is no sign of how the growth goes on.
    middle, end = np.median(typical[half - 1 : half + 2]), np.median(typical[-3:])
    slows = middle - typical[0] >= end - middle
    changes = np.diff(sizes, axis=0)
    jitter = float(np.median(changes[half:].std(axis=0)))
    calm = jitter <= min(settings.calm * typical[-1], settings.leaps)
    follows = float(np.median(_autocorrelation(changes))) >= settings.follows
    differ = float(_autocorrelation(np.diff(losses)[:, None])[0]) <= settings.to_and_fro
    return bool(grows and holds and slows and calm and follows and differ)


def _autocorrelation(changes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each column's values with the next ones, their median taken off. float64[columns]."""
    apart = changes - np.median(changes, axis=0)
    size = np.maximum((apart**2).sum(axis=0), 1e-300)
    return (apart[1:] * apart[:-1]).sum(axis=0) / size


def _losses(sound: Window, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    """The finite losses of some steps."""
    loss = sound.scalar("loss")[rows]
    return loss[np.isfinite(loss)]


def _slopes(time: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Slope of each column of values over time, by least squares."""
    centred = time - time.mean()
    return centred @ (values - values.mean(axis=0)) / (centred @ centred)
