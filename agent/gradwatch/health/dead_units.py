"""Units whose gradient is exactly 0 on sample after sample, and the layer where that began.

The agent measures it: `dead_fraction` is the share of a layer's output units with gradient 0 on
each of the last detail frames. A norm of 0 alone says nothing, for a float32 norm underflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import bias_places_of, links_of, rms, sound_part
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.robust import median, onset
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Layers, Window


@dataclass(frozen=True)
class Thresholds:
    """When dead units are told."""

    share: float = threshold(
        0.5, "1", "half of a convolution's channels, of which healthy ones have hardly any dead"
    )
    dense_share: float = threshold(
        0.65,
        "1",
        "of a dense layer's units: behind another ReLU about half of them are born off (0.3 to "
        "0.62 measured on digits), and the rest does the work",
    )
    dense_sigmas: float = threshold(
        3.0,
        "standard deviations",
        "a dense layer must also exceed 0.5 by this many binomial ones, sqrt(0.25 / units)",
    )
    critical_share: float = threshold(
        0.9, "1", "what is left can hardly carry the signal of a layer"
    )
    detail_frames: int = threshold(
        3, "detail frames", "one frame is chance: LoRA's A has gradient 0 at its first step"
    )
    lookback_frames: int = threshold(
        5, "detail frames", "those that one dead_fraction looks back on: the agent's constant"
    )
    steps: int = threshold(
        15, "steps", "a head used each 10th step has gradient 0 for 9 of them, and is not dead"
    )
    underflow_rms: float = threshold(
        1e-18, "1", "below this the squares in a float32 norm underflow: vanishing, not dead"
    )
    zero_loss: float = threshold(
        1e-12, "1", "a margin loss that has reached 0 leaves no gradient, and nothing is wrong"
    )


class DeadLayers(NamedTuple):
    """What was seen of the chain's links at the last detail frames."""

    places: list[int]  # in window.layers, the input's first
    share: NDArray[np.float64]  # [detail frames, n] of units that are dead
    frames: NDArray[np.int64]  # [detail frames] row of each in the window
    flagged: NDArray[np.bool_]  # [n] dead units enough, for long enough
    silenced: NDArray[np.bool_]  # [n] exactly 0 only because a layer nearer to the output is dead
    suspected: NDArray[np.bool_]  # [n] dead units enough now, however briefly


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Layers with many dead units, the one nearest to the output first.

    When a whole layer is dead, every layer before it gets exactly 0 as well: one story, told of
    the last dead layer in order of depth.
    """
    sound = sound_part(window)
    dead = dead_layers(sound, settings)
    origins = np.flatnonzero(dead.flagged & ~dead.silenced)[::-1]
    if not len(origins):
        return None
    now = dead.share[-1]
    names = tuple(sound.layers[dead.places[link]].name for link in origins)
    firsts = [_first_row(sound, dead, link, settings) for link in origins]
    # The layer that died first leads; of those that died together, the one nearest to the output.
    lead = min(range(len(origins)), key=lambda number: firsts[number])
    names = (names[lead], *(name for number, name in enumerate(names) if number != lead))
    origin = int(origins[lead])
    units = sound.layers[dead.places[origin]].shape[0]
    dead_now = round(min(float(now[origin]), 1.0) * units)
    worst = float(now[origins].max())
    step = int(sound.steps[firsts[lead]])
    starved = int(dead.silenced.sum())
    evidence: dict[str, float | int | str] = {
        "dead units": f"{dead_now} of {units}",
        "share": round(float(now[origin]), 4),
        "since step": step,
    }
    if starved:
        evidence["layers before it left without gradient"] = starved
    consequence = f"; the {starved} layers before it get no gradient" if starved > 1 else ""
    if starved == 1:
        consequence = "; the layer before it gets no gradient"
    others = f" (and {len(names) - 1} more layers)" if len(names) > 1 else ""
    return Finding(
        kind="dead_units",
        severity=Severity.CRITICAL if worst >= settings.critical_share else Severity.WARNING,
        layers=names,
        first_step=step,
        last_step=int(sound.steps[-1]),
        summary=(
            f"{dead_now} of {units} units of {names[0]}{others} have had a gradient of exactly 0 "
            f"since step {step}{consequence}."
        ),
        evidence=evidence,
    )


def dead_layers(sound: Window, settings: Thresholds) -> DeadLayers:
    """Which weight layers are dead, and which are only silenced by one. sound: finite steps."""
    return sound.once(_dead_layers, settings)


def _dead_layers(sound: Window, settings: Thresholds) -> DeadLayers:
    fractions = sound.statistic("dead_fraction")
    norms = sound.statistic("norm")
    known = np.logical_or.reduce(~np.isnan(fractions), axis=0)
    measured = [place for place in sound.of_layers(_by_unit) if known[place]]
    frames = np.flatnonzero((~np.isnan(fractions[:, measured])).any(axis=1))
    none = np.zeros(len(measured), dtype=np.bool_)
    if not len(frames):
        return DeadLayers(measured, np.zeros((0, len(measured))), frames, none, none, none)
    recent = frames[-settings.lookback_frames :]
    raw = np.clip(fractions[frames][:, measured].astype(np.float64), 0.0, 1.0)
    # Between detail frames the norm knows better: a head used each 10th step is not dead.
    alive_since = (norms[recent[0] :][:, measured] > 0).any(axis=0)
    raw = np.where(alive_since & (raw >= 1.0), 0.0, raw)
    share = _confirmed(sound, measured, frames, raw)
    limit = _limit(sound, measured, settings)
    suspected = (share[-1] >= limit) & ~_underflowed(sound, measured, recent, settings)
    zero = raw[-1] >= 1.0
    whole = suspected & (share[-1] >= 1.0)
    # Which outputs get a gradient is the loss's doing, so the last layer counts as a whole only.
    suspected[-1] = whole[-1]
    if whole[-1:].all() and _loss_is_zero(sound, recent, settings):
        return DeadLayers(measured, share, frames, none, none, none)
    if whole.any():
        # Behind a dead layer only biases speak: what is dead there died of it.
        suspected &= whole | (np.arange(len(measured)) < np.flatnonzero(whole)[0])
    silenced = none.copy()
    reached = False  # by the shadow of a dead layer nearer to the output
    for link in range(len(measured) - 1, -1, -1):
        silenced[link] = reached and bool(zero.item(link))
        reached = bool(zero.item(link)) and (reached or bool(whole.item(link)))
    flagged = suspected & _lasting(sound, frames, share >= limit, settings)
    return DeadLayers(measured, share, frames, flagged, silenced, suspected)


def _by_unit(layers: Layers) -> list[int]:
    """Places of the weight layers whose rows are units, the input's first."""
    # A transposed convolution's first dimension is its input, so its rows say nothing of its units.
    return [
        place for place in links_of(layers) if not layers[place].module.startswith("ConvTranspose")
    ]


