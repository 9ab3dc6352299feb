"""Checks of the weights before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod, sqrt

import torch
from torch import Tensor, nn

from gradwatch.checkup.observation import Observation
from gradwatch.checkup.verdict import Verdict, passed, skipped, wrong
from gradwatch.layers import Layer

# gain = RMS * sqrt(fan in): torch's default has 0.58, Xavier 1, He 1.41, a policy's last layer
# 0.01. Beyond these the signal of even one layer is lost or drowns all others.
LARGEST_GAIN, SMALLEST_GAIN = 10.0, 1e-3
# An embedding's rows: torch draws them from N(0, 1).
LARGEST_EMBEDDING = 30.0
DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
DRAW = "Draw them anew: nn.init.kaiming_normal_ before ReLU, nn.init.xavier_normal_ else."


def weight_values(seen: Observation) -> Verdict:
    """NaN and infinity in the weights."""
    for layer, values in _weights(seen):
        if not bool(torch.isfinite(values).all()):
            return wrong(
                f"{layer.name} holds NaN or infinity before the first step",
                "Look at its initialisation (torch.empty is not filled) or at the checkpoint.",
            )
    return passed("all weights are finite") if seen.trainings else skipped("no optimizer stepped")


def weight_scale(seen: Observation) -> Verdict:
    """The size of each weight matrix against its fan-in."""
    gains: list[float] = []
    for layer, values in _weights(seen):
        rms = float(values.double().square().mean().sqrt()) if values.numel() else 0.0
        if isinstance(layer.module, nn.Embedding) and rms > LARGEST_EMBEDDING:
            return wrong(
                f"the rows of {layer.name} have an RMS of {rms:.3g}",
                "nn.init.normal_(weight, std=0.02) or std=1 is usual.",
                rms=rms,
            )
        if rms == 0 or not isinstance(layer.module, DENSE) or values.dim() < 2:
            continue  # a layer of zeros is a way to start; see identical_units
        gain = rms * sqrt(prod(values.shape[1:]))
        gains.append(gain)
        if not SMALLEST_GAIN <= gain <= LARGEST_GAIN:
            size = "large" if gain > 1 else "small"
            return wrong(
                f"{layer.name} starts too {size}: it multiplies its signal by {gain:.3g} "
                f"(RMS {rms:.3g}, fan-in {prod(values.shape[1:])})",
                DRAW,
                gain=gain,
                rms=rms,
            )
    if not gains:
        return skipped("no linear or convolutional layer")
    return passed(f"gains (RMS * sqrt of fan-in) from {min(gains):.2g} to {max(gains):.2g}")


def identical_units(seen: Observation) -> Verdict:
    """Layers whose units all have the same weights, and networks that start at zero."""
    zeros: list[str] = []
    count = 0
    for layer, values in _weights(seen):
        if not isinstance(layer.module, DENSE) or values.dim() < 2 or values.shape[0] < 2:
            continue
        count += 1
        if not bool(values.any()):
            zeros.append(layer.name)
        elif bool((values == values[:1]).all()):
            return wrong(
                f"all {values.shape[0]} units of {layer.name} start with the same weights",
                f"Units that start alike stay alike. {DRAW}",
            )
    if len(zeros) > 1 and 2 * len(zeros) > count:
        return wrong(
            f"{len(zeros)} of {count} weight layers start at zero: {', '.join(zeros[:3])}",
            f"Between two layers of zeros no gradient passes. {DRAW}",
        )
    return passed("no layer's units are alike") if count else skipped("no layer of several units")


def _weights(seen: Observation) -> Iterator[tuple[Layer, Tensor]]:
    """Every layer with its values of before the first step, where they were kept."""
    for training in seen.trainings:
        for layer in training.layers:
            kept = training.initial.get(id(layer.parameter), layer.parameter)
            if not kept.is_meta:
                yield layer, kept.detach()
