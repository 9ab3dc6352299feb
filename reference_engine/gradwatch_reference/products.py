"""Matrix products and convolutions: sums of products, linear in each of two arguments.

Convolution is one of three siblings, each linear in two of (input, weight, output): `correlate`
makes the output, `_to_input` carries the output's cotangent back to the input, `_to_weight` to the
weight. The derivative of each is made of the other two, so that the three are closed under
differentiation at any order.
"""

# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import numpy as np

from gradwatch_reference.primitive import case, linear
from gradwatch_reference.shapes import fold_windows, reshape, sum_to, swapaxes, view_windows
from gradwatch_reference.tensor import Array, Operand, Tensor, shape_of

Shape = tuple[int, ...]

_matmul = linear(
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
        rows = int(np.prod(shape_a[:-1]))
        flat = _matmul(reshape(a, (rows, shape_a[-1])), b)
        return reshape(flat, (*shape_a[:-1], shape_b[-1]))
    return _matmul(a, b)


# ---- convolution. x: [n, groups, c, *spatial], w: [groups, o, c, *size],
#      y: [n, groups, o, *counts]


def _columns(x: Array, size: Shape, stride: Shape, dilation: Shape) -> Array:
    """[n, groups, c * prod(size), prod(counts)]: one column for each window."""
    rank = len(size)
    seen = view_windows(x, size, stride, dilation)
    axes = (0, 1, 2, *range(3 + rank, 3 + 2 * rank), *range(3, 3 + rank))
    counts = seen.shape[3 : 3 + rank]
    return seen.transpose(axes).reshape(*x.shape[:2], _size(x.shape[2], size), _size(1, counts))


def _correlate(x: Array, w: Array, stride: Shape, dilation: Shape) -> Array:
    size, spatial = w.shape[3:], x.shape[3:]
    counts = tuple(
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(spatial, size, stride, dilation, strict=True)
    )
    y = w.reshape(*w.shape[:2], _size(w.shape[2], size)) @ _columns(x, size, stride, dilation)
    return y.reshape(*y.shape[:3], *counts)


def _correlate_to_input(
    y: Array, w: Array, spatial: Shape, stride: Shape, dilation: Shape
) -> Array:
    size, counts, rank = w.shape[3:], y.shape[3:], len(spatial)
    flat = w.reshape(*w.shape[:2], _size(w.shape[2], size)).swapaxes(-1, -2)
    columns = flat @ y.reshape(*y.shape[:3], _size(1, counts))
    seen = columns.reshape(*y.shape[:2], w.shape[2], *size, *counts)
    axes = (0, 1, 2, *range(3 + rank, 3 + 2 * rank), *range(3, 3 + rank))
    return fold_windows(seen.transpose(axes), spatial, stride, dilation)


def _correlate_to_weight(x: Array, y: Array, size: Shape, stride: Shape, dilation: Shape) -> Array:
    flat = y.reshape(*y.shape[:3], _size(1, y.shape[3:]))
    w = (flat @ _columns(x, size, stride, dilation).swapaxes(-1, -2)).sum(axis=0)
    return w.reshape(*w.shape[:2], x.shape[2], *size)


def _size(channels: int, size: Shape) -> int:
    return channels * int(np.prod(size))


correlate = linear(
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
_to_input = linear(
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
_to_weight = linear(
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
