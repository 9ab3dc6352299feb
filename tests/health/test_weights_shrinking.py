from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.weights_shrinking import detect
from gradwatch.health.window import Window

from .windows import mlp, window, with_loss

STEPS = 200


def job(left: NDArray[np.float64], moved: NDArray[np.float64], loss: NDArray[np.float64]) -> Window:
    """Weights with this part of their norm left, and these updates. Each float64[STEPS]."""
    base = window(
        mlp(3),
        1e-2,
        steps=STEPS,
        weight_rms=0.1,
        weight_norm=6.4 * left[:, None],
        update_ratio=moved[:, None],
    )
    return with_loss(base, loss)


MELTING = 0.3 + 0.7 * np.exp(-np.arange(STEPS) / 50)
DECAY = 1 - MELTING[1:] / MELTING[:-1]
STILL = 2.3 + 0.05 * np.cos(np.arange(STEPS) * 2.4)
FALLING = STILL * np.linspace(1.0, 0.75, STEPS)


def test_weights_that_melt_while_nothing_is_learnt_are_told() -> None:
    assert detect(job(MELTING, np.full(STEPS, 0.05), STILL)) is not None


def test_decay_that_moves_the_weights_is_told_though_something_is_learnt() -> None:
    driven = np.append(DECAY[0], DECAY) * 1.1
    finding = detect(job(MELTING, driven, FALLING))
    assert finding is not None
    assert finding.first_step < 30
    assert detect(job(MELTING, 4 * driven, FALLING)) is None


def test_decay_is_no_matter_where_the_loss_has_fallen_far() -> None:
    learnt = STILL * np.linspace(1.0, 0.3, STEPS)
    assert detect(job(MELTING, np.append(DECAY[0], DECAY) * 1.1, learnt)) is None
