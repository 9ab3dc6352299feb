from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.learning_rate_too_high import detect
from gradwatch.health.window import Window

from .windows import mlp, window, with_loss

STEPS = 100
TIME = np.arange(STEPS)


def job(
    moved: NDArray[np.float64], weight: NDArray[np.float64], loss: NDArray[np.float64]
) -> Window:
    """Updates / weights, norm of the weights / at first, and losses. Each float64[STEPS]."""
    base = window(
        mlp(3), 1e-2, steps=STEPS, weight_norm=6.4 * weight[:, None], update_ratio=moved[:, None]
    )
    return with_loss(base, loss + 0.02 * np.cos(TIME * 2.4))


STUCK = np.full(STEPS, 2.3)
LARGE_AT_FIRST = np.where(TIME < 6, 0.15, 0.01)
EXTREME_AT_FIRST = np.where(TIME < 3, 0.9, 0.01)


def test_large_updates_that_left_the_weights_grown_are_told() -> None:
    assert detect(job(LARGE_AT_FIRST, np.where(TIME < 6, 1.0, 2.0), STUCK)) is not None
    assert detect(job(np.full(STEPS, 0.15), np.ones(STEPS), STUCK)) is not None


def test_large_first_steps_that_left_nothing_behind_are_not_once_the_loss_begins_to_fall() -> None:
    falling = np.linspace(2.3, 2.25, STEPS)
    assert detect(job(LARGE_AT_FIRST, np.ones(STEPS), falling)) is None
    assert detect(job(LARGE_AT_FIRST, np.ones(STEPS), STUCK)) is not None


def test_first_weights_that_are_gone_altogether_are_told_though_the_loss_falls_a_little() -> None:
    grown = np.where(TIME < 3, 1.0, 10.0)
    leap = np.where(TIME == 4, 2.0, 0.0)
    little, far = np.linspace(2.3, 1.7, STEPS), np.linspace(2.3, 0.3, STEPS)
    assert detect(job(EXTREME_AT_FIRST, grown, little + leap)) is not None
    assert detect(job(EXTREME_AT_FIRST, grown, far + leap)) is None
    assert detect(job(EXTREME_AT_FIRST, np.sqrt(grown), little + leap)) is None
    assert detect(job(EXTREME_AT_FIRST, grown, little)) is None  # as of weights that begin near 0


def test_a_policys_loss_says_nothing_of_what_was_learnt() -> None:
    grown = np.where(TIME < 6, 1.0, 2.0)
    assert detect(job(LARGE_AT_FIRST, grown, STUCK - 2.3)) is None
