"""Matrix products and convolutions: sums of products, linear in each of two arguments.

Convolution is one of three siblings, each linear in two of (input, weight, output): `correlate`
makes the output, `_to_input` carries the output's cotangent back to the input, `_to_weight` to the
weight. The derivative of each is made of the other two, so that the three are closed under
differentiation at any order.
"""

# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gradwatch_reference.primitive import case, linear_map
from gradwatch_reference.shapes import fold_windows, reshape, sum_to, swapaxes, view_windows
from gradwatch_reference.tensor import Array, Operand, Tensor, shape_of

Shape = tuple[int, ...]

_matmul = linear_map(
    "matmul",
    np.matmul,
    lambda g, out, a, b: sum_to(_matmul(g, swapaxes(b, -1, -2)), a.shape),
    lambda g, out, a, b: sum_to(_matmul(swapaxes(a, -1, -2), g), b.shape),
    cases=[
        case((2, 3), (3, 4)),
        case((5, 2, 3), (3, 4)),
        case((5, 1, 2, 3), (4, 3, 1)),
        case((0, 3), (3, 2)),
        case((2, 0), (0, 3)),
    ],
)


def matmul(a: Operand, b: Operand) -> Tensor:
    """a @ b with numpy's rules: vectors on either side, leading axes broadcast.

    a: [..., n, k] or [k]; b: [..., k, m] or [k]. Raises ValueError when the shapes do not fit.
    """
    shape_a, shape_b = shape_of(a), shape_of(b)
    if not shape_a or not shape_b or shape_a[-1] != shape_b[-2:][0]:
        raise ValueError(f"matmul of shapes {shape_a} and {shape_b}: inner sizes must be equal")
    if len(shape_b) == 1:
        return reshape(matmul(a, reshape(b, (*shape_b, 1))), shape_a[:-1])
    if len(shape_a) == 1:
        return reshape(matmul(reshape(a, (1, *shape_a)), b), (*shape_b[:-2], shape_b[-1]))
    if len(shape_a) > 2 and len(shape_b) == 2:
        # One product of two matrices, not a stack of them: the gradient of b needs no sum then.
        rows = math.prod(shape_a[:-1])
        flat = _matmul(reshape(a, (rows, shape_a[-1])), b)
        return reshape(flat, (*shape_a[:-1], shape_b[-1]))
    return _matmul(a, b)


# ---- convolution. x: [n, groups, c, *spatial], w: [groups, o, c, *size],
#      y: [n, groups, o, *counts]


_COLUMN_BYTES = 1 << 18  # what a piece of a batch may take up as columns: it stays in cache


