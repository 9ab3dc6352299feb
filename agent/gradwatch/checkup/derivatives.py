"""Checks of gradients against finite differences, in float64 and along random directions.

Along a direction u the slope is <gradient, u>, and about (f(x + hu) - f(x - hu)) / 2h. One
direction meets every element, so an error anywhere shows, whatever the number of weights; a second
one shows it where the first happens to be as steep by both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradwatch.checkup.functions import stops_gradient
from gradwatch.checkup.objective import CannotRepeatError
from gradwatch.checkup.observation import FunctionCall, Observation, Training
from gradwatch.checkup.trees import tensors_in
from gradwatch.checkup.trying import trial_of
from gradwatch.checkup.verdict import Verdict, advice, gravest, passed, skipped, wrong
from gradwatch.checkup.words import listed
from gradwatch.health.reference_mismatch import Thresholds, error_of

# As an audit by finite differences has it: one number, one reason.
TOLERANCE = Thresholds().finite_difference
# Two steps, relative to the size of what is moved: where their slopes differ, as with the kink of a
# ReLU in between, neither is known, and another direction is tried.
STEPS = (1e-7, 1e-6)
DIRECTIONS = 4
AGREEING = 2
# Weights are moved by this much of their size first: zeros that were put there on purpose, as in a
# residual branch, put activations exactly on the kink of a ReLU, where there is no slope.
SHIFT = 0.01
# Layers that are looked at one by one, once the model as a whole is wrong.
MAX_LAYERS = 60


class Slopes(NamedTuple):
    """A slope as backward() computes it, and as two finite differences do."""

    analytic: float
    numeric: float
    other: float

    @property
    def error(self) -> float:
        return relative_error(self.analytic, self.numeric)

    @property
    def known(self) -> bool:
        """Whether the finite differences agree, so that they can be relied on.

        Where both are 0 the value may be rounded to a coarser type than its weights.
        """
        flat = self.numeric == self.other == 0 != self.analytic
        return not flat and relative_error(self.numeric, self.other) <= TOLERANCE


def relative_error(a: float, n: float) -> float:
    """|a - n| / (|a| + |n| + 1e-8)."""
    return error_of(abs(a - n), abs(a), abs(n))


def functions(seen: Observation) -> Verdict:
    """The backward of every custom autograd.Function that was called."""
    if not seen.functions:
        return skipped("no custom autograd.Function was called")
    return gravest([_function(call) for call in seen.functions])


def model(seen: Observation) -> Verdict:
    """The gradient of the whole loss by all weights, and by which layers it is wrong."""
    if not seen.trainings:
        return skipped("no optimizer stepped")
    return gravest([_model(seen, training) for training in seen.trainings])


def slopes_of(value: Callable[[], Tensor], points: Sequence[Tensor]) -> Slopes:
    """Slopes of a scalar along random directions: the worse of the first two in which they are
    known, or any if there is none."""
    known: list[Slopes] = []
    slopes = _slopes_along(value, points, 0)
    for seed in range(1, DIRECTIONS):
        known += [slopes] if slopes.known else []
        if len(known) == AGREEING:
            break
        slopes = _slopes_along(value, points, seed)
    known += [slopes] if slopes.known and len(known) < AGREEING else []
    return max(known, key=lambda each: each.error, default=slopes)


def _slopes_along(value: Callable[[], Tensor], points: Sequence[Tensor], seed: int) -> Slopes:
    """Slopes of a scalar along one random direction of all the points, which are left unchanged."""
    generator = torch.Generator().manual_seed(seed)
    directions = [
        torch.randn(point.shape, generator=generator, dtype=torch.float64).to(point)
        for point in points
    ]
    gradients: Any = torch.autograd.grad(value(), points, allow_unused=True)
    analytic = sum(
        float((gradient * direction).sum())
        for gradient, direction in zip(gradients, directions, strict=True)
        if gradient is not None
    )
    size = max(float(torch.stack([point.detach().abs().mean() for point in points]).mean()), 1e-3)
    return Slopes(
        analytic, *(_difference(value, points, directions, step * size) for step in STEPS)
    )


def _shift(points: Iterable[Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for point in points:
            noise = torch.randn(point.shape, generator=generator, dtype=torch.float64).to(point)
            point += SHIFT * max(float(point.abs().mean()), SHIFT) * noise


def _difference(
    value: Callable[[], Tensor], points: Sequence[Tensor], directions: Sequence[Tensor], step: float
) -> float:
    kept = [point.detach().clone() for point in points]
    found: list[float] = []
    for side in (step, -step):
        with torch.no_grad():
            for point, origin, direction in zip(points, kept, directions, strict=True):
                point.copy_(origin + side * direction)
        found.append(float(value().detach()))
    with torch.no_grad():
        for point, origin in zip(points, kept, strict=True):
            point.copy_(origin)
    return (found[0] - found[1]) / (2 * step)


def slopes_of_function(call: FunctionCall) -> Slopes | None:
    """Slopes of a custom function, its outputs weighted at random, in float64.

    None for one that was given nothing that needs a gradient. Raises what the function raises when
    it is called in float64.
    """
    doubles = [_double(item) for item in call.arguments]
    points = [item for item in doubles if isinstance(item, Tensor) and item.requires_grad]
    if not points:
        return None
    weights: list[Tensor] = []

    def value() -> Tensor:
        # A clone, so that a function that works in place spoils no leaf.
        given = [item.clone() if isinstance(item, Tensor) else item for item in doubles]
        made = [
            item
            for item in tensors_in(call.function.apply(*given))
            if item.is_floating_point() and item.requires_grad
        ]
        if not weights:
            generator = torch.Generator().manual_seed(1)
            weights.extend(
                torch.randn(item.shape, generator=generator, dtype=torch.float64).to(item)
                for item in made
            )
        return torch.stack(
            [(item * weight).sum() for item, weight in zip(made, weights, strict=True)]
        ).sum()

    return slopes_of(value, points)


def _function(call: FunctionCall) -> Verdict:
    name = call.function.__name__
    try:
        slopes = slopes_of_function(call)
        if slopes is None:
            return skipped(f"{name} was given nothing that needs a gradient")
        same = _returns_its_input(call)
    except Exception as error:
        return skipped(f"{name} cannot be called in float64: {_line(error)}")
    if slopes.error <= TOLERANCE:
        return passed(f"{name}: relative error {slopes.error:.1g}", error=slopes.error)
    if slopes.numeric == slopes.other == 0 and slopes.analytic != 0:
        return advice(
            f"{name} is flat and has a gradient: a straight-through estimate",
            "Fine if it is meant, as for rounding and signs.",
        )
    if same:
        return advice(
            f"{name} returns its input and changes its gradient",
            "Fine if it is meant, as for gradient reversal.",
        )
    if not slopes.known:
        return skipped(f"{name} is not smooth where it was called")
    return wrong(
        f"the backward of {name} gives a slope of {slopes.analytic:.6g}; finite differences give "
        f"{slopes.numeric:.6g}",
        "Work its derivative out again, and hold it by a test with torch.autograd.gradcheck.",
        analytic=slopes.analytic,
        numeric=slopes.numeric,
        error=slopes.error,
    )


def _model(seen: Observation, training: Training) -> Verdict:
    if seen.gradient_stopped or _stops(training):
        return skipped("the job stops gradients on purpose (detach), which differences do not see")
    try:
        trial = trial_of(training, torch.float64)
        mine = {id(item) for item in training.held if item.requires_grad} - _padded(training)
        weights = {
            key: tensor
            for key, tensor in trial.weights.items()
            if key in mine and tensor.is_floating_point()
        }
        if not weights:
            return skipped("the optimizer holds no weight that the loss depends on")
        _shift(weights.values())
        slopes = slopes_of(trial.loss, list(weights.values()))
        if not slopes.known or slopes.analytic != slopes.analytic:
            return skipped("the loss is not smooth or not precise enough to tell")
        if slopes.error <= TOLERANCE:
            return passed(f"relative error {slopes.error:.1g}", error=slopes.error)
        names = {id(layer.parameter): layer.name for layer in training.layers}
        faulty = [
            names.get(key, "a tensor without a name")
            for key, tensor in list(weights.items())[:MAX_LAYERS]
            if (found := slopes_of(trial.loss, [tensor])).known and found.error > TOLERANCE
        ]
    except (CannotRepeatError, RuntimeError, TypeError) as error:
        return skipped(f"the step cannot be made again in float64: {_line(error)}")
    if any(call.function for call in seen.functions) and not faulty:
        return skipped("the layers one by one are right: see the custom functions")
    where = f" in {listed(faulty)}" if faulty else ""
    return wrong(
        f"the gradient's slope is {slopes.analytic:.6g}, finite differences give "
        f"{slopes.numeric:.6g}: wrong{where}",
        "Look at custom backward methods, .data, no_grad and in-place changes after these layers.",
        analytic=slopes.analytic,
        numeric=slopes.numeric,
        error=slopes.error,
    )


def _padded(training: Training) -> set[int]:
    """Embeddings whose padding row gets no gradient, on purpose."""
    return {
        id(layer.parameter)
        for layer in training.layers
        if getattr(layer.module, "padding_idx", None) is not None
    }


def _stops(training: Training) -> bool:
    return any(
        stops_gradient(call.function)
        for objective in training.objectives
        for call in objective.calls
    )


def _double(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return item
    double = item.detach().clone()
    if double.is_floating_point():
        double = double.double()
    return double.requires_grad_(item.requires_grad)


def _returns_its_input(call: FunctionCall) -> bool:
    doubles = [_double(item) for item in call.arguments]
    given = [item.detach().clone() if isinstance(item, Tensor) else item for item in doubles]
    made = next(tensors_in(call.function.apply(*given)), None)
    return made is not None and any(
        isinstance(item, Tensor) and item.shape == made.shape and torch.equal(item, made.to(item))
        for item in doubles
    )


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
