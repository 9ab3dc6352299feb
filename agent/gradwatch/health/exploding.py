"""Exploding gradients: growth far beyond the run's own past, or towards the input."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import (
    Chain,
    broken_steps,
    chain_of,
    sound_part,
    total_norm,
    weight_norms,
)
from gradwatch.health.course import movement, outcome
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.robust import largest, median, onset, root_sum_squares
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Layers, Window


@dataclass(frozen=True)
class Thresholds:
    """When exploding gradients are told."""

    front: float = threshold(
        40.0,
        "1",
        "largest element RMS of the early weight layers (or biases) / largest of the late ones; "
        "AUTOTRAINER says 70, healthy residual networks of 50 blocks reach 25",
    )
    bias_front: float = threshold(
        100.0, "1", "the same of biases alone; that of a single output is near 0 now and then"
    )
    growth: float = threshold(
        100.0,
        "1",
        "total norm / median of the window's first frames; a healthy GAN reaches 400, but never "
        "with gradients as large as its weights",
    )
    front_relative: float = threshold(
        1.0, "1", "gradient norm / weight norm of the layer: a step at rate 1 would replace it"
    )
    relative: float = threshold(
        10.0,
        "1",
        "the same where only the total's growth or the biases show it; healthy networks reach 1",
    )
    elasticity: float = threshold(
        10.0,
        "1",
        "gradient norm * weight norm / loss that goes with it, whatever the scale of the loss: "
        "healthy networks have about 1",
    )
    creeping_growth: float = threshold(
        20.0, "1", "growth that is told as a warning when the loss hangs by a thread"
    )
    creeping_relative: float = threshold(2.0, "1", "gradient norm / weight norm that goes with it")
    creeping_elasticity: float = threshold(
        100.0,
        "1",
        "elasticity of such a loss: a step of 1 % of the weights doubles it; a GAN reaches 50",
    )
    absurd: float = threshold(
        1e6,
        "1",
        "gradient norm / weight norm beyond any healthy scale: a loss multiplied by 1e4 has 1e3",
    )
    extreme: float = threshold(
        1e4, "1", "front or growth that is told from one frame, for it ruins the weights at once"
    )
    extreme_relative: float = threshold(
        1e3, "1", "gradient norm / weight norm that an extreme frame has as well; also critical"
    )
    dominant: float = threshold(
        100.0, "1", "element RMS of one layer's weights / that of the typical layer"
    )
    dominant_rms: float = threshold(
        30.0, "1", "element RMS of its weights beyond any initialisation in use"
    )
    share: float = threshold(0.5, "1", "part of the recent frames that show it")
    recent_frames: int = threshold(10, "frames", "the present: a single spike that heals is not")
    frames: int = threshold(3, "frames", "fewest recent frames that show it")
    baseline_frames: int = threshold(10, "frames", "the window's first frames: the run's own size")
    frames_before_nan: int = threshold(
        3, "frames", "growth in any of the last frames before NaN is told without persistence"
    )
    gain: float = threshold(
        5.0, "standard errors", "fall of the loss that shows that growth is part of learning"
    )
    burst: float = threshold(
        100.0, "1", "first frame's norm / median of the next ten, when the loss is no better since"
    )
    relative_before_nan: float = threshold(
        1.0, "1", "gradient norm / weight norm that goes with growth just before NaN"
    )
    growth_before_nan: float = threshold(
        10.0, "1", "growth is enough there: a residual network diverged from 70 to NaN in one step"
    )


class Signs(NamedTuple):
    """What each frame shows, NaN where it cannot be said. Each float64[steps]."""

    total: NDArray[np.float64]  # norm of all gradients together
    relative: NDArray[np.float64]  # the weight layers' gradient norm / weight norm
    elasticity: NDArray[np.float64]  # change of the loss / of the weights, both relative
    growth: NDArray[np.float64]
    front: NDArray[np.float64]
    front_relative: NDArray[np.float64]  # of the early layer with the largest gradient, if in front
    bias_front: NDArray[np.float64]


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Sustained explosion now, or one that is extreme or ends in NaN at any time of the window."""
    sound = sound_part(window)
    if not len(sound.steps) or not len(sound.layers):
        return None
    chain = chain_of(sound)
    signs = signs_of(sound, chain, settings)
    with np.errstate(invalid="ignore"):
        large = signs.relative >= settings.relative
        large &= ~(signs.elasticity < settings.elasticity)  # no loss does not speak against it
        flags = (signs.growth >= settings.growth) & large
        flags |= (signs.front >= settings.front) & (signs.front_relative >= settings.front_relative)
        flags |= (signs.bias_front >= settings.bias_front) & large
        creeping = signs.growth >= settings.creeping_growth
        creeping &= signs.relative >= settings.creeping_relative
        flags |= creeping & (signs.elasticity >= settings.creeping_elasticity)
        # A loss that falls says that the scale is the loss's own.
        flags &= not _learns(window, settings)
        absurd = (signs.relative >= settings.absurd) | np.isinf(signs.total)
        factor = np.fmax(np.fmax(signs.growth, signs.front), signs.bias_front)
        extreme = (factor >= settings.extreme) & (signs.relative >= settings.extreme_relative)
    flags |= absurd
    dominant = _dominant(sound, settings)
    if dominant is not None:
        flags |= _rest(chain, sound, dominant) >= settings.relative

    recent = flags[-settings.recent_frames :]
    sustained = recent.mean() >= settings.share and recent.sum() >= settings.frames
    broken = window.steps[broken_steps(window)]
    to_nan = False
    if len(broken):
        before = np.flatnonzero(sound.steps < broken[0])[-settings.frames_before_nan :]
        with np.errstate(invalid="ignore"):
            big = signs.relative[before] >= settings.relative_before_nan
            flags[before] |= big & (signs.growth[before] >= settings.growth_before_nan)
        to_nan = bool(flags[before].any())
    burst = _burst(sound, window, signs, settings)
    if burst:
        extreme[0] = True
    if not (sustained or to_nan or extreme.any()):
        return None

    row = _first_row(flags, extreme, bool(sustained), to_nan, settings)
    worst = int(np.argmax(np.where(flags | extreme, np.nan_to_num(signs.total, posinf=np.inf), -1)))
    names = _layers(sound, chain, row, settings)
    if dominant is not None and not absurd[row]:
        leader = sound.layers[dominant].name
        names = (leader, *(name for name in names if name != leader))
    critical = to_nan or extreme.any() or signs.relative[worst] >= settings.extreme_relative
    step = int(sound.steps[row])
    return Finding(
        kind="exploding",
        severity=Severity.CRITICAL if critical else Severity.WARNING,
        layers=names,
        first_step=step,
        last_step=int(sound.steps[np.flatnonzero(flags | extreme)[-1]]),
        summary=_summary(signs, row, worst, step, names, settings)
        + (f", and ended in NaN or Inf at step {int(broken[0])}." if to_nan else "."),
        evidence=_evidence(signs, worst, sound),
    )


