"""Moving elements about: every primitive here is linear, and half of them transpose the rest."""

# pyright: reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gradwatch_reference.primitive import Rule, case, linear_map, primitive
from gradwatch_reference.tensor import Array, Operand, Tensor, shape_of

Shape = tuple[int, ...]

# ---- broadcasting and its transpose

broadcast_to_shape = linear_map(
    "broadcast_to_shape",
    lambda x, shape: np.broadcast_to(x, shape),
    lambda g, out, x, shape: sum_to(g, x.shape),
    cases=[case((3,), shape=(2, 3)), case((2, 1), shape=(4, 2, 3)), case((), shape=(0, 2))],
)


def _sum_to(x: Array, shape: Shape) -> Array:
    extra = x.ndim - len(shape)
    stretched = [extra + i for i, n in enumerate(shape) if n == 1 and x.shape[extra + i] != 1]
    return x.sum(axis=(*range(extra), *stretched), keepdims=True).reshape(shape)


sum_to_shape = linear_map(
    "sum_to_shape",
    _sum_to,
    lambda g, out, x, shape: broadcast_to(g, x.shape),
    cases=[case((2, 3), shape=(3,)), case((4, 2, 3), shape=(2, 1)), case((0, 2), shape=())],
)


def broadcast_to(x: Tensor, shape: Shape) -> Tensor:
    """`x` repeated along the axes it lacks."""
    return x if x.shape == shape else broadcast_to_shape(x, shape=shape)


def sum_to(x: Tensor, shape: Shape) -> Tensor:
    """`x` summed over the axes along which `shape` would be repeated to give its own."""
    return x if x.shape == shape else sum_to_shape(x, shape=shape)


# ---- the same elements in another order

_reshape = linear_map(
    "reshape",
    lambda x, shape: np.reshape(x, shape),
    lambda g, out, x, shape: _reshape(g, shape=x.shape),
    cases=[case((2, 3), shape=(3, 2)), case((4,), shape=(2, 1, 2)), case((0, 3), shape=(3, 0))],
)
_permute = linear_map(
    "transpose",
    lambda x, axes: np.transpose(x, axes),
    lambda g, out, x, axes: _permute(g, axes=tuple(np.argsort(axes).tolist())),
    cases=[case((2, 3, 4), axes=(2, 0, 1)), case((2, 0), axes=(1, 0))],
)
astype = linear_map(
    "astype",
    lambda x, dtype: x.astype(dtype),
    lambda g, out, x, dtype: astype(g, dtype=x.dtype),
    cases=[case((2, 3), dtype=np.float64)],
)


def reshape(x: Operand, *shape: int | Shape) -> Tensor:
    """`x` in another shape, given as a tuple or as numbers; -1 is worked out."""
    return _reshape(x, shape=_flat(shape))


def transpose(x: Tensor, *axes: int | Shape) -> Tensor:
    """`x` with its axes in the given order, or reversed."""
    order = _flat(axes) or tuple(range(x.ndim))[::-1]
    return _permute(x, axes=tuple(axis % max(x.ndim, 1) for axis in order))


def swapaxes(x: Tensor, a: int, b: int) -> Tensor:
    """`x` with the axes `a` and `b` in each other's place."""
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return _permute(x, axes=tuple(order))


# ---- taking out and putting back


def _scatter(x: Array, index: Any, shape: Shape) -> Array:
    whole = np.zeros(shape, x.dtype)
    if _may_repeat(index):
        np.add.at(whole, index, x)
    else:
        whole[index] = x
    return whole


_take = linear_map(
    "getitem",
    lambda x, index: x[index],
    lambda g, out, x, index: scatter(g, index=index, shape=x.shape),
    cases=[
        case((3, 4), index=1),
        case((3, 4), index=(slice(None, None, -2), None, Ellipsis)),
        case((3, 4), index=np.array([0, 2, 2])),
        case((3, 2), index=np.array([[True, False], [True, True], [False, False]])),
        case((3, 4), index=(np.zeros(0, int), slice(1, 3))),
    ],
)
scatter = linear_map(
    "scatter",
    _scatter,
    lambda g, out, x, index, shape: _take(g, index=index),
    cases=[
        case((4,), index=1, shape=(3, 4)),
        case((3, 2), index=np.array([0, 2, 2]), shape=(3, 2)),
        case((0, 2), index=slice(0, 0), shape=(3, 2)),
    ],
)


def getitem(x: Operand, index: Any) -> Tensor:
    """x[index], with numpy's rules; an element taken twice gets the sum of both gradients."""
    return _take(x, index=tuple(map(_settled, index)) if type(index) is tuple else _settled(index))


def _settled(index: Any) -> Any:
    if isinstance(index, (Tensor, list)):
        return np.array(index)
    return index.copy() if isinstance(index, np.ndarray) else index


def _may_repeat(index: Any) -> bool:
    parts: Sequence[Any] = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, np.ndarray) and part.dtype != bool for part in parts)


# ---- joining


