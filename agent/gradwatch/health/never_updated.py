"""Layers that get a gradient and never move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import (
    is_stray,
    links,
    optimized,
    relative_size,
    sound_part,
    trainable,
)
from gradwatch.health.course import movement, typical
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.robust import median
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Layers, Window
from gradwatch.health.words import listed

SHORT = frozenset({"bfloat16", "float16"})


@dataclass(frozen=True)
class Thresholds:
    """When layers that never move are told."""

    frames: int = threshold(5, "frames", "fewest frames in which the layer had a gradient")
    steps: int = threshold(10, "steps", "fewest steps they span: a warm-up may begin at rate 0")
    detail_frames: int = threshold(
        3, "detail frames", "fewest over which the sampled weights stayed the same, bit by bit"
    )
    relative: float = threshold(
        1e-5, "1", "gradient / weight norm; below it an update may be lost to float32's rounding"
    )
    slowest: float = threshold(
        1e-6, "1", "update / weight of the whole network: below it float32 loses some updates"
    )
    zeros: float = threshold(
        0.5,
        "1",
        "part of a gradient that is exactly 0; beyond it the sample may hold none but weights of "
        "dead units, which stay the same beside others that move",
    )
    alike: float = threshold(
        0.1, "1", "gradient now / when it last moved; below this it may have converged"
    )


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Layers that the optimizer does not hold, or whose weights stay the same bit by bit."""
    sound = sound_part(window)
    norms = sound.statistic("norm")
    if len(sound.steps) < settings.frames or not len(sound.layers):
        return None
    if int(sound.steps[-1] - sound.steps[0]) + 1 < settings.steps:
        return None
    learning = _learning(norms, settings)
    asked, held = trainable(sound), optimized(sound)
    # Of two optimizers one alone may be watched: what moves has been given to the other.
    moves = (movement(sound).layers[-settings.detail_frames :] > 0).any(axis=0)
    forgotten = learning & asked & ~held & ~moves
    still, since = _still(sound, norms, settings)
    still &= learning & asked & held
    weights = links(sound)
    places = np.flatnonzero(forgotten | still)
    if not len(places):
        return None
    strays = tuple(
        layer.name
        for place, layer in enumerate(sound.layers)
        if is_stray(layer) and not learning[place]
    )
    # The last layer learns in any fine-tuning; a backbone may be left out of it on purpose. What
    # the optimizer holds in its place says that it was replaced.
    learnt = [place for place in weights if learning[place]]
    meant = not still.any() and not strays and bool(learnt) and not forgotten[learnt[-1]]
    order = sorted(places.tolist(), key=lambda place: (sound.layers[place].depth, place))
    names = tuple(sound.layers[place].name for place in order)
    begun = sound.steps[(norms > 0).argmax(axis=0)]
    first = int(min(since[place] if still[place] else begun[place] for place in order))
    rounded = still.any() and all(
        sound.layers[place].dtype in SHORT for place in order if still[place]
    )
    if forgotten.any():
        reason = "the optimizer does not hold them"
        if strays:
            reason += f", but {listed(strays)} that no model has any more"
    elif rounded:
        reason = f"each update is lost to the rounding of {sound.layers[order[0]].dtype}"
    else:
        reason = "their weights stayed the same bit by bit"
    return Finding(
        kind="never_updated",
        severity=Severity.INFO if meant else Severity.CRITICAL,
        layers=names,
        first_step=first,
        last_step=int(sound.steps[-1]),
        summary=f"{listed(names)} get gradients but never change: {reason}.",
        evidence={
            "layers that never change": f"{len(names)} of {int((asked & learning).sum())}",
            "not held by the optimizer": int(forgotten.sum()),
            "unchanged though held": int(still.sum()),
            **({"held, but in no model": ", ".join(strays[:4])} if strays else {}),
        },
    )


def _learning(norms: NDArray[np.float32], settings: Thresholds) -> NDArray[np.bool_]:
    """Layers that get a gradient nearly always, since their first one. bool[layers]."""
    recent = norms[-max(settings.frames, len(norms) // 2) :]
    got = recent > 0
    # A layer that came while training is asked since then.
    there = np.maximum.accumulate(got, axis=0).sum(axis=0)
    return (there >= settings.frames) & (got.sum(axis=0) >= 0.8 * there)


def _dense(layers: Layers) -> NDArray[np.bool_]:
    """Layers of which every step uses all rows. bool[layers]."""
    return np.array([layer.role != "embedding" for layer in layers], dtype=np.bool_)


def _still(
    sound: Window, norms: NDArray[np.float32], settings: Thresholds
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Layers whose sampled weights have not moved lately, and since when. bool, int64[layers]."""
    moved = movement(sound)
    still = np.zeros(len(sound.layers), dtype=np.bool_)
    since = np.full(len(sound.layers), int(sound.steps[0]), dtype=np.int64)
    rate = sound.scalar("lr")[moved.rows]
    known = moved.steps[np.isfinite(moved.layers).any(axis=1)]
    if len(known) < settings.detail_frames:
        return still, since
    measured = np.isfinite(moved.layers)
    moving = measured & (moved.layers > 0)
    count = len(moved.rows)
    # Row of the last movement, -1 for none; what was measured since then was rest.
    last = np.where(moving.any(axis=0), count - 1 - moving[::-1].argmax(axis=0), -1)
    resting = measured & (np.arange(count)[:, None] > last)
    still = resting.sum(axis=0) >= settings.detail_frames
    still &= sound.of_layers(_dense)
    # A rate of 0 is another story, and so is one so small that float32 rounds most updates away.
    if 0 < typical(moved.ratio) < settings.slowest:
        still &= np.array([layer.dtype in SHORT for layer in sound.layers], dtype=np.bool_)
    still &= ~(resting & (rate == 0)[:, None]).any(axis=0)
    zeros = sound.statistic("zero_fraction")[moved.rows]
    still &= ~((zeros > settings.zeros) & resting).any(axis=0)
    places = np.flatnonzero(still)
    still[places] = median(relative_size(sound, places.tolist())) >= settings.relative
    for place in np.flatnonzero(still & (last >= 0)).tolist():
        row = int(last[place])
        before = float(median(norms[: moved.rows[row] + 1, place]))
        after = float(median(norms[moved.rows[row] :, place]))
        # Of what the rate ever was: a schedule that ran out is another story.
        slower = (
            rate[np.flatnonzero(resting[:, place])[-1]] < settings.alike * rate[: row + 1].max()
        )
        still[place] = after >= settings.alike * before and not slower
        since[place] = moved.steps[row]
    return still, since
