"""The error function, for numpy has none."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# W. J. Cody (1969), "Rational Chebyshev approximations for the error function", Mathematics of
# Computation 23, 631-637; the coefficients of his CALERF, highest power first.
_NEAR_P = (
    1.85777706184603153e-1,
    3.16112374387056560e00,
    1.13864154151050156e02,
    3.77485237685302021e02,
    3.20937758913846947e03,
)
_NEAR_Q = (
    1.0,
    2.36012909523441209e01,
    2.44024637934444173e02,
    1.28261652607737228e03,
    2.84423683343917062e03,
)
_MIDDLE_P = (
    2.15311535474403846e-8,
    5.64188496988670089e-1,
    8.88314979438837594e00,
    6.61191906371416295e01,
    2.98635138197400131e02,
    8.81952221241769090e02,
    1.71204761263407058e03,
    2.05107837782607147e03,
    1.23033935479799725e03,
)
_MIDDLE_Q = (
    1.0,
    1.57449261107098347e01,
    1.17693950891312499e02,
    5.37181101862009858e02,
    1.62138957456669019e03,
    3.29079923573345963e03,
    4.36261909014324716e03,
    3.43936767414372164e03,
    1.23033935480374942e03,
)
_ONE = 5.9216  # beyond it erf is 1 in float64


def erf(x: Array) -> Array:
    """2/sqrt(pi) times the integral of exp(-t^2) from 0 to x; relative error below 1e-15.

    Near 0 it is x P(x^2)/Q(x^2); beyond 0.46875 it is 1 - exp(-x^2) P(x)/Q(x).
    """
    x = np.asarray(x)
    size = np.minimum(np.abs(x), _ONE)
    square = size * size
    near = x * _ratio(_NEAR_P, _NEAR_Q, np.minimum(square, 0.25))
    beyond = 1.0 - np.exp(-square) * _ratio(_MIDDLE_P, _MIDDLE_Q, size)
    y = np.where(size <= 0.46875, near, np.copysign(beyond, x))
    return np.where(size < _ONE, y, np.sign(x)).astype(x.dtype, copy=False)


def _ratio(p: tuple[float, ...], q: tuple[float, ...], x: Array) -> Array:
    return _polynomial(p, x) / _polynomial(q, x)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total *= x
        total += coefficient
    return total
