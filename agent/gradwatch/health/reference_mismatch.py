"""A gradient that is not what a reference computes of the same numbers: told by audits.

No frame shows it: whoever judges must say what was compared. It stands while the newest comparison
of a layer, on the same rank and by the same method, is beyond its tolerance.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Compared, Window
from gradwatch.health.words import kept, listed, spoken

KIND = "reference_mismatch"
FINITE_DIFFERENCE = "finite_difference"
# Below this a gradient is as good as 0, and so is any difference.
FLOOR = 1e-8
# Layers whose numbers are evidence; the summary counts the others.
MAX_SHOWN = 5
METHODS = {
    "reference": "the reference engine in float64",
    FINITE_DIFFERENCE: "finite differences in float64",
}
# What has the precision of another type, or no more than that.
_ALIKE = {"complex64": "float32", "complex128": "float64"}


@dataclass(frozen=True)
class Thresholds:
    """Relative errors that are allowed, by the type that the job computed in."""

    float64: float = threshold(
        1e-5, "1", "|a - n| / (|a| + |n|): rounding gives 1e-12, a wrong formula 0.01 and more"
    )
    float32: float = threshold(
        1e-2, "1", "|a - n| / (|a| + |n|): rounding gives 1e-6, in TF32 1e-3; a wrong sign gives 1"
    )
    float16: float = threshold(
        1e-1, "1", "|a - n| / (|a| + |n|), and for types that are shorter: rounding gives 1e-3"
    )
    bfloat16: float = threshold(1e-1, "1", "|a - n| / (|a| + |n|): rounding gives 1e-2")
    finite_difference: float = threshold(
        1e-3,
        "1",
        "|a - n| / (|a| + |n|) in float64, whatever the job's type: rounding and curvature give "
        "1e-6; the kink of a ReLU within the step lies in between",
    )


def tolerance_of(method: str, dtype: str, settings: Thresholds = Thresholds()) -> float:
    """The relative error that is allowed. method: of METHODS. dtype: the job's, as "float32"."""
    if method == FINITE_DIFFERENCE:
        return settings.finite_difference
    name = _ALIKE.get(dtype, dtype)
    known = {
        "float64": settings.float64,
        "float32": settings.float32,
        "bfloat16": settings.bfloat16,
    }
    return known.get(name, settings.float16)


class Difference(NamedTuple):
    """How far a gradient is from its reference."""

    relative_error: float  # from 0 to 1, of the elements that are finite in both
    nonfinite: int  # elements of the gradient that are NaN or Inf
    reference_nonfinite: int  # and of the reference


def difference(gradient: NDArray[Any], reference: NDArray[Any]) -> Difference:
    """||a - n|| / (||a|| + ||n|| + 1e-8) of a layer's gradient a and its reference n, as a whole.

    By norms and not by the worst element: one whose terms cancel is wrong by the rounding of the
    terms, however right its formula, and would need a tolerance that hides everything else.
    Raises ValueError where the shapes differ.
    """
    if gradient.shape != reference.shape:
        raise ValueError(f"a gradient of shape {gradient.shape}, a reference of {reference.shape}")
    wide = np.complex128 if np.iscomplexobj(gradient) or np.iscomplexobj(reference) else np.float64
    a, n = gradient.astype(wide).ravel(), reference.astype(wide).ravel()
    mine, other = np.isfinite(a), np.isfinite(n)
    a, n = a[mine & other], n[mine & other]
    # Scaled, for the squares of large numbers overflow.
    scale = float(max(np.abs(a).max(initial=0.0), np.abs(n).max(initial=0.0)))
    error = 0.0
    if scale > 0:
        a, n = a / scale, n / scale
        norms = [float(np.linalg.norm(each)) for each in (a - n, a, n)]
        error = min(1.0, error_of(norms[0], norms[1], norms[2], FLOOR / scale))
    return Difference(error, int((~mine).sum()), int((~other).sum()))