def _part(position: int) -> Rule:
    def rule(g: Tensor, out: Tensor, *parts: Any, axis: int) -> Tensor:
        start = sum(shape_of(part)[axis] for part in parts[:position])
        stop = start + shape_of(parts[position])[axis]
        return g[(slice(None),) * (axis % g.ndim) + (slice(start, stop),)]

    return rule


def _part_alone(position: int) -> Rule:
    def rule(t: Tensor, out: Tensor, *parts: Any, axis: int) -> Tensor:
        others = [np.zeros(shape_of(part), t.dtype) for part in parts]
        return _join(*others[:position], t, *others[position + 1 :], axis=axis)

    return rule


_join = primitive(
    "concatenate",
    lambda *parts, axis: np.concatenate(parts, axis),
    _part,
    _part_alone,
    cases=[case((2, 3), (1, 3), axis=0), case((2, 1), (2, 2), (2, 0), axis=-1)],
)


def concatenate(parts: Sequence[Operand], axis: int = 0) -> Tensor:
    """The parts one after the other along an axis that they have."""
    return _join(*parts, axis=axis)


def stack(parts: Sequence[Operand], axis: int = 0) -> Tensor:
    """The parts, all of one shape, side by side along a new axis."""
    shape = shape_of(parts[0])
    at = axis % (len(shape) + 1)
    return concatenate([reshape(x, (*shape[:at], 1, *shape[at:])) for x in parts], at)


def pad(x: Tensor, widths: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """`x` with (before, after) elements of `value` added along each of its last axes."""
    widths = [(0, 0)] * (x.ndim - len(widths)) + list(widths)
    if not any(before or after for before, after in widths):
        return x
    inside = tuple(slice(a, a + n) for (a, _), n in zip(widths, x.shape, strict=True))
    shape = tuple(a + n + b for (a, b), n in zip(widths, x.shape, strict=True))
    padded = scatter(x, index=inside, shape=shape)
    if value == 0.0:
        return padded
    border = np.ones(shape, bool)
    border[inside] = False
    return elementwise.where(border, value, padded)


# ---- sliding windows: what convolution and pooling look at


def window_count(n: int, size: int, stride: int, dilation: int) -> int:
    return (n - dilation * (size - 1) - 1) // stride + 1


def view_windows(x: Array, size: Shape, stride: Shape, dilation: Shape) -> Array:
    """[..., *spatial] -> [..., *counts, *size]: a view of `x` through every window."""
    rank = len(size)
    spatial = x.shape[x.ndim - rank :]
    counts = tuple(map(window_count, spatial, size, stride, dilation))
    if len(spatial) < rank or min(counts, default=1) < 1:
        raise ValueError(f"windows of {size}, dilated by {dilation}, do not fit into {spatial}")
    steps = x.strides[x.ndim - rank :]
    return as_strided(
        x,
        (*x.shape[: x.ndim - rank], *counts, *size),
        (
            *x.strides[: x.ndim - rank],
            *(step * by for step, by in zip(steps, stride, strict=True)),
            *(step * by for step, by in zip(steps, dilation, strict=True)),
        ),
        writeable=False,
    )


def fold_windows(x: Array, spatial: Shape, stride: Shape, dilation: Shape) -> Array:
    """[..., *counts, *size] -> [..., *spatial]: add every window back where it was seen."""
    rank = len(spatial)
    lead, counts, size = x.shape[: -2 * rank], x.shape[-2 * rank : -rank], x.shape[-rank:]
    whole = np.zeros((*lead, *spatial), x.dtype)
    for offset in np.ndindex(*size):
        seen = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s)
            for o, d, n, s in zip(offset, dilation, counts, stride, strict=True)
        )
        whole[(..., *seen)] += x[(..., *offset)]
    return whole


windows = linear_map(
    "windows",
    view_windows,
    lambda g, out, x, size, stride, dilation: fold(
        g, spatial=x.shape[x.ndim - len(size) :], stride=stride, dilation=dilation
    ),
    cases=[
        case((2, 6), size=(3,), stride=(2,), dilation=(1,)),
        case((5, 6), size=(2, 3), stride=(1, 2), dilation=(2, 1)),
        case((0, 4), size=(2,), stride=(1,), dilation=(1,)),
    ],
)
fold = linear_map(
    "fold",
    fold_windows,
    lambda g, out, x, spatial, stride, dilation: windows(
        g, size=x.shape[x.ndim - len(spatial) :], stride=stride, dilation=dilation
    ),
    cases=[
        case((2, 2, 3), spatial=(6,), stride=(2,), dilation=(1,)),
        case((3, 2, 2, 3), spatial=(5, 6), stride=(1, 2), dilation=(2, 1)),
    ],
)


def _flat(numbers: Sequence[int | Shape]) -> Shape:
    if len(numbers) == 1 and not isinstance(numbers[0], (int, np.integer)):
        return tuple(numbers[0])
    return tuple(int(n) for n in numbers if isinstance(n, (int, np.integer)))


from gradwatch_reference import elementwise  # noqa: E402 (made of primitives, as is this module)
