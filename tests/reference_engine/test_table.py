"""Every primitive in the table, on every one of its cases.

A primitive that is added to the table is covered by these tests at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradwatch_reference import TABLE, Tensor, grad, hessian, jvp, linear_map, pointwise, vjp


def test_every_primitive_has_cases_to_be_checked_on():
    assert all(primitive.cases for primitive in TABLE.values())


def test_a_primitive_without_a_case_is_refused():
    with pytest.raises(ValueError, match="triple needs at least one case"):
        linear_map("triple", lambda x: 3 * x, lambda g, out, x: 3 * g, cases=[])
    assert "triple" not in TABLE


def test_a_second_primitive_of_the_same_name_is_refused():
    with pytest.raises(ValueError, match="named exp exists"):
        pointwise("exp", np.exp, lambda out, x: out)


def _weighted(example: Any, weight: np.ndarray) -> Any:
    return lambda *xs: (example.f(*xs) * weight).sum()


def _weight(example: Any) -> np.ndarray:
    return np.random.default_rng(9).normal(size=example.f(*example.xs).shape)


def test_the_vjp_is_the_slope(example: Any, slopes_agree: Any):
    f = _weighted(example, _weight(example))
    slopes_agree(f, example.xs)


def test_the_vjp_of_the_vjp_is_the_slope_of_the_slope(example: Any, slopes_agree: Any):
    f = _weighted(example, _weight(example))
    rng = np.random.default_rng(7)
    directions = [rng.normal(size=x.shape) for x in example.xs]
    gradient = grad(f, argnums=range(len(example.xs)))

    def along(*xs: Any) -> Any:
        shares = [(g * d).sum() for g, d in zip(gradient(*xs), directions, strict=True)]
        total: Any = 0.0
        for share in shares:
            total = total + share
        return total

    slopes_agree(along, example.xs)


def test_the_jvp_is_the_transpose_of_the_vjp(example: Any):
    rng = np.random.default_rng(5)
    tangents = tuple(rng.normal(size=x.shape) for x in example.xs)
    value, tangent = jvp(example.f, example.xs, tangents)
    out, pullback = vjp(example.f, *example.xs)
    cotangent = rng.normal(size=value.shape)
    back = pullback(cotangent)
    assert np.array_equal(value, out)
    forwards = np.vdot(cotangent, tangent)
    backwards = np.sum([np.vdot(t, b) for t, b in zip(tangents, back, strict=True)])
    assert forwards == pytest.approx(backwards, rel=1e-11, abs=1e-13)


def test_forward_over_reverse_agrees_with_reverse_over_reverse(example: Any):
    f = _weighted(example, _weight(example))
    x = example.xs[0]

    def of_first(first: Any) -> Any:
        return f(first, *example.xs[1:])

    by_forward = hessian(of_first)(x)
    rows = [
        grad(lambda first, e=e: (grad(of_first)(first) * e).sum())(x)
        for e in np.eye(x.size).reshape(x.size, *x.shape)
    ]
    assert by_forward == pytest.approx(np.reshape(rows, by_forward.shape), rel=1e-10, abs=1e-12)


def test_the_value_does_not_depend_on_the_layout_in_memory(example: Any):
    strided = tuple(np.repeat(x[..., None], 2, axis=-1)[..., 0] for x in example.xs)
    assert np.array_equal(example.f(*strided).array, example.f(*example.xs).array)
    f = _weighted(example, _weight(example))
    argnums = range(len(example.xs))
    for a, b in zip(grad(f, argnums)(*strided), grad(f, argnums)(*example.xs), strict=True):
        assert a == pytest.approx(b, rel=1e-13)


def test_the_result_and_the_gradient_keep_single_precision(example: Any):
    xs = tuple(Tensor(x.astype(np.float32)) for x in example.xs)
    if example.primitive.name == "astype":
        pytest.skip("its business is to change the precision")
    out = example.f(*xs)
    assert out.dtype == np.float32
    out.backward(np.ones(out.shape, np.float32))
    for x in xs:
        assert x.grad is not None
        assert x.grad.dtype == np.float32
