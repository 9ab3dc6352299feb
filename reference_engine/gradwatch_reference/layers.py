"""The layers of a network as functions, with torch's names, argument order and conventions.

Parameters and inputs are Tensors, arrays or numbers; results are Tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradwatch_reference.elementwise import where
from gradwatch_reference.products import correlate, matmul
from gradwatch_reference.reductions import max as max_
from gradwatch_reference.reductions import mean, softmax
from gradwatch_reference.shapes import getitem, pad, reshape, swapaxes, windows
from gradwatch_reference.tensor import Array, Operand, Tensor, shape_of

Sizes = int | Sequence[int]


def linear(x: Operand, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias. x: [..., i]; weight: [o, i]; bias: [o]."""
    if shape_of(x)[-1:] != weight.shape[1:]:
        raise ValueError(
            f"linear of x {shape_of(x)} and weight {weight.shape}: want [..., i], [o, i]"
        )
    y = matmul(x, swapaxes(weight, -1, -2))
    return y if bias is None else y + bias


def embedding(indices: Array, weight: Tensor) -> Tensor:
    """The rows of `weight` at `indices`. indices: ints [...]; weight: [rows, features]."""
    indices = np.asarray(indices)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"embedding: indices must be integers, not {indices.dtype}")
    return getitem(weight, indices)


def dropout(x: Tensor, mask: Array, p: float = 0.5) -> Tensor:
    """x where the given `mask` is true, over 1 - p; 0 elsewhere. `mask` broadcasts to x."""
    return where(np.asarray(mask, bool), x / (1.0 - p), 0.0)


# ---- convolution and pooling


