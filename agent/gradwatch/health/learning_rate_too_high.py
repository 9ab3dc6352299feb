"""Updates so large that they throw the weights away, and a loss that is no better for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import broken_steps, sound_part, total_norm
from gradwatch.health.course import (
    Course,
    Movement,
    Outcome,
    course,
    movement,
    noise,
    outcome,
)
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.robust import middle
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, spoken


@dataclass(frozen=True)
class Thresholds:
    """When a learning rate that is too high is told."""

    ratio: float = threshold(
        0.1,
        "1",
        "update / weight of one step; 0.001 is usual, and 0.3 passes in healthy first steps",
    )
    extreme: float = threshold(0.5, "1", "half of the weights replaced by one step")
    early_steps: int = threshold(30, "steps", "in which a rate that is too high shows itself")
    lasting: int = threshold(2, "detail frames", "fewest that show it, unless one is extreme")
    steps: int = threshold(20, "steps", "time that the loss has to fall all the same")
    last: int = threshold(10, "frames", "those that stand for the present")
    grown: float = threshold(
        4.0, "1", "weight norm now / at first; healthy networks double theirs in a short run"
    )
    relapse: float = threshold(
        0.3, "1", "part of the loss's fall that it has lost again, with weights that grew so"
    )
    gain: float = threshold(
        3.5, "standard errors", "fall of the loss since the first steps that shows that it learns"
    )
    thrown: float = threshold(
        1.15, "1", "weight norm now / at first, unless updates are too large still: what they left"
    )
    hint: float = threshold(
        1.0, "standard errors", "fall that is waited for where nothing of large updates is left"
    )
    ruined: float = threshold(
        5.0, "1", "weight norm after the first steps / at first: nothing is left of those weights"
    )
    leap: float = threshold(1.3, "1", "largest loss of those steps / the first that goes with it")
    learnt: float = threshold(
        0.6, "1", "loss now / at first that excuses even that: frequencies alone bring some fall"
    )
    far: float = threshold(
        1.0, "1", "rise above the first loss, beside that loss, that is a divergence and no bounce"
    )


class Verdict(NamedTuple):
    """Whether updates are too large, and what became of the loss."""

    first: int  # step of the first update that was too large
    largest: float
    result: Outcome
    bounces: bool  # up and down about where it began, rather than up and away or stuck
    diverged: bool


def judged(window: Window, settings: Thresholds) -> Verdict | None:
    """Too large updates with nothing learnt; None otherwise."""
    return window.once(_judged, settings)


def _judged(window: Window, settings: Thresholds) -> Verdict | None:
    sound = sound_part(window)
    if not len(sound.steps):
        return None
    known, moved = course(window), movement(sound)
    result = outcome(window, last=max(settings.last, len(known.loss) // 4))
    large = too_large(moved, settings)
    broken = bool(broken_steps(window)[-1]) and known.from_start and len(known.loss) > 0
    if broken and large.any():
        # It ended in NaN: what the last losses were says nothing any more.
        start, now = float(known.loss[0]), float(known.loss[-1])
        result = Outcome(start, now, now, now, 0.0)
        return Verdict(
            _origin(sound, moved, large), float(moved.ratio[large].max()), result, False, True
        )
    if result is None or int(sound.steps[-1]) < settings.steps:
        return None
    ruined = _ruined(moved, known, result, settings)
    learns = result.gain >= settings.gain
    if ruined:
        learns &= result.now <= settings.learnt * result.start
    if not large.any():
        large = _grown(moved, known, result, settings)
    elif learns:
        return None
    if not large.any():
        return None
    rise = result.now - result.start
    scale = max(abs(result.start), 1e-12)
    swing = result.high - result.low
    diverged = rise > settings.far * scale
    # RMSprop's and Adam's first steps are large; small weights may pass through them unharmed.
    thrown = moved.weight[-1] >= settings.thrown * moved.weight[0] or large[-1]
    if not thrown and result.gain >= settings.hint:
        return None
    moving = bool((moved.ratio[-2:] > 1e-4).any())
    # What has thrown all weights away does not merely cross a valley.
    bounces = moving and not (diverged or ruined) and swing > 0.15 * scale
    bounces = bounces and result.low < result.start
    return Verdict(
        _origin(sound, moved, large), float(moved.ratio[large].max()), result, bounces, diverged
    )


def _origin(sound: Window, moved: Movement, large: NDArray[np.bool_]) -> int:
    """The step whose update was the first too large one: it shows at the next detail frame.

    Of the steps between two detail frames, the one after which the gradients grew most.
    """
    place = max(int(np.flatnonzero(large)[0]), 1)
    first, last = int(moved.rows[place - 1]), int(moved.rows[min(place, len(moved.rows) - 1)])
    sizes = total_norm(sound)[first : last + 1]
    if len(sizes) < 3:
        return int(sound.steps[first])
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.nan_to_num(np.diff(np.log(sizes)), nan=-np.inf)
    return int(sound.steps[first + int(growth.argmax())])


def _ruined(moved: Movement, known: Course, result: Outcome, settings: Thresholds) -> bool:
    """Whether the first steps left nothing of the first weights, and threw the loss up.

    Weights that begin near 0, as those of a linear model may, grow as far without harm.
    """
    early = moved.weight[moved.steps <= settings.early_steps]
    if not len(early):
        return False
    peak = known.loss[known.steps <= settings.early_steps].max()
    gone = min(early[-1], moved.weight[-1]) >= settings.ruined * early[0] > 0
    return bool(gone) and float(peak) >= settings.leap * result.start


def _grown(
    moved: Movement, known: Course, result: Outcome, settings: Thresholds
) -> NDArray[np.bool_]:
    """Detail frames with weights far beyond their first size, if the loss has relapsed. bool[m]."""
    none = np.zeros(len(moved.ratio), dtype=np.bool_)
    if len(known.loss) < 60 or len(moved.weight) < 4:
        return none
    grown = moved.weight >= settings.grown * moved.weight[0]
    if not grown[-1]:
        return none
    blocks = np.array([middle(block) for block in np.array_split(known.loss, 10)])
    best, now = float(blocks[1:].min()), middle(known.loss[-len(known.loss) // 10 :])
    fall = result.start - best
    error = 1.25 * noise(known.loss) / (len(known.loss) / 10) ** 0.5
    relapsed = now - best > max(settings.relapse * fall, 4 * error)
    return grown & np.isfinite(moved.ratio) if relapsed else none


def too_large(moved: Movement, settings: Thresholds) -> NDArray[np.bool_]:
    """Detail frames whose update is too large, if they are enough. bool[m]."""
    shrinking = np.full(len(moved.ratio), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Weights that only shrink are moved by their decay, whatever the gradient says.
        gap = np.maximum(np.diff(moved.steps), 1)
        shrinking[1:] = 1 - (moved.weight[1:] / moved.weight[:-1]) ** (1 / gap)
        decay = shrinking >= 0.5 * moved.ratio
        large = (moved.ratio >= settings.ratio) & ~decay
        extreme = (moved.ratio >= settings.extreme) & ~decay
    early = moved.steps <= settings.early_steps
    enough = (large & early).sum() >= settings.lasting or (extreme & early).any()
    late = large[-4:]
    enough = enough or (len(late) == 4 and bool(late.all()))
    return large if enough else np.zeros_like(large)


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Weights thrown away by updates, with the loss far above its start, or stuck."""
    found = judged(window, settings)
    if found is None or found.bounces:
        return None
    sound, result = sound_part(window), found.result
    fate = (
        f"the loss has gone from {spoken(result.start)} to {spoken(result.now)}"
        if found.diverged
        else f"the loss is stuck at {spoken(result.now)}"
    )
    rate = sound.scalar("lr")
    evidence: dict[str, float | int | str] = {
        "largest update / weight": kept(found.largest),
        "first loss": kept(result.start),
        "loss now": kept(result.now),
    }
    if np.isfinite(rate).any():
        evidence["learning rate"] = kept(float(np.nanmax(rate)))
    return Finding(
        kind="learning_rate_too_high",
        severity=Severity.CRITICAL,
        layers=(),
        first_step=found.first,
        last_step=int(sound.steps[-1]),
        summary=(
            f"One step changed the weights by {spoken(100 * found.largest)} % (since step "
            f"{found.first}), and {fate}."
        ),
        evidence=evidence,
    )
