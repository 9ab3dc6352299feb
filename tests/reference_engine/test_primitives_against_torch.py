"""Every primitive in the table against torch's own, in float64: value, first and second order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradwatch_reference import TABLE


def _windows(x: Any, size: Any, stride: Any, dilation: Any) -> Any:
    first = x.ndim - len(size)
    for axis, (k, s, d) in enumerate(zip(size, stride, dilation, strict=True)):
        x = x.unfold(first + axis, d * (k - 1) + 1, s)[..., ::d]
    return x


def _fold(x: Any, spatial: Any, stride: Any, dilation: Any) -> Any:
    rank = len(spatial)
    size = x.shape[x.ndim - rank :]
    places = torch.arange(int(np.prod(spatial))).reshape(spatial)
    seen = _windows(places, size, stride, dilation).reshape(-1)
    flat = x.reshape(*x.shape[: x.ndim - 2 * rank], -1)
    whole = torch.zeros(*flat.shape[:-1], places.numel(), dtype=x.dtype)
    return whole.index_add(-1, seen, flat).reshape(*flat.shape[:-1], *spatial)


def _correlate(x: Any, w: Any, stride: Any, dilation: Any) -> Any:
    conv = torch.nn.functional.conv1d if x.ndim == 4 else torch.nn.functional.conv2d
    y = conv(x.flatten(1, 2), w.flatten(0, 1), None, stride, 0, dilation, x.shape[1])
    return y.unflatten(1, (w.shape[0], w.shape[1]))


def _correlate_to_input(y: Any, w: Any, spatial: Any, stride: Any, dilation: Any) -> Any:
    x = torch.zeros(y.shape[0], y.shape[1], w.shape[2], *spatial, dtype=y.dtype, requires_grad=True)
    out = _correlate(x, w, stride, dilation)
    return torch.autograd.grad(out, x, y, create_graph=True)[0]


def _correlate_to_weight(x: Any, y: Any, size: Any, stride: Any, dilation: Any) -> Any:
    w = torch.zeros(y.shape[1], y.shape[2], x.shape[2], *size, dtype=y.dtype, requires_grad=True)
    out = _correlate(x, w, stride, dilation)
    return torch.autograd.grad(out, w, y, create_graph=True)[0]


def _axes(x: Any, axis: Any) -> Any:
    return tuple(range(x.ndim)) if axis is None else axis


def _take(x: Any, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, slice) and (part.step or 1) < 0 for part in parts):
        rows = torch.arange(x.shape[0]).flip(0)[:: -parts[0].step]
        return x[(rows, *parts[1:])]
    return x[tuple(torch.tensor(p) if isinstance(p, np.ndarray) else p for p in parts)]


def _scatter(x: Any, index: Any, shape: Any) -> Any:
    places = torch.arange(int(np.prod(shape))).reshape(shape)
    seen = _take(places, index).reshape(-1)
    whole = torch.zeros(places.numel(), dtype=x.dtype)
    return whole.index_add(0, seen, x.reshape(-1)).reshape(shape)


THEIRS: dict[str, Any] = {
    "broadcast_to_shape": lambda x, shape: x.broadcast_to(shape),
    "sum_to_shape": lambda x, shape: x.sum_to_size(shape),
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, axes: x.permute(axes),
    "astype": lambda x, dtype: x.to(torch.float64),
    "getitem": _take,
    "scatter": _scatter,
    "concatenate": lambda *xs, axis: torch.cat(xs, axis),
    "windows": _windows,
    "fold": _fold,
    "add": torch.add,
    "subtract": torch.subtract,
    "multiply": torch.multiply,
    "divide": torch.divide,
    "negative": torch.negative,
    "identity": lambda x: x * 1.0,
    "power": torch.pow,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "arctan": torch.arctan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "relu": torch.relu,
    "absolute": torch.abs,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clip": lambda x, low=None, high=None: torch.clamp(x, low, high),
    "where": lambda condition, x, y: torch.where(torch.tensor(condition), x, y),
    "matmul": torch.matmul,
    "correlate": _correlate,
    "correlate_to_input": _correlate_to_input,
    "correlate_to_weight": _correlate_to_weight,
    "sum": lambda x, axis, keepdims: x.sum(_axes(x, axis), keepdims),
    "cumsum": lambda x, axis: x.cumsum(axis),
    "max": lambda x, axis, keepdims: x.amax(_axes(x, axis), keepdims),
    "logsumexp": lambda x, axis, keepdims: x.logsumexp(_axes(x, axis), keepdims),
    "softmax": lambda x, axis: x.softmax(axis),
}


def test_every_primitive_in_the_table_has_a_counterpart_here():
    assert sorted(THEIRS) == sorted(TABLE)


def test_the_primitive_agrees_with_torch_at_first_and_second_order(
    example: Any, agrees_with_torch: Any
):
    held = dict(enumerate(example.args))
    theirs = THEIRS[example.primitive.name]

    def f(*xs: Any) -> Any:
        args = {**held, **dict(zip(example.positions, xs, strict=True))}
        return theirs(*(args[i] for i in range(len(args))), **example.params)

    agrees_with_torch(example.f, f, example.xs)


POINTWISE = sorted(
    name
    for name, primitive in TABLE.items()
    if primitive.cases in (TABLE["exp"].cases, TABLE["add"].cases)
)
shapes = hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, min_side=0, max_side=3)


@pytest.mark.parametrize("name", POINTWISE)
@given(shapes=shapes, seed=st.integers(0, 99))
@settings(max_examples=15, derandomize=True, deadline=None)
def test_pointwise_primitives_agree_over_random_shapes(
    agrees_with_torch: Any, name: str, shapes: Any, seed: int
):
    rng, primitive = np.random.default_rng(seed), TABLE[name]
    count = 1 if primitive.cases == TABLE["exp"].cases else 2
    xs = tuple(rng.uniform(*primitive.domain, shape) for shape in shapes.input_shapes[:count])
    agrees_with_torch(primitive, THEIRS[name], xs)


@pytest.mark.parametrize("name", ["sigmoid", "softplus", "tanh", "erf", "log1p"])
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e-8, 30.0, 800.0, 1e300])
def test_tiny_and_huge_numbers_neither_overflow_nor_lose_digits(
    name: str, scale: float, agrees_with_torch: Any
):
    x = np.array([scale, 0.3 * scale])
    if name != "log1p":
        x = np.concatenate([x, -x])
    with np.errstate(over="raise", invalid="raise"):
        value = TABLE[name](x).array
    theirs = getattr(torch, name) if name != "softplus" else lambda x: torch.logaddexp(x, 0 * x)
    expected = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(value, expected, rtol=1e-13)
