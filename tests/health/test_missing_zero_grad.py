from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gradwatch.health.missing_zero_grad import Thresholds, detect
from gradwatch.health.window import Window

from .windows import mlp, window, with_loss

STEPS = 40


def gradients(seed: int, common: float) -> NDArray[np.float64]:
    """Independent batches' gradients of eight layers with a part in common. [steps, layers, 64]."""
    chance = np.random.default_rng(seed)
    usual = chance.normal(size=(8, 64))
    return common * usual + chance.normal(size=(STEPS, 8, 64))


def job(each: NDArray[np.float64], noise: float = 0.1, seed: int = 0) -> Window:
    """A window with these gradients, and losses of batches that differ by `noise`."""
    sizes = 1e-2 * np.linalg.norm(each, axis=2)
    losses = 2.0 + noise * np.random.default_rng(seed).normal(size=STEPS)
    return with_loss(window(mlp(4), sizes, steps=STEPS), losses)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("common", [0.0, 0.5, 2.0])
def test_sums_of_gradients_are_told_and_the_gradients_themselves_are_not(
    seed: int, common: float
) -> None:
    each = gradients(seed, common)
    assert detect(job(each, seed=seed)) is None
    finding = detect(job(each.cumsum(axis=0), seed=seed))
    assert finding is not None
    assert finding.first_step == 1


@pytest.mark.parametrize("seed", range(10))
def test_sums_that_a_large_rate_swings_about_are_told(seed: int) -> None:
    """After a first leap they follow no power of the step, but they still change slowly."""
    each = gradients(seed, 0.3)
    leap = each.cumsum(axis=0) * np.where(np.arange(STEPS) > 0, 5.0, 1.0)[:, None, None]
    swing = 1 + 0.3 * np.sin(np.arange(STEPS) / 6)[:, None, None]
    assert detect(job(leap * swing, noise=0.5, seed=seed)) is not None


@pytest.mark.parametrize("seed", range(10))
def test_gradients_that_grow_as_learning_begins_are_no_sum(seed: int) -> None:
    growth = np.exp(np.arange(STEPS) / 12)[:, None, None]
    assert detect(job(growth * gradients(seed, 0.5), seed=seed)) is None


def test_gradients_that_grow_by_a_factor_a_step_are_no_sum() -> None:
    """As a generator's do: near a power on the whole, but their second step grows by too little."""
    sizes = np.repeat(1e-2 * np.exp(0.14 * np.arange(STEPS))[:, None], 8, axis=1)
    grown = with_loss(window(mlp(4), sizes, steps=STEPS), 2 - 0.01 * np.arange(STEPS)).until(14)
    assert detect(grown) is None
    assert detect(grown, Thresholds(start=0.1)) is not None