def _pieces(x: Array, size: Shape, counts: Shape) -> Iterator[slice]:
    """The batch in pieces whose columns are small enough."""
    each = math.prod((*x.shape[1:3], *size, *counts)) * x.itemsize
    step = max(1, _COLUMN_BYTES // max(each, 1))
    return (slice(start, start + step) for start in range(0, len(x), step))


def _columns(seen: Array, rank: int) -> Array:
    """Windows [n, groups, c, *counts, *size] as [n, groups, c * size, counts], one a column."""
    counts, size = seen.shape[3 : 3 + rank], seen.shape[3 + rank :]
    axes = (0, 1, 2, *range(3 + rank, 3 + 2 * rank), *range(3, 3 + rank))
    rows = math.prod((seen.shape[2], *size))
    return seen.transpose(axes).reshape(*seen.shape[:2], rows, math.prod(counts))


def _seen(columns: Array, channels: int, size: Shape, counts: Shape) -> Array:
    """The inverse of `_columns`, as a view."""
    rank = len(size)
    axes = (0, 1, 2, *range(3 + rank, 3 + 2 * rank), *range(3, 3 + rank))
    return columns.reshape(*columns.shape[:2], channels, *size, *counts).transpose(axes)


def _flat(x: Array, axes: int) -> Array:
    """`x` with what comes after the first `axes` axes as one."""
    return x.reshape(*x.shape[:axes], math.prod(x.shape[axes:]))


def _correlate(x: Array, w: Array, stride: Shape, dilation: Shape) -> Array:
    rank = w.ndim - 3
    seen = view_windows(x, w.shape[3:], stride, dilation)
    counts = seen.shape[3 : 3 + rank]
    y = np.empty((*x.shape[:2], w.shape[1], *counts), np.result_type(x, w))
    for piece in _pieces(x, w.shape[3:], counts):
        np.matmul(_flat(w, 2), _columns(seen[piece], rank), out=_flat(y[piece], 3))
    return y


def _correlate_to_input(
    y: Array, w: Array, spatial: Shape, stride: Shape, dilation: Shape
) -> Array:
    size, counts, channels = w.shape[3:], y.shape[3:], w.shape[2]
    x = np.empty((*y.shape[:2], channels, *spatial), np.result_type(y, w))
    transposed = _flat(w, 2).swapaxes(-1, -2)
    for piece in _pieces(x, size, counts):
        seen = _seen(transposed @ _flat(y[piece], 3), channels, size, counts)
        x[piece] = fold_windows(seen, spatial, stride, dilation)
        del seen  # or it would stand beside the next piece's
    return x


def _correlate_to_weight(x: Array, y: Array, size: Shape, stride: Shape, dilation: Shape) -> Array:
    rank, channels, counts = len(size), x.shape[2], y.shape[3:]
    seen = view_windows(x, size, stride, dilation)
    w = np.zeros((*y.shape[1:3], math.prod((channels, *size))), np.result_type(x, y))
    for piece in _pieces(x, size, counts):
        w += (_flat(y[piece], 3) @ _columns(seen[piece], rank).swapaxes(-1, -2)).sum(axis=0)
    return w.reshape(*w.shape[:2], channels, *size)


correlate = linear_map(
    "correlate",
    _correlate,
    lambda g, out, x, w, stride, dilation: _to_input(
        g, w, spatial=x.shape[3:], stride=stride, dilation=dilation
    ),
    lambda g, out, x, w, stride, dilation: _to_weight(
        x, g, size=w.shape[3:], stride=stride, dilation=dilation
    ),
    cases=[
        case((2, 2, 3, 7), (2, 4, 3, 3), stride=(2,), dilation=(1,)),
        case((2, 1, 2, 5, 6), (1, 3, 2, 2, 3), stride=(1, 2), dilation=(2, 1)),
        case((0, 1, 2, 5), (1, 3, 2, 2), stride=(1,), dilation=(1,)),
    ],
)
_to_input = linear_map(
    "correlate_to_input",
    _correlate_to_input,
    lambda g, out, y, w, spatial, stride, dilation: correlate(
        g, w, stride=stride, dilation=dilation
    ),
    lambda g, out, y, w, spatial, stride, dilation: _to_weight(
        g, y, size=w.shape[3:], stride=stride, dilation=dilation
    ),
    cases=[
        case((2, 2, 4, 3), (2, 4, 3, 3), spatial=(7,), stride=(2,), dilation=(1,)),
        case((2, 1, 3, 3, 2), (1, 3, 2, 2, 3), spatial=(5, 6), stride=(1, 2), dilation=(2, 1)),
    ],
)
_to_weight = linear_map(
    "correlate_to_weight",
    _correlate_to_weight,
    lambda g, out, x, y, size, stride, dilation: _to_input(
        y, g, spatial=x.shape[3:], stride=stride, dilation=dilation
    ),
    lambda g, out, x, y, size, stride, dilation: correlate(x, g, stride=stride, dilation=dilation),
    cases=[
        case((2, 2, 3, 7), (2, 2, 4, 3), size=(3,), stride=(2,), dilation=(1,)),
        case((2, 1, 2, 5, 6), (2, 1, 3, 3, 2), size=(2, 3), stride=(1, 2), dilation=(2, 1)),
    ],
)
