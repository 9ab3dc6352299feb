"""Making a step again: only where the repetition is known to be one."""

from __future__ import annotations

import math

import torch

from gradwatch.checkup.objective import CannotRepeatError, Trial
from gradwatch.checkup.observation import Training

# Autocast, which is not repeated, changes a loss by less.
SAME = 0.02


def trial_of(training: Training, dtype: torch.dtype | None = None) -> Trial:
    """The first step of a training, on fresh copies of everything.

    Raises CannotRepeatError when it cannot be made again or does not give the loss that it gave.
    """
    if training.problem is None:
        training.problem = _problem(training)
    if training.problem:
        raise CannotRepeatError(training.problem)
    return Trial(training.objectives, training.copied, dtype)


def _problem(training: Training) -> str:
    """Why a step cannot be repeated; empty when it can."""
    if not training.objectives:
        return "no backward pass led to its first step"
    expected = sum(objective.value for objective in training.objectives)
    try:
        trial = Trial(training.objectives, training.copied)
        loss = trial.loss()
        reached = set[int]().union(*(item.reached for item in training.objectives))
        if reached - trial.weights.keys() or not loss.requires_grad:
            return "some weights are used in ways that cannot be followed"
        got = float(loss.detach())
    except CannotRepeatError as error:
        return str(error)
    if not math.isfinite(expected) or not math.isfinite(got):
        return "" if math.isfinite(expected) == math.isfinite(got) else _differs(expected, got)
    return "" if abs(got - expected) <= SAME * max(abs(expected), 1e-3) else _differs(expected, got)


def _differs(expected: float, got: float) -> str:
    return f"made again, its loss is {got:.4g} instead of {expected:.4g}"