def _limit(sound: Window, measured: list[int], settings: Thresholds) -> NDArray[np.float64]:
    """The share of dead units from which each layer is told. float64[n]."""
    shapes = [sound.layers[place].shape for place in measured]
    units = np.array([max(shape[0], 1) for shape in shapes], dtype=np.float64)
    dense = np.array([len(shape) == 2 for shape in shapes], dtype=np.bool_)
    chance = 0.5 + settings.dense_sigmas * np.sqrt(0.25 / units)
    # A layer that is dead as a whole is told however small it is.
    return np.where(dense, np.clip(chance, settings.dense_share, 1.0), settings.share)


def _lasting(
    sound: Window, frames: NDArray[np.int64], enough: NDArray[np.bool_], settings: Thresholds
) -> NDArray[np.bool_]:
    """Links with enough dead units now and for enough steps. enough: bool[frames, n]; bool[n]."""
    below = ~enough
    # Detail frames since the last one with too few; all of them where there is none.
    streak = np.where(below.any(axis=0), below[::-1].argmax(axis=0), len(below))
    start = np.maximum(len(below) - streak - (settings.lookback_frames - 1), 0)
    since = sound.steps[frames[np.minimum(start, len(below) - 1)]]
    long_enough = sound.steps[-1] - since >= settings.steps
    return (streak > 0) & long_enough & (len(below) >= settings.detail_frames)


def _confirmed(
    sound: Window, measured: list[int], frames: NDArray[np.int64], raw: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Share of units whose bias agrees that they are dead. float64[detail frames, n].

    A row of zeros can also come from an input that is 0 (behind a dead layer) or from a pruning
    mask; then the unit's bias still has a gradient.
    """
    biases = _biases(sound, measured)
    has = biases >= 0
    said = sound.statistic("zero_fraction")[frames][:, biases[has]]
    alive = sound.statistic("norm")[frames][:, biases[has]] > 0
    said = np.where(np.isnan(said) & alive, 0.0, said)
    share = raw.copy()
    share[:, has] = np.fmin(share[:, has], said)
    return np.nan_to_num(share, nan=0.0)


def _biases(sound: Window, measured: list[int]) -> NDArray[np.int64]:
    """Place of each measured layer's bias, -1 for none. int64[n]."""
    return sound.of_layers(_bias_of)[measured]


def _bias_of(layers: Layers) -> NDArray[np.int64]:
    """Place of each layer's bias, -1 for none and for what is no weight layer. int64[layers]."""
    found = np.full(len(layers), -1, dtype=np.int64)
    found[links_of(layers)] = bias_places_of(layers)
    return found


def _underflowed(
    sound: Window, measured: list[int], recent: NDArray[np.int64], settings: Thresholds
) -> NDArray[np.bool_]:
    """Links whose nearest gradient towards the output is too small for float32. bool[n]."""
    usual = median(rms(sound, recent))
    biases = _biases(sound, measured)
    size = np.fmax(usual[measured], np.where(biases >= 0, usual[biases], np.nan))
    # The nearest layer from here to the output that has a gradient; none is no underflow.
    known = np.where(size > 0, np.arange(len(size)), len(size))
    nearest = np.minimum.accumulate(known[::-1])[::-1]
    return np.append(size, np.inf)[nearest] < settings.underflow_rms


def _loss_is_zero(sound: Window, recent: NDArray[np.int64], settings: Thresholds) -> bool:
    loss = sound.scalar("loss")[recent[0] :]
    known = loss[~np.isnan(loss)]
    return bool(len(known)) and float(np.median(np.abs(known))) <= settings.zero_loss


def _first_row(sound: Window, dead: DeadLayers, link: int, settings: Thresholds) -> int:
    """Row of the window at which this link's units died."""
    limit = _limit(sound, [dead.places[link]], settings)[0]
    start = onset(dead.share[:, link] >= limit, 1.0)
    row = int(dead.frames[start if start is not None else -1])
    if dead.share[-1, link] >= 1.0:
        # dead_fraction looks back over several frames, so the norm knows the step earlier.
        gone = onset(sound.statistic("norm")[:, dead.places[link]] == 0, 1.0)
        row = min(row, gone) if gone is not None else row
    return row