def signs_of(sound: Window, chain: Chain, settings: Thresholds) -> Signs:
    """The signs of explosion of each step."""
    total = total_norm(sound)
    baseline = _baseline(total, settings.baseline_frames)
    places = list(chain.layers)
    norms = sound.statistic("norm")[:, places]
    weights = weight_norms(sound)
    held = weights.values[:, places]
    count = len(places)
    late = slice(count - max(count // 3, 1), None) if count else slice(0, 0)
    early = slice(0, late.start)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Of the layers that had a gradient at that step.
        size = root_sum_squares(np.where(np.isnan(norms), norms, held[weights.row]))
        relative = root_sum_squares(norms) / _positive(size)
        elasticity = np.abs(total * size / sound.scalar("loss"))
        growth = total / baseline
        front = largest(chain.rms[:, early]) / _positive(largest(chain.rms[:, late]))
        bias_front = largest(chain.bias_rms[:, early]) / _positive(largest(chain.bias_rms[:, late]))
    front_relative = np.full(len(total), np.nan)
    rows = np.flatnonzero(front >= settings.front)
    if len(rows):
        leader = np.nan_to_num(chain.rms[rows, early], nan=-1.0).argmax(axis=1)
        front_relative[rows] = chain.relative[rows, leader]
    return Signs(total, relative, elasticity, growth, front, front_relative, bias_front)


def _learns(window: Window, settings: Thresholds) -> bool:
    """Whether the loss is clearly below its start: then growth over time is part of learning."""
    result = outcome(window)
    return result is not None and result.gain >= settings.gain


def _burst(sound: Window, window: Window, signs: Signs, settings: Thresholds) -> bool:
    """Whether the first gradient was enormous, threw the weights away, and nothing came of it."""
    after = signs.total[1:11]
    if len(after) < 5 or int(sound.steps[0]) > 2 or not signs.relative[0] >= settings.relative:
        return False
    if not signs.total[0] >= settings.burst * float(np.median(after)):
        return False
    result = outcome(window, last=10)
    return result is not None and result.gain < settings.gain


def _dominant(sound: Window, settings: Thresholds) -> int | None:
    """Place of the layer whose weights are far larger than all others', if there is one."""
    places, sizes = sound.of_layers(_matrices)
    if len(places) < 3:
        return None
    detailed = sound.statistic("weight_norm")[movement(sound).rows]
    size = median(detailed[:, places]) / np.sqrt(sizes)
    leader = int(np.nan_to_num(size, nan=-1.0).argmax())
    limit = max(settings.dominant * float(median(size)), settings.dominant_rms)
    return places[leader] if size[leader] >= limit else None


def _matrices(layers: Layers) -> tuple[list[int], NDArray[np.float64]]:
    """Places of the weights and embeddings, and the number of elements of each."""
    places = [
        place
        for place, layer in enumerate(layers)
        if layer.role in ("weight", "embedding") and len(layer.shape) > 1
    ]
    return places, np.array([prod(layers[place].shape) for place in places], dtype=np.float64)


def _rest(chain: Chain, sound: Window, dominant: int) -> NDArray[np.float64]:
    """Gradient norm / weight norm of the weight layers but for the dominant one. float64[steps]."""
    places = [place for place in chain.layers if place != dominant]
    held = weight_norms(sound)
    norms = root_sum_squares(sound.statistic("norm")[:, places])
    weights = root_sum_squares(held.values[:, places])[held.row]
    with np.errstate(divide="ignore", invalid="ignore"):
        return norms / _positive(weights)


def _positive(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(values > 0, values, np.nan)


def _baseline(total: NDArray[np.float64], frames: int) -> NDArray[np.float64]:
    """The run's own size, from the steps before each: the median of the first `frames` of them.

    total: float64[steps]; returns float64[steps], NaN at the first step.
    """
    result = np.full(len(total), np.nan)
    for step in range(1, min(frames, len(total))):
        result[step] = median(total[:step])
    result[frames:] = median(total[:frames])
    return _positive(result)


def _first_row(
    flags: NDArray[np.bool_],
    extreme: NDArray[np.bool_],
    sustained: bool,
    to_nan: bool,
    settings: Thresholds,
) -> int:
    if extreme.any():
        return int(np.flatnonzero(flags | extreme)[0])
    if sustained:
        start = onset(flags, settings.share)
        if start is not None:
            return start
    return int(np.flatnonzero(flags)[-settings.frames_before_nan if to_nan else 0 :][0])


def _layers(sound: Window, chain: Chain, row: int, settings: Thresholds) -> tuple[str, ...]:
    """The layers whose gradient is large relative to their weights, the largest first."""
    relative = np.nan_to_num(chain.relative[row], nan=-1.0, posinf=np.inf)
    order = np.argsort(-relative, kind="stable")
    chosen = [link for link in order if relative[link] >= settings.front_relative]
    if not chosen and len(order):
        chosen = [order[0]]
    if chosen:
        return tuple(chain.names[link] for link in chosen)
    norms = np.nan_to_num(sound.statistic("norm")[row], nan=-1.0)
    return (sound.layers[int(norms.argmax())].name,)


def _summary(
    signs: Signs,
    row: int,
    worst: int,
    step: int,
    names: tuple[str, ...],
    settings: Thresholds,
) -> str:
    front = np.fmax(signs.front[worst], signs.bias_front[worst])
    text = f"The gradient norm reached {signs.total[worst]:.2g}"
    if np.isfinite(signs.relative[worst]):
        text += f", {signs.relative[worst]:.2g} times the norm of the weights"
    if signs.growth[worst] >= settings.growth:
        text += f" and {signs.growth[worst]:.2g} times its first size"
    elif front >= settings.front:
        text += f", and grows {front:.2g}-fold from the last layers to the first"
    return text + f" (since step {step}, largest in {names[0]})"


def _evidence(signs: Signs, worst: int, sound: Window) -> dict[str, float | int | str]:
    def number(value: float) -> float | str:
        return float(f"{value:.3g}") if np.isfinite(value) else "inf"

    evidence: dict[str, float | int | str] = {
        "largest total norm": number(float(signs.total[worst])),
        "at step": int(sound.steps[worst]),
    }
    for label, values in (
        ("times the weights' norm", signs.relative),
        ("times the first frames' norm", signs.growth),
        ("early / late weight layers", signs.front),
        ("early / late biases", signs.bias_front),
    ):
        if not np.isnan(values[worst]):
            evidence[label] = number(float(values[worst]))
    return evidence
