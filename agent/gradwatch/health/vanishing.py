"""Vanishing gradients: the chain's first layers get almost nothing of what the last ones get."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.health import dead_units
from gradwatch.health.chain import Chain, chain_of, sound_part
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.robust import median, onset
from gradwatch.health.thresholds import threshold
from gradwatch.health.window import Window

DEAD_UNITS = dead_units.Thresholds()


@dataclass(frozen=True)
class Thresholds:
    """When vanishing gradients are told."""

    ratio: float = threshold(
        1e-3,
        "1",
        "element RMS of early / late weight layers; AUTOTRAINER (ICSE 2021) uses the same, and "
        "healthy residual networks of 50 blocks stay above 1e-2",
    )
    critical_ratio: float = threshold(
        1e-6, "1", "near float32's relative precision: the weights cannot move at all"
    )
    relative: float = threshold(
        1e-4, "1", "gradient norm / weight norm; above it the layer still learns"
    )
    bias_relative: float = threshold(
        1e-7,
        "1",
        "the same where only the biases' gradients fall towards the input, as behind batch-norm "
        "they do by design",
    )
    leading_layers: int = threshold(
        2, "layers", "one small first layer is an input scale or an adapter; a chain starves more"
    )
    share: float = threshold(0.8, "1", "part of the recent frames that show it")
    recent_frames: int = threshold(50, "frames", "the present: what has healed is not told")
    frames: int = threshold(5, "frames", "fewest frames to judge from")
    steps: int = threshold(10, "steps", "fewest steps they span: zero initialisation needs a few")
    recovery: float = threshold(
        3.0,
        "1",
        "growth within the recent frames that says it heals by itself; a starving chain's ratio "
        "wanders by less than 2",
    )


def detect(
    window: Window,
    settings: Thresholds = Thresholds(),
    of_dead_units: dead_units.Thresholds = DEAD_UNITS,
) -> Finding | None:
    """Leading weight layers whose gradient is tiny relative to the last layers and the weights."""
    sound = sound_part(window)
    dead = dead_units.dead_layers(sound, of_dead_units)
    chain = _explained_by_nothing_else(chain_of(sound), dead, settings)
    count = len(chain.layers)
    if len(sound.steps) < settings.frames or count < settings.leading_layers + 1:
        return None
    if int(sound.steps[-1] - sound.steps[0]) + 1 < settings.steps:
        return None
    recent = slice(max(len(sound.steps) - settings.recent_frames, 0), None)

    ratio, bias_ratio, starved = _starved(chain, recent, settings)
    lasting = starved.mean(axis=0) >= settings.share
    leading = int(np.argmin(np.append(lasting, False)))
    if leading < settings.leading_layers:
        return None
    # A ratio rises too where the last layers get less and less.
    if _heals(ratio[:, 0], settings) and _heals(chain.rms[recent][:, 0], settings):
        return None
    first = onset(_starved(chain, slice(None), settings)[2][:, 0], settings.share)
    row = first if first is not None else len(sound.steps) - 1
    typical = np.fmin(median(ratio), median(bias_ratio))
    smallest = float(np.nanmin(typical[:leading]))
    relative = float(median(chain.relative[recent])[0])
    names = chain.names[:leading]
    evidence: dict[str, float | int | str] = {
        "smallest early / late ratio": float(f"{smallest:.3g}"),
        "starved layers": f"{leading} of {count}",
        "gradient RMS of the first layer": float(f"{float(median(chain.rms[recent])[0]):.3g}"),
        "gradient RMS of the last layer": float(f"{float(median(chain.rms[recent])[-1]):.3g}"),
    }
    if not np.isnan(relative):
        evidence["gradient / weight norm of the first layer"] = float(f"{relative:.3g}")
    return Finding(
        kind="vanishing",
        severity=Severity.CRITICAL if smallest <= settings.critical_ratio else Severity.WARNING,
        layers=names,
        first_step=int(sound.steps[row]),
        last_step=int(sound.steps[-1]),
        summary=(
            f"The first {leading} of {count} weight layers ({names[0]} first) get "
            + (f"down to {smallest:.1g}" if smallest > 0 else "less than float32 can hold")
            + " of the gradient that the last ones get."
        ),
        evidence=evidence,
    )


def _explained_by_nothing_else(
    chain: Chain, dead: dead_units.DeadLayers, settings: Thresholds
) -> Chain:
    """The links that have a gradient and lie after every layer with dead units."""
    recent = chain.rms[-settings.recent_frames :]
    keep = np.isnan(recent).mean(axis=0) <= 0.5 if len(recent) else np.zeros(0, dtype=np.bool_)
    if len(keep) != len(chain.layers):
        keep = np.zeros(len(chain.layers), dtype=np.bool_)
    # What is dead in part still passes gradient on.
    whole = dead.suspected & (dead.share[-1] >= 1.0) if len(dead.share) else dead.suspected
    silent = {dead.places[link] for link in np.flatnonzero(whole | dead.silenced)}
    last_dead = max(
        (place for place, layer in enumerate(chain.layers) if layer in silent), default=-1
    )
    keep[: last_dead + 1] = False
    return chain.only(keep)


def _starved(
    chain: Chain, rows: slice, settings: Thresholds
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Each link's RMS, and its bias's, relative to the late ones; whether it starves. [rows, n]."""
    count = len(chain.layers)
    late = slice(count - max(count // 3, 1), None)
    ratio, bias_ratio = _ratio(chain.rms[rows], late), _ratio(chain.bias_rms[rows], late)
    relative = chain.relative[rows]
    small = ~(relative > settings.relative)  # unknown weights do not speak against it
    starved = (ratio <= settings.ratio) & small
    starved |= (bias_ratio <= settings.ratio) & (relative <= settings.bias_relative)
    return ratio, bias_ratio, starved


def _ratio(values: NDArray[np.float32], late: slice) -> NDArray[np.float64]:
    """Each link's RMS relative to the typical late link of the same step. [steps, n]."""
    known = (values[:, late] > 0) & np.isfinite(values[:, late])
    reference = median(np.where(known, values[:, late], np.nan).T)[:, None]
    with np.errstate(over="ignore"):
        return values / reference


def _heals(sizes: NDArray[np.floating], settings: Thresholds) -> bool:
    """Whether the first layer's gradient grows fast enough to leave the matter by itself.

    sizes: its RMS, alone or relative to the last layers. [steps].
    """
    part = max(len(sizes) // 5, 1)
    before, after = float(median(sizes[:part])), float(median(sizes[-part:]))
    return after > 0 and after >= settings.recovery * before
