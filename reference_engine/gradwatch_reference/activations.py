"""Activation functions, with torch's names, defaults and conventions.

x: any shape; the result has the same.
"""

from __future__ import annotations

import math

from gradwatch_reference.elementwise import (
    erf,
    expm1,
    minimum,
    relu,
    sigmoid,
    softplus,
    tanh,
    where,
)
from gradwatch_reference.shapes import reshape
from gradwatch_reference.tensor import Tensor, shape_of

__all__ = [
    "elu",
    "gelu",
    "leaky_relu",
    "prelu",
    "relu",
    "sigmoid",
    "silu",
    "softplus",
    "tanh",
]


def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    """x where it is positive, slope * x elsewhere: Maas et al. (2013)."""
    return where(x > 0, x, slope * x)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """x where it is positive, slope * x elsewhere.

    x: [n, channels, ...]; slope: [1] or [channels], learnt.
    """
    if slope.size > 1:
        slope = reshape(slope, (-1, *(1,) * (len(shape_of(x)) - 2)))
    return where(x > 0, x, slope * x)


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """x where it is positive, alpha (e^x - 1) elsewhere: Clevert et al. (2015)."""
    return where(x > 0, x, alpha * expm1(minimum(x, 0.0)))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x times the normal distribution function of x: Hendrycks and Gimpel (2016).

    approximate: "none" for the exact function, "tanh" for the paper's approximation.
    """
    if approximate == "none":
        return 0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))
    if approximate == "tanh":
        return 0.5 * x * (1.0 + tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))
    raise ValueError(f'gelu: approximate is "none" or "tanh", not {approximate!r}')


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), also called swish: Ramachandran et al. (2017)."""
    return x * sigmoid(x)
