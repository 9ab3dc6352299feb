"""One rank that all the others wait for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch.health.finding import Finding, Severity
from gradwatch.health.robust import median, onset
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import duration, kept, spoken


@dataclass(frozen=True)
class Thresholds:
    """When a slow rank is told."""

    ratio: float = threshold(
        2.0, "1", "its own time a step / the median of the others'; uneven data stays below 1.5"
    )
    least_s: float = threshold(
        3e-3, "s", "that it costs a step: so long Linux lets another program run at a time"
    )
    waiting: float = threshold(
        0.5,
        "1",
        "part of the difference that the others wait for it; those that wait for nobody "
        "do not train together",
    )
    frames: int = threshold(2, "comparisons", "the last in a row; each is a median of 20 steps")
    share: float = threshold(0.8, "1", "of the comparisons since it began that name this rank")
    warm_up: int = threshold(10, "steps", "first ones, in which memory and caches are filled")


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """The same rank needs far longer than the others, comparison after comparison."""
    rank = window.scalar("rank_slowest")
    slow, others = window.scalar("rank_slowest_s"), window.scalar("rank_others_s")
    known = np.isfinite(rank) & np.isfinite(slow) & np.isfinite(others)
    rows = np.flatnonzero(known & (window.steps > settings.warm_up))
    if len(rows) < settings.frames:
        return None
    rank, slow, others = rank[rows], slow[rows], others[rows]
    flags = (rank == rank[-1]) & (slow >= settings.ratio * others)
    flags &= slow - others >= settings.least_s
    flags &= window.scalar("rank_others_wait_s")[rows] >= settings.waiting * (slow - others)
    if not flags[-settings.frames :].all():
        return None
    began = onset(flags, settings.share)
    if began is None:
        return None
    late = slice(began, None)
    time_s, others_s = float(median(slow[late])), float(median(others[late]))
    first, last = int(window.steps[rows[began]]), int(window.steps[-1])
    times = spoken(time_s / others_s) if others_s > 0 else "many"
    return Finding(
        kind="straggler",
        severity=Severity.WARNING,
        layers=(),
        first_step=first,
        last_step=last,
        summary=(
            f"Rank {int(rank[-1])} needs {duration(time_s)} a step, {times} times as long as the "
            f"others, who wait for it since step {first:,}."
        ),
        evidence={
            "slow rank": int(rank[-1]),
            "its own time a step": duration(time_s),
            "the others' own time a step": duration(others_s),
            "lost a step, s": kept(time_s - others_s),
            "comparisons that show it": f"{int(flags[late].sum())} of {len(flags[late])}",
        },
    )
