"""A loss that leaps far out of its range, and mostly comes back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch.health.chain import sound_part, total_norm
from gradwatch.health.course import course
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, spoken


@dataclass(frozen=True)
class Thresholds:
    """When a loss spike is told."""

    excess: float = threshold(
        8.0, "1", "leap above the recent median / the largest such leap of the losses before"
    )
    less_excess: float = threshold(
        3.0, "1", "the same where the gradient norm leaps beyond all that it was before"
    )
    before: int = threshold(20, "frames", "losses before it, which say what is usual")
    gap: float = threshold(
        10.0, "1", "steps since the last loss / the usual: over more, a slow rise is no leap"
    )
    lookback: int = threshold(100, "frames", "how many of them are asked")
    start: float = threshold(
        0.5,
        "1",
        "the leap / the fall since the first losses: hard batches of a solved task leap less",
    )
    norm: float = threshold(
        5.0, "1", "gradient norm in the three frames from the leap on / its median before"
    )
    norm_record: float = threshold(
        6.0, "1", "the same / the largest of the frames before, where less excess is enough"
    )


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """The largest leap of the loss in view, if the gradients leap with it."""
    known = course(window)
    loss, count = known.loss, len(known.loss)
    if count <= settings.before:
        return None
    # Candidates are new maxima: of a leap and its decay the first is asked.
    leaps = np.flatnonzero(np.diff(loss) > 0) + 1
    leaps = leaps[leaps >= settings.before]
    # Over a gap in the recording a loss may have risen as slowly as it likes.
    gaps = np.diff(known.steps)
    leaps = leaps[gaps[leaps - 1] <= settings.gap * float(np.median(gaps))]
    if not len(leaps):
        return None
    rise = loss[leaps] - loss[leaps - 1]
    for place in leaps[np.argsort(-rise)[:3]].tolist():
        past = loss[max(place - settings.lookback, 0) : place]
        usual = float(np.median(past))
        leap = float(loss[place]) - usual
        reach = float(past[len(past) // 4 :].max()) - usual
        times = leap / max(reach, 1e-6 * abs(usual), 1e-12)
        if times < settings.less_excess:
            continue
        # Of a window without the run's start the first part tells the level it came from.
        fall = float(np.median(loss[:5])) - usual
        great = times >= settings.excess and leap >= settings.start * fall
        found = _finding(window, place, usual, leap, reach, great, settings)
        if found is not None:
            return found
    return None


def _finding(
    window: Window,
    place: int,
    usual: float,
    leap: float,
    reach: float,
    great: bool,
    settings: Thresholds,
) -> Finding | None:
    known, sound = course(window), sound_part(window)
    step = int(known.steps[place])
    sizes = total_norm(sound)
    row = int(np.searchsorted(sound.steps, step))
    if not 0 < row < len(sizes):
        return None
    before = sizes[max(row - settings.lookback, 0) : row]
    past, record = float(np.median(before)), float(before[len(before) // 4 :].max())
    peak = float(sizes[row : row + 3].max())
    if not ((great and peak >= settings.norm * past) or peak >= settings.norm_record * record):
        return None
    after = known.loss[place + 1 :]
    limit = usual + max(3 * reach, 0.05 * leap)
    back = np.flatnonzero(after <= limit)
    healed = len(back) > 0 and (after[back[0] :] <= limit).mean() >= 0.5
    last = int(known.steps[place + 1 + back[0]]) if healed else int(known.steps[-1])
    rate = sound.scalar("lr")
    evidence: dict[str, float | int | str] = {
        "loss before": kept(usual),
        "loss at the spike": kept(usual + leap),
        "gradient norm / its median before": kept(peak / past) if past > 0 else "infinity",
    }
    leapt = row > 0 and rate[max(row - 2, 0) : row + 1].max() > 3 * np.median(rate[:row])
    if leapt:
        evidence["learning rate then"] = kept(float(rate[max(row - 2, 0) : row + 1].max()))
    if healed:
        fate = f"It was back after {last - step} steps"
    elif len(after) < 5:
        fate = "Whether it comes back is not known yet"
    else:
        fate = "It has not come back"
    return Finding(
        kind="loss_spike",
        severity=Severity.WARNING,
        layers=(),
        first_step=step,
        last_step=last,
        summary=(
            f"At step {step} the loss leapt from {spoken(usual)} to {spoken(usual + leap)}"
            + (", as the learning rate did. " if leapt else ". ")
            + f"{fate}."
        ),
        evidence=evidence,
    )