def conv1d(
    x: Operand,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """x: [n, c, length]; weight: [o, c / groups, size]; bias: [o]."""
    return _conv(x, weight, bias, 1, stride, padding, dilation, groups)


def conv2d(
    x: Operand,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """x: [n, c, height, width]; weight: [o, c / groups, *size]; bias: [o]."""
    return _conv(x, weight, bias, 2, stride, padding, dilation, groups)


def _conv(
    x: Operand,
    weight: Tensor,
    bias: Tensor | None,
    rank: int,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> Tensor:
    shape, (out, channels) = shape_of(x), weight.shape[:2]
    if len(shape) != rank + 2 or weight.ndim != rank + 2 or shape[1] != channels * groups:
        raise ValueError(
            f"conv{rank}d of x {shape} and weight {weight.shape} in {groups} groups: want "
            f"[n, c, {rank} sizes] and [o, c / groups, {rank} sizes]"
        )
    if out % groups:
        raise ValueError(f"conv{rank}d: {out} output channels cannot be cut into {groups} groups")
    padded = pad(_tensor(x), [(p, p) for p in _each(padding, rank)])
    y = correlate(
        reshape(padded, (shape[0], groups, channels, *padded.shape[2:])),
        reshape(weight, (groups, out // groups, *weight.shape[1:])),
        stride=_each(stride, rank),
        dilation=_each(dilation, rank),
    )
    y = reshape(y, (shape[0], out, *y.shape[3:]))
    return y if bias is None else y + _per_channel(bias, y)


def max_pool1d(x: Operand, size: Sizes, stride: Sizes | None = None, padding: Sizes = 0) -> Tensor:
    """The largest element of each window of x: [..., length]; stride is `size` by default.

    Tied elements share the gradient evenly (torch gives it to the first).
    """
    return max_(_windows(x, 1, size, stride, padding, -np.inf), axis=-1)


def max_pool2d(x: Operand, size: Sizes, stride: Sizes | None = None, padding: Sizes = 0) -> Tensor:
    """The same over x: [..., height, width]."""
    return max_(_windows(x, 2, size, stride, padding, -np.inf), axis=(-2, -1))


def avg_pool1d(x: Operand, size: Sizes, stride: Sizes | None = None, padding: Sizes = 0) -> Tensor:
    """The mean of each window of x: [..., length], the padding's zeros counted in."""
    return mean(_windows(x, 1, size, stride, padding, 0.0), axis=-1)


def avg_pool2d(x: Operand, size: Sizes, stride: Sizes | None = None, padding: Sizes = 0) -> Tensor:
    """The same over x: [..., height, width]."""
    return mean(_windows(x, 2, size, stride, padding, 0.0), axis=(-2, -1))


def _windows(
    x: Operand, rank: int, size: Sizes, stride: Sizes | None, padding: Sizes, border: float
) -> Tensor:
    sizes = _each(size, rank)
    padded = pad(_tensor(x), [(p, p) for p in _each(padding, rank)], border)
    steps = sizes if stride is None else _each(stride, rank)
    return windows(padded, size=sizes, stride=steps, dilation=(1,) * rank)


# ---- normalisation


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running: tuple[Array, Array] | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Each channel to mean 0 and variance 1 over the batch: Ioffe and Szegedy (2015).

    x: [n, channels, ...]; weight, bias: [channels]. With `running` = (means, variances), each
    [channels], these are used instead of the batch's own, as in evaluation.
    """
    axes = (0, *range(2, x.ndim))
    if running is None:
        y = _standardised(x, axes, eps)
    else:
        means, variances = (_per_channel(Tensor(r, requires_grad=False), x) for r in running)
        y = (x - means) / (variances + eps).sqrt()
    return _affine(y, weight, bias, channels_first=True)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    axes: int = 1,
    eps: float = 1e-5,
) -> Tensor:
    """The last `axes` axes to mean 0 and variance 1: Ba et al. (2016). weight, bias: of these."""
    return _affine(_standardised(x, tuple(range(-axes, 0)), eps), weight, bias)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Each of `groups` groups of channels to mean 0 and variance 1: Wu and He (2018).

    x: [n, channels, ...]; weight, bias: [channels].
    """
    n, channels = x.shape[:2]
    if channels % groups:
        raise ValueError(f"group_norm: {channels} channels cannot be cut into {groups} groups")
    grouped = reshape(x, (n, groups, math.prod(x.shape[1:]) // groups))
    y = reshape(_standardised(grouped, (-1,), eps), x.shape)
    return _affine(y, weight, bias, channels_first=True)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """The last axis over its root mean square: Zhang and Sennrich (2019).

    weight: of that axis; eps: by default the spacing of numbers at 1, as in torch.
    """
    if eps is None:
        eps = float(np.finfo(x.dtype).eps)
    return _affine(x / (mean(x * x, -1, keepdims=True) + eps).sqrt(), weight, None)


def _standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - mean(x, axes, keepdims=True)
    return centred / (mean(centred * centred, axes, keepdims=True) + eps).sqrt()


def _affine(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, channels_first: bool = False
) -> Tensor:
    if weight is not None:
        y = y * (_per_channel(weight, y) if channels_first else weight)
    if bias is not None:
        y = y + (_per_channel(bias, y) if channels_first else bias)
    return y


# ---- attention


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Array | None = None, causal: bool = False
) -> Tensor:
    """softmax(query key^T / sqrt(d)) value: Vaswani et al. (2017), equation 1.

    query: [..., t, d]; key: [..., s, d]; value: [..., s, e]; result [..., t, e].
    mask: booleans that broadcast to [..., t, s]: who may be looked at; causal: only s <= t.
    """
    scores = matmul(query * (1.0 / math.sqrt(query.shape[-1])), swapaxes(key, -1, -2))
    if causal:
        seen = np.tri(*scores.shape[-2:], dtype=bool)
        mask = seen if mask is None else seen & mask
    if mask is not None:
        scores = where(mask, scores, -np.inf)
    return matmul(softmax(scores, -1), value)


def _each(sizes: Sizes, rank: int) -> tuple[int, ...]:
    each = (sizes,) * rank if isinstance(sizes, int) else tuple(sizes)
    if len(each) != rank:
        raise ValueError(f"{len(each)} sizes {each} given for {rank} spatial axes")
    return each


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    """[channels] so that it broadcasts against [n, channels, ...]."""
    return reshape(x, (-1, *(1,) * (like.ndim - 2)))


def _tensor(x: Operand) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor(x, requires_grad=False)
