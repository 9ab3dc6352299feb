from __future__ import annotations

import numpy as np
import pytest

from gradwatch.health.plateau import detect
from gradwatch.health.window import Window

from .windows import mlp, window, with_loss

STEPS = 300


def stuck(noise: float, level: float = 2.3, seed: int = 0) -> Window:
    """Losses that vary about their start by `noise` times its size."""
    chance = np.random.default_rng(seed)
    losses = level + abs(level) * noise * chance.normal(size=STEPS)
    return with_loss(window(mlp(3), np.full(6, 1e-2), steps=STEPS), losses)


@pytest.mark.parametrize("seed", range(10))
def test_a_loss_that_stays_where_it_began_is_told(seed: int) -> None:
    assert detect(stuck(0.02, seed=seed)) is not None


def test_losses_that_vary_by_half_their_size_hide_whatever_they_do() -> None:
    assert [detect(stuck(0.6, seed=seed)) for seed in range(10)] == [None] * 10


@pytest.mark.parametrize("level", [0.0, -0.5])
def test_a_loss_that_is_below_zero_at_first_measures_nothing(level: float) -> None:
    base = stuck(0.02)
    assert detect(with_loss(base, base.scalars["loss"] - 2.3 + level)) is None