def error_of(apart: float, a: float, n: float, floor: float = FLOOR) -> float:
    """A difference relative to two sizes: apart / (a + n + floor)."""
    return apart / (a + n + floor)


def is_right(compared: Compared, settings: Thresholds = Thresholds()) -> bool:
    """Whether a gradient is within its tolerance, and as finite as its reference."""
    allowed = _allowed(compared, settings)
    # NaN is within nothing.
    return compared.error <= allowed and compared.nonfinite == compared.reference_nonfinite


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """The layers whose newest comparison is beyond its tolerance."""
    wrong = _wrong(window.audits, settings)
    if not wrong:
        return None
    worst_of: dict[str, Compared] = {}
    began: dict[str, int] = {}
    for streak in wrong:
        layer = streak[0].layer
        began[layer] = min(began.get(layer, streak[0].step), streak[0].step)
        worst_of[layer] = max(worst_of.get(layer, streak[-1]), streak[-1], key=_gravity)
    names = tuple(sorted(began, key=lambda name: (began[name], *_order(worst_of[name]))))
    first = min(began.values())
    worst = min(worst_of.values(), key=_order)
    evidence: dict[str, float | int | str] = {
        "first step": first,
        "compared with": METHODS.get(worst.method, worst.method),
        "worst relative error": kept(worst.error),
        "its tolerance": _allowed(worst, settings),
    }
    for name in names[:MAX_SHOWN]:
        evidence[name] = _told(worst_of[name], settings)
    return Finding(
        kind=KIND,
        severity=Severity.CRITICAL,
        layers=names,
        first_step=first,
        last_step=max(streak[-1].step for streak in wrong),
        summary=(
            f"The gradient of {listed(names)} is not what {evidence['compared with']} "
            f"{'say' if worst.method == FINITE_DIFFERENCE else 'says'}: "
            f"{_told(worst, settings)}, since step {first:,}."
        ),
        evidence=evidence,
    )


def _wrong(audits: Iterable[Compared], settings: Thresholds) -> list[list[Compared]]:
    """Of each comparison that fails now its last failures in a row, in the order of steps."""
    by_place: dict[tuple[str, int, str], list[Compared]] = defaultdict(list)
    for each in audits:
        by_place[each.layer, each.rank, each.method].append(each)
    streaks = [_last_failures(by_place[place], settings) for place in sorted(by_place)]
    return [streak for streak in streaks if streak]


def _last_failures(compared: Sequence[Compared], settings: Thresholds) -> list[Compared]:
    newest_first = sorted(compared, key=lambda each: each.step, reverse=True)
    wrong = itertools.takewhile(lambda each: not is_right(each, settings), newest_first)
    return list(wrong)[::-1]


def _allowed(compared: Compared, settings: Thresholds) -> float:
    if compared.tolerance is not None:
        return compared.tolerance
    return tolerance_of(compared.method, compared.dtype, settings)


def _gravity(compared: Compared) -> float:
    """What is not finite at all weighs more than any error."""
    odd = compared.nonfinite != compared.reference_nonfinite or math.isnan(compared.error)
    return math.inf if odd else compared.error


def _order(compared: Compared) -> tuple[float, str, int, str]:
    """The worst first; of equals always the same one, in whatever order they came."""
    return -_gravity(compared), compared.layer, compared.rank, compared.method


def _told(compared: Compared, settings: Thresholds) -> str:
    limit = _allowed(compared, settings)
    allowed = spoken(limit, 1 if limit == float(f"{limit:.0e}") else 2)
    where = f"at step {compared.step:,}" + (f" on rank {compared.rank}" if compared.rank else "")
    if compared.nonfinite != compared.reference_nonfinite:
        return (
            f"{compared.nonfinite:,} elements are not finite, of the reference "
            f"{compared.reference_nonfinite:,}, {where}"
        )
    return f"relative error {spoken(compared.error)}, {allowed} is allowed, {where}"
