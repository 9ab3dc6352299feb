"""Gradients as they lie in the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradwatch.checkup.observation import LayerGradient
from gradwatch.layers import Layer
from gradwatch.measure import plain


def has_gradient(parameters: Sequence[Tensor]) -> bool:
    return any(parameter.grad is not None for parameter in parameters)


def carries(parameter: Tensor) -> bool:
    """Whether a gradient other than 0 is left in it."""
    gradient = parameter.grad
    return gradient is not None and bool(plain(gradient).any())


def gradient_of(layer: Layer) -> LayerGradient:
    gradient = layer.parameter.grad
    numel = layer.parameter.numel()
    if gradient is None:
        return LayerGradient(layer.name, float("nan"), numel, 0, False)
    values = plain(gradient)
    norm = float(torch.linalg.vector_norm(values.double()))
    nonfinite = int(values.numel() - torch.isfinite(values).sum())
    return LayerGradient(layer.name, norm, numel, nonfinite, True)
