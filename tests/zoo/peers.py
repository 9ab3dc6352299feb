"""The rules that peers publish, written anew on the same frames, as a baseline to beat.

Thresholds are those of their documentation and defaults; what they measure of activations or of
single elements is taken from the nearest statistic of a frame, as each rule says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.chain import broken_steps, chain_of, links, total_norm
from gradwatch.health.window import Window

Floats = NDArray[np.float64]


class Peer(NamedTuple):
    """A set of rules, and the kinds of finding that they claim to tell."""

    name: str
    kinds: frozenset[str]
    judge: Callable[[Window], set[str]]


def _measured(window: Window, statistic: str) -> Floats:
    """Rows in which a statistic was measured, for the weight layers. [rows, n]."""
    values = window.statistic(statistic)[:, links(window)].astype(np.float64)
    return values[np.isfinite(values).any(axis=1)]


def _losses(window: Window) -> Floats:
    loss = window.scalar("loss")
    return loss[np.isfinite(loss)]


def sagemaker_debugger(window: Window) -> set[str]:
    """Its built-in rules, from the public rule documentation."""
    found: set[str] = set()
    mean = _measured(window, "mean_abs")
    moved = _measured(window, "update_ratio")
    loss = _losses(window)
    if len(mean) and (mean[-1] < 1e-7).any():
        found.add("vanishing")
    if broken_steps(window).any():
        found.add("non_finite")  # ExplodingTensor looks for NaN and Inf
    dead = _measured(window, "dead_fraction")
    if len(dead) and (dead[-1] > 0.5).any():
        found.add("dead_units")
    if len(moved) and (moved[-1] > 10).any():
        found.add("learning_rate_too_high")
    if len(moved) and (moved[-1] < 1e-8).any():
        found.add("learning_rate_too_low")
    if len(moved) >= 3 and (moved[-3:] < 1e-5).all(axis=0).any():
        found.add("never_updated")
    std = _measured(window, "std")
    early = len(window.steps) and window.steps[-1] <= 10
    # 5th to 95th percentile of a normal distribution: 3.29 standard deviations.
    if early and len(std) and (3.29 * std < 0.001).any():
        found.add("poor_initialisation")
    if len(loss) > 10 and not loss[-1] < loss[-11]:
        found.add("plateau")
    return found


def autotrainer(window: Window) -> set[str]:
    """AUTOTRAINER (ICSE 2021): the defaults of its repository."""
    found: set[str] = set()
    chain = chain_of(window)
    loss = _losses(window)
    if len(chain.layers) > 1 and len(chain.rms):
        first, last = float(chain.rms[-1, 0]), float(chain.rms[-1, -1])
        if last > 0 and first / last < 1e-3 and first < 1e-4:
            found.add("vanishing")
        if last > 0 and first / last > 70:
            found.add("exploding")
    if broken_steps(window).any():
        found.add("non_finite")
    zeros = _measured(window, "zero_fraction")
    if len(zeros) and (zeros[-1] > 0.7).any():
        found.add("dead_units")
    recent = loss[-50:]
    if len(recent) > 10:
        swings = np.abs(np.diff(recent)) > 0.03
        turns = np.diff(np.sign(np.diff(recent))) != 0
        if (swings[1:] & turns).mean() > 0.2:
            found.add("oscillation")
        if len(loss) >= 50 and loss[:5].mean() - loss[-5:].mean() < 0.01:
            found.add("plateau")
    return found


def trainpulse(window: Window) -> set[str]:
    """trainpulse 0.4."""
    found: set[str] = set()
    loss, total = _losses(window), total_norm(window)
    if len(loss) > 50 and loss[-1] > 5 * loss[-51:-1].mean():
        found.add("loss_spike")
    if len(total) and total[-1] > 100:
        found.add("exploding")
    if len(total) and 0 < total[-1] < 1e-7:
        found.add("vanishing")
    if broken_steps(window).any():
        found.add("non_finite")
    if len(loss) > 100 and np.ptp(loss[-100:]) < 1e-5:
        found.add("plateau")
    return found


def gradscope(window: Window) -> set[str]:
    """gradscope 0.1."""
    found: set[str] = set()
    norms = window.statistic("norm")[:, links(window)].astype(np.float64)
    if len(norms) and (norms[-1] < 1e-8).any():
        found.add("vanishing")
    if len(norms) and (norms[-1] > 1e3).any():
        found.add("exploding")
    total = total_norm(window)
    if len(total) > 20:
        mean = total[0]
        for value in total[1:-1]:
            mean = 0.95 * mean + 0.05 * value
        past = total[-21:-1]
        if total[-1] > 5 * mean or total[-1] > past.mean() + 4 * past.std():
            found.add("loss_spike")
    if broken_steps(window).any():
        found.add("non_finite")
    return found


def teaching_table(window: Window) -> set[str]:
    """Near 0 in early layers, 100 times larger there, always 0, NaN."""
    found: set[str] = set()
    chain = chain_of(window)
    if len(chain.layers) > 1 and len(chain.rms):
        first, last = float(chain.rms[-1, 0]), float(chain.rms[-1, -1])
        if first < 1e-6:
            found.add("vanishing")
        if last > 0 and first > 100 * last:
            found.add("exploding")
        if len(chain.rms) >= 5 and (chain.rms[-5:] == 0).all(axis=0).any():
            found.add("dead_units")
    if broken_steps(window).any():
        found.add("non_finite")
    return found


USUAL = ("vanishing", "exploding", "non_finite")
PEERS: tuple[Peer, ...] = (
    Peer(
        "SageMaker Debugger",
        frozenset(
            {
                "vanishing",
                "non_finite",
                "dead_units",
                "learning_rate_too_high",
                "learning_rate_too_low",
                "never_updated",
                "poor_initialisation",
                "plateau",
            }
        ),
        sagemaker_debugger,
    ),
    Peer("AUTOTRAINER", frozenset({*USUAL, "dead_units", "oscillation", "plateau"}), autotrainer),
    Peer("trainpulse", frozenset({*USUAL, "loss_spike", "plateau"}), trainpulse),
    Peer("gradscope", frozenset({*USUAL, "loss_spike"}), gradscope),
    Peer("teaching table", frozenset({*USUAL, "dead_units"}), teaching_table),
)
