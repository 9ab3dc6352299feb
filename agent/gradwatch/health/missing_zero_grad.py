"""Gradients that add up from step to step, because nobody sets them to zero."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import sound_part
from gradwatch.health.course import noise
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
    steepest: float = threshold(1.7, "1", "beyond this it is an explosion and no sum")
    error: float = threshold(
        0.2, "1", "RMS deviation of log(norm) from that power; sums have 0.03 to 0.11"
    )
    first: float = threshold(
        1.15, "1", "norm at the second step / at the first; a sum has 1.4 to 2"
    )
    jitter: float = threshold(
        0.05,
        "1",
        "standard deviation of log(norm)'s changes in the second half: one more gradient changes a "
        "sum of t by a 1/t at most, fresh batches by 0.1 and more",
    )
    share: float = threshold(0.9, "1", "part of the layers that grow so")
    calm: float = threshold(
        0.3,
        "1",
        "jitter / relative noise of the loss: fresh gradients are no calmer than their losses (0.4 "
        "and more measured), sums are (0.13 for a transformer, whose sums grow as slowly as t^0.2)",
    )
    growth: float = threshold(1.3, "1", "growth in the first steps that goes with such calm")


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Norms that grow from the first step on like a sum does, in nearly every layer at once."""
    sound = sound_part(window)
    rows = np.flatnonzero((sound.steps >= 1) & (sound.steps <= settings.steps))
    if len(rows) < settings.frames or int(sound.steps[0]) > 2:
        return None
    held = [place for place, layer in enumerate(sound.layers) if layer.optimized]
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
    changes = np.diff(total)
    late = changes[len(changes) // 2 :]
    power = settings.slope <= slope <= settings.steepest and error <= settings.error
    # Layer by layer, for clipping leaves the total calm too.
    by_layer = np.diff(np.log(norms), axis=0)[len(changes) // 2 :]
    calm = float(np.median(by_layer.std(axis=0))) <= settings.calm * _loss_noise(sound, rows)
    calm &= bool(total[-1] - total[0] >= np.log(settings.growth)) and slope <= settings.steepest
    if not (
        (power or calm)
        and growth >= expected
        and grown >= settings.share
        and float(np.std(late)) <= settings.jitter
        and float(changes.min()) >= -settings.jitter
    ):
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
            "jitter of log(norm)": kept(float(np.std(late))),
            "share of layers that grow so": kept(grown),
        },
    )


def _loss_noise(sound: Window, rows: NDArray[np.intp]) -> float:
    """Noise of the loss from batch to batch, relative to the loss; 0 where it is not known."""
    loss = sound.scalar("loss")[rows]
    loss = loss[np.isfinite(loss)]
    if len(loss) < 5:
        return 0.0
    return noise(loss) / max(abs(float(np.median(loss))), 1e-300)


def _slopes(time: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Slope of each column of values over time, by least squares."""
    centred = time - time.mean()
    return centred @ (values - values.mean(axis=0)) / (centred @ centred)
