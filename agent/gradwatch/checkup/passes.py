"""Checks of one forward and one backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gradwatch.checkup.observation import LayerGradient, LossCall, Observation, Training
from gradwatch.checkup.verdict import Verdict, advice, gravest, passed, skipped, wrong
from gradwatch.checkup.words import listed

# How far above the loss of guessing a first loss may lie: torch's own initialisations give up to
# 1.1 times it. Beyond, the output starts large and wrong, and the first steps only shrink it.
ABOVE_CHANCE, MARGIN = 1.5, 0.5
# Gradients of the first third of the weight layers over the last third's, per element.
VANISHING, EXPLODING = 1e-4, 1e3
FEWEST_LAYERS = 4


def forward(seen: Observation) -> Verdict:
    """The forward pass comes to its end, and its outputs are finite."""
    if seen.error and not seen.no_graph:
        where = f" in {seen.module_in_error}" if seen.module_in_error else ""
        return wrong(f"it ends{where} with {seen.error}", "Read the error; the data checks help.")
    if not seen.models:
        return skipped("no model was called")
    for call in seen.models:
        if not call.finite:
            return wrong(
                f"the output of {type(call.module).__name__} holds NaN or infinity",
                "Look at inputs and weights first; gradwatch.watch(..., locate_nan=True) names "
                "the operation.",
            )
    return passed("all outputs are finite")


def chance(seen: Observation) -> Verdict:
    """The first loss against that of a network that guesses: ln of the number of classes."""
    firsts: dict[str, LossCall] = {}
    for call in seen.losses:
        if not math.isnan(call.value) and _guess(call):
            firsts.setdefault(call.name, call)
    if not firsts:
        return skipped("the loss has no known value for guessing")
    told: list[str] = []
    for call in firsts.values():
        guess = _guess(call)
        told.append(f"{call.value:.3g} at first, {guess:.3g} by guessing")
        if call.value > ABOVE_CHANCE * guess + MARGIN and call.cosines:
            return advice(
                f"{call.name} starts at {call.value:.3g}; guessing gives {guess:.3g}",
                "Fine for scaled cosines, as in metric learning; a smaller scale starts lower.",
                first=call.value,
                guess=guess,
            )
        if call.value > ABOVE_CHANCE * guess + MARGIN:
            return wrong(
                f"{call.name} starts at {call.value:.3g}; guessing gives {guess:.3g}",
                "The output starts large and wrong: scale the inputs, make the last layer's (or a "
                "tied embedding's) initial weights smaller, and see that labels fit.",
                first=call.value,
                guess=guess,
            )
    return passed(told[0])


def backward(seen: Observation) -> Verdict:
    """Gradients exist and are finite at every step that was seen."""
    if seen.no_graph:
        return wrong(
            "backward() was called on a loss that depends on no trainable weight",
            "Look for requires_grad_(False), detach, no_grad, .item or .data before the loss.",
        )
    broken = next((value for value in seen.values if not math.isfinite(value)), None)
    for training in seen.trainings:
        for gradients in training.gradients:
            names = [item.name for item in gradients if item.nonfinite]
            if names:
                return wrong(
                    f"gradients hold NaN or infinity in {listed(names)}",
                    "See the checks of inputs, of log and division, and of the learning rate; "
                    "gradwatch.watch(..., locate_nan=True) names the operation.",
                )
    if broken is not None:
        return wrong(f"the loss becomes {broken}", "See the learning rate and log and division.")
    if not any(training.gradients for training in seen.trainings):
        return skipped("no optimizer stepped")
    norms = [_total(training.gradients[0]) for training in seen.trainings if training.gradients]
    return passed("finite; norm " + ", ".join(f"{norm:.3g}" for norm in norms))


def gradient_range(seen: Observation) -> Verdict:
    """The size of gradients along the depth of the network, in the first steps."""
    return _worst(seen, _range_of)


def reached(seen: Observation) -> Verdict:
    """Trainable layers that get no gradient, or one of zeros at every step."""
    return _worst(seen, lambda training: _reached(seen, training))


def _worst(seen: Observation, check: Callable[[Training], Verdict]) -> Verdict:
    verdicts = [check(training) for training in seen.trainings if training.gradients]
    return gravest(verdicts) if verdicts else skipped("no optimizer stepped")


def _range_of(training: Training) -> Verdict:
    mine = {id(item) for item in training.held}
    steps = [step for step in training.gradients if len(step) == len(training.layers)]
    largest = [
        max((step[place].norm for step in steps if step[place].present), default=0.0)
        for place in range(len(training.layers))
    ]
    # The largest of the steps: behind a layer of zeros, as in an adapter, the first one has none.
    sizes = [
        norm / math.sqrt(layer.parameter.numel())
        for layer, norm in zip(training.layers, largest, strict=True)
        if layer.role == "weight" and norm and id(layer.parameter) in mine
    ]
    if len(sizes) < FEWEST_LAYERS or not all(map(math.isfinite, sizes)):
        return skipped("fewer than four weight layers with finite gradients")
    third = max(len(sizes) // 3, 1)
    early, late = float(np.median(sizes[:third])), float(np.median(sizes[-third:]))
    if late == 0:
        return skipped("the last layers' gradients are 0")
    ratio = early / late
    if ratio < VANISHING:
        return wrong(
            f"the first layers' gradients are {ratio:.2g} of the last ones': they vanish",
            "Use ReLU or GELU instead of sigmoid or tanh, He or Xavier initialisation, "
            "normalisation layers or residual connections.",
            ratio=ratio,
        )
    if ratio > EXPLODING:
        return wrong(
            f"the first layers' gradients are {ratio:.2g} times the last ones': they explode",
            "Make the initial weights smaller, add normalisation layers, clip the gradient norm.",
            ratio=ratio,
        )
    return passed(f"first layers / last layers: {ratio:.2g}", ratio=ratio)


def _reached(seen: Observation, training: Training) -> Verdict:
    mine = {id(item) for item in training.held}
    cut: list[str] = []
    unused: list[str] = []
    still: list[str] = []
    steps = [step for step in training.gradients if len(step) == len(training.layers)]
    if not any(item.present for step in steps for item in step):
        return wrong(
            f"{training.name} steps without any gradient",
            "Call zero_grad() before backward(), and backward() before step().",
        )
    for place, layer in enumerate(training.layers):
        if not layer.parameter.requires_grad or id(layer.parameter) not in mine:
            continue
        items = [step[place] for step in steps]
        if not any(item.present for item in items):
            (cut if id(layer.module) in seen.called else unused).append(layer.name)
        elif layer.role == "weight" and all(item.norm == 0 for item in items if item.present):
            still.append(layer.name)
    if cut:
        return wrong(
            f"no gradient reaches {listed(cut)}",
            "Look for detach, no_grad, .data or .item between these layers and the loss; freeze "
            "them (requires_grad_(False)) if they are meant to rest.",
            layers=len(cut),
        )
    if still:
        return wrong(
            f"the gradient is exactly 0 at every step in {listed(still)}",
            "Dead ReLUs, an output that is clamped, or layers of zeros in series do this: look at "
            "biases and initial weights behind these layers.",
            layers=len(still),
        )
    if unused:
        return advice(
            f"not used in {len(steps)} steps: {listed(unused)}",
            "Fine if they have their turn later; else leave them out, or use what they compute.",
            layers=len(unused),
        )
    return passed("every trainable layer gets a gradient")


def _guess(call: LossCall) -> float:
    """The loss of a uniform guess; 0 where that is not known."""
    if call.name == "cross_entropy" and call.given.dim() > 1:
        return math.log(call.given.shape[1])
    return math.log(2) if call.name.startswith("binary") else 0.0


def _total(gradients: list[LayerGradient]) -> float:
    return math.sqrt(math.fsum(item.norm**2 for item in gradients if item.present))
