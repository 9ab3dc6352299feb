"""Checks that train: on copies, on one batch, with the random numbers of the first step."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from gradwatch.checkup import optimizers
from gradwatch.checkup.objective import CannotRepeatError, Trial
from gradwatch.checkup.observation import Observation, Training
from gradwatch.checkup.trying import trial_of
from gradwatch.checkup.verdict import Verdict, advice, gravest, passed, skipped, wrong

# Steps on one batch of each of the rates, and at most so long for each: what is not known by then
# is not known.
MEMORY_STEPS = 200
MEMORY_RATES = (1e-3, 1e-2)
LONGEST_S = 60.0
# Shares of the first loss that have to go. Memorising takes nearly all away, but label smoothing
# keeps a fifth of ln 10, and a GAN's two halves or a noisy target more.
MEMORISED = 0.5
LEARNT = 0.05
# Steps with the job's own optimizer on one batch, which it sees again and again.
RATE_STEPS = 10
RATE_RISE = 1.2
CLIPPED = 0.98  # applied norm over computed norm, below which gradients were clipped
DROPOUTS = (torch.nn.modules.dropout._DropoutNd,)  # pyright: ignore[reportPrivateUsage]


def overfit(seen: Observation) -> Verdict:
    """Whether a copy of the model can learn one batch by heart."""
    if not seen.trainings:
        return skipped("no optimizer stepped")
    return gravest([_overfit(training) for training in seen.trainings])


def learning_rate(seen: Observation) -> Verdict:
    """Whether the job's own optimizer makes the loss of one batch fall."""
    if not seen.trainings or seen.own_optimizer:
        return skipped("needs the job's optimizer")
    return gravest([_learning_rate(training) for training in seen.trainings])


def _overfit(training: Training) -> Verdict:
    mine = {id(item) for item in training.held if item.requires_grad}
    first, best, steps = math.nan, math.inf, 0
    try:
        for rate in MEMORY_RATES:
            trial = trial_of(training)
            weights = [tensor for key, tensor in trial.weights.items() if key in mine]
            if not weights:
                return skipped("the optimizer holds no weight that the loss depends on")
            _without_dropout(trial)
            adam = torch.optim.Adam(weights, lr=rate)
            losses = _train(trial, weights, adam, MEMORY_STEPS, MEMORISED)
            first, steps = losses[0], max(steps, len(losses) - 1)
            if not math.isfinite(first):
                return skipped(f"the first loss is {first}")
            best = min(best, *(loss for loss in losses if math.isfinite(loss)))
            if _fallen(first, best) >= MEMORISED:
                break
    except (CannotRepeatError, RuntimeError) as error:
        return skipped(f"the step cannot be made again: {error}")
    told = f"the loss on one batch fell from {first:.3g} to {best:.3g} in {steps} steps"
    numbers = {"first": first, "best": best, "steps": steps}
    if first == 0 or _fallen(first, best) >= MEMORISED:
        return passed(told, **numbers)
    if steps < MEMORY_STEPS:
        return skipped(f"its steps take too long: {told}")
    if _fallen(first, best) >= LEARNT:
        return advice(
            f"{told}, and not by half",
            "Fine for a noisy target or a small model; else look at labels and at the loss.",
            **numbers,
        )
    return wrong(
        f"it does not learn one batch by heart: {told}",
        "Something between input, loss and weights is broken, and more data will not help: look "
        "at labels, at the loss, at softmax or sigmoid before it, at layers without gradient.",
        **numbers,
    )


def _learning_rate(training: Training) -> Verdict:
    try:
        trial = trial_of(training)
    except CannotRepeatError as error:
        return skipped(f"the step cannot be made again: {error}")
    optimizer = trial.optimizer
    if optimizer is None:
        return skipped("the optimizer cannot be copied")
    rate = float(optimizer.param_groups[0].get("lr", math.nan))
    weights = list(trial.weights.values())
    try:
        losses = _train(trial, weights, optimizer, RATE_STEPS, math.inf, _applied(training))
    except (CannotRepeatError, RuntimeError) as error:
        return skipped(f"the optimizer's steps cannot be repeated: {error}")
    first, last = losses[0], losses[-1]
    if not math.isfinite(first):
        return skipped(f"the first loss is {first}")
    limit = first + (RATE_RISE - 1) * max(abs(first), 1e-3)
    if not math.isfinite(last) or min(losses[-3:]) > limit:
        return wrong(
            f"at a rate of {rate:g} the loss on one batch goes from {first:.3g} to {last:.3g} "
            f"in {len(losses) - 1} steps",
            "Lower the learning rate by 10 to begin with, or warm it up and clip gradients.",
            rate=rate,
            first=first,
            last=last,
        )
    return passed(f"at a rate of {rate:g} the loss goes from {first:.3g} to {last:.3g}", rate=rate)


def _train(
    trial: Trial,
    weights: list[Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    enough: float,
    applied: float = math.inf,
) -> list[float]:
    """The losses of so many steps, fewer when enough of the first has gone or all is lost.

    applied: total norm of the gradients that the job's first step applied. Where it is less than
    what the loss gives, the job clips, and so do these steps.
    """
    losses: list[float] = []
    largest = math.inf
    inside = isinstance(optimizer, torch.optim.LBFGS)  # it computes gradients inside its steps

    def evaluate() -> Tensor:
        nonlocal largest
        for weight in weights:
            weight.grad = None
        loss = trial.loss()
        gradients: Any = torch.autograd.grad(loss, weights, allow_unused=True)
        total = torch.stack([item.norm().double() for item in gradients if item is not None]).norm()
        if not losses and not inside and applied < CLIPPED * float(total):
            largest = applied
        scale = min(1.0, largest / max(float(total), 1e-30))
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = None if gradient is None else gradient * scale
        losses.append(float(loss.detach()))
        return loss.detach()

    started = time.monotonic()
    for _ in range(steps):
        if not inside:
            evaluate()
        optimizers.step(optimizer, evaluate if inside else None)
        if (
            not math.isfinite(losses[-1])
            or _fallen(losses[0], losses[-1]) > enough
            or time.monotonic() - started > LONGEST_S
        ):
            break
    losses.append(float(trial.loss().detach()))
    return losses


def _fallen(first: float, last: float) -> float:
    """The share of a loss that has gone."""
    return (first - last) / abs(first) if first else 0.0


def _applied(training: Training) -> float:
    """The norm of the gradients that the job's first step applied: after its clipping."""
    if not training.gradients:
        return math.inf
    mine = {id(item) for item in training.held}
    total = math.sqrt(
        math.fsum(
            gradient.norm**2
            for layer, gradient in zip(training.layers, training.gradients[0], strict=True)
            if gradient.present and id(layer.parameter) in mine
        )
    )
    return total if math.isfinite(total) and total else math.inf


def _without_dropout(trial: Trial) -> None:
    """What is learnt by heart must be the same each time."""
    for outer in trial.modules:
        for module in outer.modules():
            if isinstance(module, DROPOUTS):
                module.eval()
