"""Replicas that are not the same any more: weights that differ between ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window
from gradwatch.health.words import kept, listed, spoken


@dataclass(frozen=True)
class Thresholds:
    """When replicas that differ are told."""

    distance: float = threshold(
        1e-5, "1", "of the weights' norm: replicas are equal bit by bit, a probe rounds at 1e-6"
    )
    frames: int = threshold(2, "comparisons", "in a row that show it, where the distance is small")
    at_once: float = threshold(
        1e-3, "1", "of the weights' norm: no rounding comes near it, so one comparison is enough"
    )
    alike: float = threshold(
        1e-3,
        "1",
        "difference of gradient norms that proves replicas where nothing declares them: local "
        "layers of the same name and start, as pipeline stages have, get gradients of their own",
    )


class _Apart(NamedTuple):
    """Replicas that differ now. k: comparisons; n: layers."""

    layers: NDArray[np.intp]  # those that differ, where it began first
    rows: NDArray[np.bool_]  # [k, n], the comparisons since a layer was equal last that differ
    equal: NDArray[np.bool_]  # [k, n]
    returned: bool  # all of them were equal again once, after they had differed


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """Layers that were equal on all ranks, and differ since."""
    if "weight_drift" not in window.statistics:
        return None
    table = window.statistic("weight_drift").astype(np.float64)
    met = np.flatnonzero(np.isfinite(table).any(axis=1))
    if not len(met):
        return None
    steps, distance = window.steps[met], table[met]
    apart = _apart(window, met, distance, settings)
    if apart is None:
        return None
    shown = apart.rows[:, apart.layers]
    rows = np.flatnonzero(shown.any(axis=1))
    names = tuple(window.layers[place].name for place in apart.layers)
    now = float(np.nanmax(distance[rows[-1], apart.layers]))
    before = np.flatnonzero(apart.equal[: rows[0], apart.layers[0]])
    who, evidence = _ranks(window, met[rows])
    severity = Severity.CRITICAL if now >= settings.at_once else Severity.WARNING
    return Finding(
        kind="rank_drift",
        severity=Severity.INFO if apart.returned else severity,
        layers=names,
        first_step=int(steps[rows[0]]),
        last_step=int(window.steps[-1]),  # until the next comparison nothing says otherwise
        summary=(
            f"{listed(names)} should be the same on every rank and "
            f"{'differs' if len(names) == 1 else 'differ'} since step {int(steps[rows[0]]):,}, "
            f"by {_share(now)}{who}."
        ),
        evidence={
            **evidence,
            "layers that differ": f"{len(names)} of {distance.shape[1]}",
            "distance / norm": kept(min(now, 1.0)),
            "equal last at step": int(steps[before[-1]]),
        },
    )


def _apart(
    window: Window, met: NDArray[np.intp], distance: NDArray[np.float64], settings: Thresholds
) -> _Apart | None:
    known = np.isfinite(distance)
    equal = known & (distance <= settings.distance)
    spread = window.statistic("norm_spread")[met]
    declared = np.array(["Replicate" in layer.sharding for layer in window.layers], dtype=np.bool_)
    # One rank without any gradient is the fault itself; two different ones are two layers.
    proven = equal & (declared | (spread <= settings.alike) | (spread >= 1))
    order = np.arange(len(met))[:, None]
    last_equal = np.where(equal, order, -1).max(axis=0)
    rows = known & ~equal & (order > last_equal)
    told = rows.sum(axis=0) >= settings.frames
    told |= (rows & (distance >= settings.at_once)).any(axis=0)
    places = np.flatnonzero(told & proven.any(axis=0))
    if not len(places):
        return None
    began = rows.argmax(axis=0)
    ordered = sorted(places.tolist(), key=lambda p: (began[p], window.layers[p].depth, p))
    # Averaged away and begun anew: local SGD means it so, and a repair looks the same.
    returned = (known & ~equal & (order < last_equal)).any(axis=0)[places].all()
    return _Apart(np.array(ordered, dtype=np.intp), rows, equal, bool(returned))


def _ranks(window: Window, rows: NDArray[np.intp]) -> tuple[str, dict[str, float | int | str]]:
    """Which rank it is, as far as the comparisons agree: for the summary, and as evidence."""
    alone, moving, still = (
        _agreed(window.scalar(name)[rows]) for name in ("rank_apart", "rank_moving", "rank_still")
    )
    evidence: dict[str, float | int | str] = {}
    if alone is not None:
        evidence["rank that stands apart"] = alone
    if moving is not None:
        evidence["only rank that updates some"] = moving
    if still is not None:
        evidence["only rank that does not update some"] = still
    if moving is not None and alone in (None, moving):
        return f": rank {moving} alone updates some of them", evidence
    if still is not None and alone in (None, still):
        return f": rank {still} does not update some of them", evidence
    return f": rank {alone} stands apart" if alone is not None else "", evidence


def _share(distance: float) -> str:
    """A distance in words: beyond the norm itself a probe tells no more than that."""
    return f"{spoken(distance)} of their norm" if distance < 1 else "as much as their norm"


def _agreed(ranks: NDArray[np.float64]) -> int | None:
    """The rank that most of the comparisons name."""
    known = ranks[np.isfinite(ranks)]
    if not len(known):
        return None
    found, counts = np.unique(known, return_counts=True)
    return int(found[counts.argmax()]) if 2 * counts.max() > len(ranks) else None
