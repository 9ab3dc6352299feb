"""Sums, extremes, and the functions made of them."""

# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import numpy as np

from gradwatch_reference.primitive import case, linear_map, primitive
from gradwatch_reference.shapes import broadcast_to, reshape
from gradwatch_reference.tensor import Array, Axis, Operand, Tensor, shape_of

_CASES = [
    case((2, 3), axis=None, keepdims=False),
    case((2, 3), axis=0, keepdims=False),
    case((2, 3, 4), axis=(0, -1), keepdims=True),
]


def _restored(reduced: Tensor, x: Tensor, axis: Axis) -> Tensor:
    """`reduced`, with the axes of `x` that were summed away as axes of length 1."""
    return reshape(reduced, _kept_shape(x.shape, axis))


def _kept_shape(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    gone = {a % len(shape) for a in axes}
    return tuple(1 if i in gone else n for i, n in enumerate(shape))


_sum = linear_map(
    "sum",
    lambda x, axis, keepdims: np.sum(x, axis=axis, keepdims=keepdims),
    lambda g, out, x, axis, keepdims: broadcast_to(_restored(g, x, axis), x.shape),
    cases=[*_CASES, case((0, 3), axis=0, keepdims=False)],
)
_cumsum = linear_map(
    "cumsum",
    lambda x, axis: np.cumsum(x, axis),
    lambda g, out, x, axis: _reversed(_cumsum(_reversed(g, axis), axis=axis), axis),
    cases=[case((3, 2), axis=0), case((2, 3), axis=-1)],
)


def _shares(out: Tensor, x: Tensor, axis: Axis) -> Tensor:
    """1 at the largest element and 0 elsewhere; k largest elements have 1/k each."""
    largest = x.array == out.array.reshape(_kept_shape(x.shape, axis))
    return Tensor.constant(np.asarray(largest / largest.sum(axis=axis, keepdims=True)))


_max = primitive(
    "max",
    lambda x, axis, keepdims: np.max(x, axis=axis, keepdims=keepdims),
    [lambda g, out, x, axis, keepdims: _restored(g, x, axis) * _shares(out, x, axis)],
    [lambda t, out, x, axis, keepdims: sum(t * _shares(out, x, axis), axis, keepdims)],
    cases=_CASES,
    analytic=False,
)


def _log_sum_exp(x: Array, axis: Axis, keepdims: bool) -> Array:
    largest = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):  # all -inf: log(0) is the right answer
        total = np.log(np.sum(np.exp(x - largest), axis=axis, keepdims=True)) + largest
    return total if keepdims else np.squeeze(total, axis)


def _probability(out: Tensor, x: Tensor, axis: Axis) -> Tensor:
    """exp(x - out), the softmax of x: the derivative of its logsumexp."""
    return elementwise.exp(x - _restored(out, x, axis))


_logsumexp = primitive(
    "logsumexp",
    _log_sum_exp,
    [lambda g, out, x, axis, keepdims: _restored(g, x, axis) * _probability(out, x, axis)],
    [lambda t, out, x, axis, keepdims: sum(t * _probability(out, x, axis), axis, keepdims)],
    cases=_CASES,
    analytic=False,
)


def _softmax(x: Array, axis: int) -> Array:
    largest = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    y = np.exp(x - np.where(np.isfinite(largest), largest, 0.0))
    return y / np.sum(y, axis=axis, keepdims=True)


def _along_simplex(t: Tensor, out: Tensor, x: Tensor, axis: int) -> Tensor:
    """The Jacobian diag(p) - p p^T of softmax, times t; it is symmetric, so it serves both ways."""
    weighted = out * t
    return weighted - out * sum(weighted, axis, keepdims=True)


_softmax_primitive = primitive(
    "softmax",
    _softmax,
    [_along_simplex],
    [_along_simplex],
    cases=[case((2, 3), axis=-1), case((2, 3), axis=0), case((0, 3), axis=1)],
    analytic=False,
)


def sum(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The sum over `axis`, or over all axes."""
    return _sum(x, axis=axis, keepdims=keepdims)


def cumsum(x: Operand, axis: int = -1) -> Tensor:
    """The sums of the first 1, 2, ... elements along `axis`."""
    return _cumsum(x, axis=axis)


def mean(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The mean over `axis`, or over all axes; NaN of nothing."""
    return sum(x, axis, keepdims) / _count(x, axis)


def var(x: Operand, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Tensor:
    """Mean squared distance from the mean, over n - ddof."""
    centred = elementwise.subtract(x, mean(x, axis, keepdims=True))
    return sum(centred * centred, axis, keepdims) / (_count(x, axis) - ddof)


def std(x: Operand, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Tensor:
    """The square root of `var`; its slope is infinite where all elements are equal."""
    return var(x, axis, keepdims, ddof).sqrt()


def max(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The largest element; tied elements share its gradient evenly."""
    return _max(x, axis=axis, keepdims=keepdims)


def min(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The smallest element; tied elements share its gradient evenly."""
    return -max(elementwise.negative(x), axis, keepdims)


def logsumexp(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))), without overflow."""
    return _logsumexp(x, axis=axis, keepdims=keepdims)


def softmax(x: Operand, axis: int = -1) -> Tensor:
    """exp(x) over its sum along `axis`, without overflow."""
    return _softmax_primitive(x, axis=axis)


def log_softmax(x: Operand, axis: int = -1) -> Tensor:
    """log(softmax(x)), without overflow and without losing small probabilities."""
    return elementwise.subtract(x, logsumexp(x, axis, keepdims=True))


def _count(x: Operand, axis: Axis) -> int:
    shape = shape_of(x)
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    return int(np.prod([shape[a] for a in axes]))


def _reversed(x: Tensor, axis: int) -> Tensor:
    return x[(slice(None),) * (axis % x.ndim) + (slice(None, None, -1),)]


from gradwatch_reference import elementwise  # noqa: E402 (made of primitives, as is this module)
