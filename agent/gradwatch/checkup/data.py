"""Checks of what goes in: inputs and labels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gradwatch.checkup.functions import unusable
from gradwatch.checkup.observation import LossCall, ModelCall, Observation
from gradwatch.checkup.verdict import Verdict, passed, skipped, wrong

# Inputs of zero mean and unit variance have an RMS of 1 (LeCun et al. 1998, Efficient BackProp,
# section 4.3). Pixels of 0..1 have about 0.5; of 0..255 above 100.
LARGEST_RMS, SMALLEST_RMS = 10.0, 0.01
# Mean over standard deviation: above it the offset drowns what varies.
LARGEST_OFFSET = 10.0
# Standard deviation of one column over another's, in a table of features.
LARGEST_SPREAD = 1000.0
MOSTLY = 0.5
FEWEST_VALUES = 16
FEWEST_LABELS = 8
INDEXED = frozenset({"cross_entropy", "nll_loss"})
BINARY = frozenset({"binary_cross_entropy", "binary_cross_entropy_with_logits"})
PAIRED = frozenset({"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"})
STANDARDISE = "Standardise the inputs: subtract the training set's mean, divide by its deviation."


def input_values(seen: Observation) -> Verdict:
    """NaN and infinity in what the networks are given."""
    if not seen.models:
        return skipped("no model was called")
    for place, data in enumerate(_data(seen)):
        if unusable(data):
            share = 1 - float(torch.isfinite(data).double().mean())
            return wrong(
                f"input {place + 1} holds NaN or infinity ({share:.2%} of {data.numel()} values)",
                "Find these rows in the data and drop or fill them before they reach the model.",
                share=share,
            )
    return passed("all values are finite")


def input_scale(seen: Observation) -> Verdict:
    """Range and normalisation of the first floating-point input of each model."""
    firsts = [(call, data) for call in seen.models for data in _measurable(call)[:1]]
    if not firsts:
        return skipped("no floating-point input")
    for call, data in firsts:
        values = data.detach().double()
        mean, std, rms = (
            float(values.mean()),
            float(values.std()),
            float(values.square().mean().sqrt()),
        )
        low, high = float(values.min()), float(values.max())
        numbers = {"mean": mean, "std": std, "min": low, "max": high}
        where = f"inputs of {type(call.module).__name__}"
        spoken = f"mean {mean:.3g}, deviation {std:.3g}, from {low:.3g} to {high:.3g}"
        if std == 0:
            return wrong(
                f"{where} are all {mean:.3g}",
                "Look at how the data is loaded: nothing can be learnt from a constant.",
                **numbers,
            )
        if call.normalised:
            continue
        if rms > LARGEST_RMS or rms < SMALLEST_RMS:
            size = "large" if rms > 1 else "small"
            return wrong(f"{where} are too {size}: {spoken}", STANDARDISE, **numbers)
        if abs(mean) > LARGEST_OFFSET * std:
            return wrong(f"{where} lie far from 0: {spoken}", STANDARDISE, **numbers)
        spread = _spread(values)
        if spread > LARGEST_SPREAD:
            return wrong(
                f"some columns of the {where} vary {spread:,.0f} times more than others",
                STANDARDISE,
                spread=spread,
                **numbers,
            )
    call, data = firsts[0]
    if call.normalised:
        return passed("the model normalises its inputs first")
    return passed(
        f"mean {float(data.double().mean()):.3g}, deviation {float(data.double().std()):.3g}"
    )


def labels(seen: Observation) -> Verdict:
    """Targets that the loss cannot mean: outside of the classes, not finite, not probabilities."""
    if not seen.losses:
        return skipped("no loss function of torch's was called")
    for call in seen.losses:
        found = _bad_targets(call)
        if found:
            return found
    return passed("in the range that the loss takes")


def classes(seen: Observation) -> Verdict:
    """Whether all labels of the steps that were seen are the same."""
    kinds: dict[str, list[Tensor]] = {}
    for call in seen.losses:
        if call.name in INDEXED | BINARY and not call.invented:
            kinds.setdefault(call.name, []).append(_counted(call).flatten())
    given = {name: torch.cat(targets) for name, targets in kinds.items()}
    given = {name: targets for name, targets in given.items() if len(targets) >= FEWEST_LABELS}
    if not given:
        return skipped("no class labels")
    for targets in given.values():
        if bool((targets == targets[0]).all()):
            return wrong(
                f"all {len(targets)} labels seen are {float(targets[0]):g}",
                "Shuffle the training set (DataLoader(shuffle=True)) and look at how labels are "
                "read: the model learns to answer one class.",
                label=float(targets[0]),
            )
    return passed(f"{max(len(targets.unique()) for targets in given.values())} classes seen")


def _data(seen: Observation) -> Iterator[Tensor]:
    for call in seen.models:
        yield from call.data


def _measurable(call: ModelCall) -> list[Tensor]:
    return [
        data
        for data in call.data[:1]
        if data.is_floating_point() and data.numel() >= FEWEST_VALUES and not unusable(data)
    ]


def _spread(values: Tensor) -> float:
    """Ratio of the columns' standard deviations, in a table of features."""
    if values.dim() != 2 or len(values) < 2:
        return 1.0
    # What is nearly always 0, as a word in a text, varies as rarely as it comes.
    filled = values[:, (values != 0).double().mean(0) > MOSTLY]
    if not filled.numel():
        return 1.0
    deviations = filled.std(0)
    varying = deviations[deviations > 0]
    return float(varying.max() / varying.min()) if len(varying) else 1.0


def _counted(call: LossCall) -> Tensor:
    """The targets that count, as numbers; probabilities as their largest class."""
    target = call.target
    if call.name in INDEXED and target.is_floating_point():
        return target.argmax(1 if target.dim() > 1 else 0).double()
    kept = target[target != call.ignored] if call.name in INDEXED else target
    return kept.double()


def _bad_targets(call: LossCall) -> Verdict | None:
    target = call.target
    if target.is_floating_point() and not bool(torch.isfinite(target).all()):
        return wrong(
            f"the targets of {call.name} hold NaN or infinity",
            "Find these rows in the data and drop or fill them.",
        )
    if call.name in INDEXED and not target.is_floating_point():
        width = call.given.shape[1] if call.given.dim() > 1 else call.given.shape[0]
        counted = _counted(call)
        if counted.numel() and (counted.min() < 0 or counted.max() >= width):
            low, high = int(counted.min()), int(counted.max())
            return wrong(
                f"labels from {low} to {high}, but the output has {width} classes "
                f"(0 to {width - 1})",
                f"Make the output {high + 1} wide, or number the classes from 0; a label that is "
                "to be left out takes ignore_index.",
                lowest=low,
                highest=high,
                width=width,
            )
    paired = call.name in PAIRED
    pairs = torch.broadcast_shapes(call.given.shape, target.shape) if paired else target.shape
    if math.prod(pairs) > max(call.given.numel(), target.numel()):
        return wrong(
            f"outputs of shape {tuple(call.given.shape)} and targets of shape "
            f"{tuple(target.shape)} are paired each with each",
            "Give both the same shape: output.squeeze(1), or target[:, None].",
        )
    if call.name in BINARY and target.numel() and (target.min() < 0 or target.max() > 1):
        return wrong(
            f"targets of {call.name} from {float(target.min()):g} to {float(target.max()):g}, "
            "not from 0 to 1",
            "Give probabilities: 0 and 1, not -1 and 1 or class indices.",
            lowest=float(target.min()),
            highest=float(target.max()),
        )
    return None
