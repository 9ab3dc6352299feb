"""NaN or Inf in a gradient or in the loss: the step and the layer where it began."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch.health.finding import Finding, Severity
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window


@dataclass(frozen=True)
class Thresholds:
    """When non-finite values are told."""

    elements: int = threshold(
        1, "elements", "one NaN is enough: the optimizer's moments and the weights keep it"
    )


def detect(window: Window, settings: Thresholds = Thresholds()) -> Finding | None:
    """The first step with a non-finite gradient or loss.

    Backward runs from the output, so of the layers hit at that step the deepest was hit first.
    """
    counts = window.statistic("nonfinite")
    hit = (counts >= settings.elements) | np.isinf(window.statistic("absmax"))
    broken_loss = window.broken_scalar("loss")
    broken = hit.any(axis=1) | broken_loss
    if not broken.any():
        return None
    first = int(np.flatnonzero(broken)[0])
    last = int(np.flatnonzero(broken)[-1])
    step = int(window.steps[first])
    places = sorted(
        np.flatnonzero(hit[first]).tolist(),
        key=lambda place: (
            window.layers[place].depth,
            window.layers[place].role == "weight",
            place,
        ),
        reverse=True,
    )
    names = tuple(window.layers[place].name for place in places)
    with_gradient = int((hit[first] | ~np.isnan(window.statistic("norm")[first])).sum())
    elements = int(np.nan_to_num(counts[first], nan=0.0, posinf=0.0).sum(dtype=np.float64))
    loss = float(window.scalar("loss")[first])
    evidence: dict[str, float | int | str] = {
        "first step": step,
        "layers hit at that step": f"{len(names)} of {with_gradient}",
        "non-finite elements": elements,
        "loss at that step": _word(loss, bool(broken_loss[first])),
        "steps hit since": int(broken.sum()),
    }
    return Finding(
        kind="non_finite",
        severity=Severity.CRITICAL,
        layers=names,
        first_step=step,
        last_step=int(window.steps[last]),
        summary=_summary(step, names, with_gradient, elements),
        evidence=evidence,
    )


def _word(loss: float, broken: bool) -> float | str:
    if np.isfinite(loss):
        return loss
    if np.isinf(loss):
        return "inf" if loss > 0 else "-inf"
    return "NaN" if broken else "not logged"


def _summary(step: int, names: tuple[str, ...], with_gradient: int, elements: int) -> str:
    if not names:
        return f"The loss became NaN or Inf at step {step}; the gradients are still finite."
    if len(names) == with_gradient:
        return (
            f"NaN or Inf in all {len(names)} layers at once at step {step} ({elements:,} "
            f"elements): it came from the loss, or from an operation after {names[0]}."
        )
    return (
        f"NaN or Inf began in {names[0]} at step {step} and reached {len(names)} of "
        f"{with_gradient} layers ({elements:,} elements)."
    )
