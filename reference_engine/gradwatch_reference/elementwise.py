"""Functions that work element by element: the rule table, one entry each.

A derivative is written as a function of (out, *args); where it can, it uses the result `out`,
which is there already. At a kink the derivative is the middle of the two sides (abs, maximum) or
torch's choice (relu at 0: 0; clip at its bounds: 1).
"""

# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import math

import numpy as np

from gradwatch_reference import special
from gradwatch_reference.primitive import case, pointwise
from gradwatch_reference.tensor import Array, Tensor

# ---- arithmetic

add = pointwise("add", np.add, 1.0, 1.0)
subtract = pointwise("subtract", np.subtract, 1.0, -1.0)
multiply = pointwise("multiply", np.multiply, lambda out, x, y: y, lambda out, x, y: x)
divide = pointwise(
    "divide", np.divide, lambda out, x, y: 1.0 / y, lambda out, x, y: -out / y, domain=(0.5, 2.0)
)
negative = pointwise("negative", np.negative, -1.0)
identity = pointwise("identity", lambda x: x, 1.0)
power = pointwise(
    "power",
    lambda x, n: x**n,  # the operator, not np.power: it is fast for whole and half powers
    lambda out, x, n: n * _power_or_one(x, n),
    lambda out, x, n: out * log(where(_is_positive(x, n), x, 1.0)),
    domain=(0.5, 2.0),
)

# ---- exponentials

exp = pointwise("exp", np.exp, lambda out, x: out)
expm1 = pointwise("expm1", np.expm1, lambda out, x: out + 1.0)
log = pointwise("log", np.log, lambda out, x: 1.0 / x, domain=(0.5, 2.0))
log1p = pointwise("log1p", np.log1p, lambda out, x: 1.0 / (1.0 + x), domain=(-0.5, 2.0))
sqrt = pointwise("sqrt", np.sqrt, lambda out, x: 0.5 / out, domain=(0.5, 2.0))

# ---- trigonometry, and the error function

sin = pointwise("sin", np.sin, lambda out, x: cos(x))
cos = pointwise("cos", np.cos, lambda out, x: -sin(x))
tan = pointwise("tan", np.tan, lambda out, x: 1.0 + out * out, domain=(-1.0, 1.0))
arctan = pointwise("arctan", np.arctan, lambda out, x: 1.0 / (1.0 + x * x))
sinh = pointwise("sinh", np.sinh, lambda out, x: cosh(x))
cosh = pointwise("cosh", np.cosh, lambda out, x: sinh(x))
tanh = pointwise("tanh", np.tanh, lambda out, x: 1.0 - out * out)
erf = pointwise(
    "erf", special.erf, lambda out, x: (2.0 / math.sqrt(math.pi)) * exp(-x * x), analytic=False
)

# ---- squashing functions, safe at any size


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))  # of the large side: never overflows
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


sigmoid = pointwise(
    "sigmoid",
    _sigmoid,
    lambda out, x: out * sigmoid(-x),  # not out * (1 - out): that loses every digit at large x
    analytic=False,
)
softplus = pointwise(
    "softplus", lambda x: np.logaddexp(x, 0.0), lambda out, x: sigmoid(x), analytic=False
)

# ---- pieces: the derivative selects

relu = pointwise("relu", lambda x: np.maximum(x, 0.0), lambda out, x: x > 0, analytic=False)
absolute = pointwise("absolute", np.absolute, lambda out, x: np.sign(x), analytic=False)
maximum = pointwise(
    "maximum",
    np.maximum,
    lambda out, x, y: _share_of_larger(x, y),
    lambda out, x, y: _share_of_larger(y, x),
    analytic=False,
)
minimum = pointwise(
    "minimum",
    np.minimum,
    lambda out, x, y: _share_of_larger(y, x),
    lambda out, x, y: _share_of_larger(x, y),
    analytic=False,
)
clip = pointwise(
    "clip",
    lambda x, low=None, high=None: np.clip(x, low, high),
    lambda out, x, low=None, high=None: np.asarray(
        (x >= (-np.inf if low is None else low)) & (x <= (np.inf if high is None else high))
    ),
    cases=[case((2, 3), low=-1.0, high=0.5), case((4,), high=0.0), case((0,), low=0.0)],
    analytic=False,
)
where = pointwise(
    "where",
    lambda condition, x, y: np.where(condition, x, y),
    None,
    lambda out, condition, x, y: np.asarray(_bare(condition), bool),
    lambda out, condition, x, y: ~np.asarray(_bare(condition), bool),
    cases=[
        case(np.array([[True, False, True], [False, False, True]]), (2, 3), (3,)),
        case(np.array([True, False]), (), (2,)),
        case(np.zeros((0, 2), bool), (0, 2), (2,)),
    ],
)


def _bare(x: Tensor | float) -> Array | float:
    return x.array if isinstance(x, Tensor) else x


def _power_or_one(x: Tensor, n: Tensor | float) -> Tensor:
    """x^(n-1), but 1 where n is 0: the derivative 0 x^-1 of a constant is 0 at x = 0 too."""
    exponent = n - 1.0
    if isinstance(exponent, float) and exponent == 1.0:
        return x
    if np.any(_bare(n) == 0):
        exponent = where(_bare(n) == 0, 0.0, exponent)
    return power(x, exponent)


def _is_positive(x: Tensor, n: Tensor) -> Array:
    """Where d(x^n)/dn is x^n log x; at x = 0 and n >= 0 it is 0."""
    return np.asarray((_bare(x) != 0) | (np.asarray(_bare(n)) < 0))


def _share_of_larger(x: Tensor, y: Tensor | float) -> Array:
    larger, smaller = _bare(x), _bare(y)
    return np.asarray(0.5 * np.greater(larger, smaller) + 0.5 * np.greater_equal(larger, smaller))
