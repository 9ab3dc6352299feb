"""Keeping gradients from exploding, in place on the `grad` of parameters.

Parameters are Tensors or Values; those without a gradient are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from gradwatch_reference.nn import Parameter
from gradwatch_reference.value import Value


def clip_grad_value(parameters: Iterable[Parameter], limit: float) -> None:
    """Cut every element of every gradient to [-limit, limit].

    Raises ValueError for a negative limit.
    """
    if limit < 0:
        raise ValueError(f"clip_grad_value: the limit is {limit}, and must not be negative")
    for parameter in parameters:
        if isinstance(parameter, Value):
            parameter.grad = min(max(parameter.grad, -limit), limit)
        elif parameter.grad is not None:
            parameter.grad = np.clip(parameter.grad, -limit, limit)


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Shorten all gradients together to an L2 norm of `max_norm`; return what it was before.

    They are multiplied by max_norm / (norm + 1e-6) where that is below 1: Pascanu et al. (2013),
    "On the difficulty of training recurrent neural networks", algorithm 1.
    Raises ValueError for a negative max_norm.
    """
    if max_norm < 0:
        raise ValueError(f"clip_grad_norm: max_norm is {max_norm}, and must not be negative")
    parameters = list(parameters)
    norm = total_norm(parameters)
    coefficient = max_norm / (norm + 1e-6)
    if coefficient < 1.0:
        for parameter in parameters:
            if isinstance(parameter, Value):
                parameter.grad *= coefficient
            elif parameter.grad is not None:
                parameter.grad = parameter.grad * coefficient
    return norm


def total_norm(parameters: Iterable[Parameter]) -> float:
    """The L2 norm of all gradients as one vector; large ones do not overflow it."""
    return math.hypot(*(_norm(p.grad) for p in parameters if p.grad is not None))


def _norm(grad: np.ndarray | float) -> float:
    largest = float(np.max(np.abs(grad), initial=0.0))
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm(np.asarray(grad) / largest))
