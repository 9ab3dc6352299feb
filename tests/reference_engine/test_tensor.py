"""`Tensor`: what it accumulates, what it refuses, and what its errors say."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gradwatch_reference as gw
from gradwatch_reference import Tensor, grad


def gradient(x: Tensor) -> np.ndarray:
    assert x.grad is not None
    return x.grad


def test_numbers_and_lists_become_float64_and_arrays_keep_their_type():
    assert Tensor(2).dtype == Tensor([1, 2]).dtype == np.float64
    assert Tensor(np.zeros(2, np.float32)).dtype == np.float32
    assert Tensor(np.arange(2)).dtype.kind == "i"
    assert Tensor([True]).dtype == bool


def test_floats_are_variables_and_everything_else_is_constant():
    assert Tensor([1.0]).requires_grad
    assert not Tensor(np.arange(2)).requires_grad
    assert not Tensor([1.0], requires_grad=False).requires_grad


def test_a_node_used_twice_gets_both_shares():
    x = Tensor([3.0])
    (x + x).backward()
    assert gradient(x).tolist() == [2.0]
    x = Tensor([3.0])
    (x * x).backward()
    assert gradient(x).tolist() == [6.0]


def test_backward_twice_adds_twice_and_zero_grad_forgets():
    x = Tensor([1.0, 2.0])
    y = (x * x).sum()
    y.backward()
    y.backward()
    assert gradient(x).tolist() == [4.0, 8.0]
    x.zero_grad()
    assert x.grad is None


def test_a_chain_of_100_000_nodes_does_not_recurse():
    assert sys.getrecursionlimit() < 100_000
    x = Tensor(1.0)
    y = x
    for _ in range(100_000):
        y = y + 1.0
    y.backward()
    assert gradient(x) == 1.0


def test_backward_takes_a_seed_for_a_result_that_is_no_scalar():
    x = Tensor([1.0, 2.0])
    (x * x).backward([10.0, 1.0])
    assert gradient(x).tolist() == [20.0, 4.0]


def test_numbers_and_arrays_may_stand_on_either_side():
    x, array = Tensor([1.0, 2.0]), np.array([3.0, 5.0])
    for y in (array * x, x * array, 2 - x, 2 / x, 2**x, array - x, array @ x, x @ array, -x):
        assert isinstance(y, Tensor)
    (array * x - 2 / x).sum().backward()
    assert gradient(x).tolist() == [5.0, 5.5]


def test_numpy_functions_are_the_primitives_of_the_same_name():
    x = Tensor([0.5, 2.0])
    np.exp(x).sum().backward()
    np.testing.assert_allclose(gradient(x), np.exp([0.5, 2.0]))
    assert isinstance(np.maximum(x, 1.0), Tensor)
    assert np.isfinite(x).tolist() == [True, True]


def test_comparisons_are_bare_booleans():
    x = Tensor([1.0, 2.0])
    assert (x > 1.5).tolist() == [False, True]
    assert (np.array([1.0, 3.0]) == x).tolist() == [True, False]


def test_a_tensor_does_not_turn_into_an_array_behind_your_back():
    with pytest.raises(TypeError, match=r"use \.numpy\(\)"):
        np.asarray(Tensor([1.0]))
    assert np.asarray(Tensor([1.0], requires_grad=False)).tolist() == [1.0]


# ---- broadcasting, over random shapes

shapes = hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=3, min_side=0, max_side=3)
OPERATIONS: dict[str, Any] = {
    "a * b + c": lambda a, b, c: a * b + c,
    "(a - b) / c": lambda a, b, c: (a - b) / c,
    "a ** b - c": lambda a, b, c: a**b - c,
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(shapes=shapes, seed=st.integers(0, 9))
@settings(max_examples=30, derandomize=True, deadline=None)
def test_broadcasting_agrees_with_torch(agrees_with_torch: Any, name: str, shapes: Any, seed: int):
    rng = np.random.default_rng(seed)
    xs = tuple(rng.uniform(0.5, 2.0, shape) for shape in shapes.input_shapes)
    agrees_with_torch(OPERATIONS[name], OPERATIONS[name], xs)


@given(
    shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4),
    data=st.data(),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_indexing_agrees_with_numpy_and_gives_each_element_its_share(shape: Any, data: Any):
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True))
    array = np.random.default_rng(0).normal(size=shape)
    x = Tensor(array)
    y = x[index]
    assert np.array_equal(y.array, array[index])
    y.backward(np.ones(y.shape))
    expected = np.zeros(shape)
    expected[index] = 1.0
    assert np.array_equal(gradient(x), expected)


@given(
    shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4),
    data=st.data(),
)
@settings(max_examples=30, derandomize=True, deadline=None)
def test_reductions_agree_with_torch(agrees_with_torch: Any, shape: Any, data: Any):
    axis = data.draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1)))
    keep = data.draw(st.booleans()) and axis is not None
    x = np.random.default_rng(1).normal(size=shape)
    over = tuple(range(len(shape))) if axis is None else axis
    for name, theirs in {
        "sum": lambda x: x.sum(over, keep),
        "mean": lambda x: x.mean(over, keep),
        "max": lambda x: x.amax(over, keep),
        "var": lambda x: x.var(over, correction=0, keepdim=keep),
        "logsumexp": lambda x: x.logsumexp(over, keep),
    }.items():
        ours = getattr(gw, name)
        agrees_with_torch(lambda x, ours=ours: ours(x, axis, keep), theirs, (x,))


def test_tied_maxima_share_the_gradient():
    assert grad(lambda x: x.max())(np.array([2.0, 1.0, 2.0])).tolist() == [0.5, 0.0, 0.5]
    assert grad(lambda x: gw.maximum(x, 1.0).sum())(np.array([1.0, 2.0])).tolist() == [0.5, 1.0]


def test_a_power_has_the_right_derivatives_at_zero():
    x = np.array([0.0, 0.0, 0.0])
    n = np.array([0.0, 1.0, 2.0])
    by_base, by_exponent = grad(lambda x, n: (x**n).sum(), (0, 1))(x, n)
    assert by_base.tolist() == [0.0, 1.0, 0.0]
    assert by_exponent.tolist() == [0.0, 0.0, 0.0]


def test_non_contiguous_views_give_the_gradients_of_their_copies():
    base = np.random.default_rng(0).normal(size=(6, 8))
    views = [base[::2, ::-1], base.T, np.broadcast_to(base[0], (3, 8)), base[1:1]]
    for view in views:
        ours = grad(lambda x: (gw.sin(x) * x).sum())(view)
        expected = np.sin(view) + view * np.cos(view)
        np.testing.assert_allclose(ours, expected, rtol=1e-13)


# ---- bad input


def test_shapes_that_do_not_fit_are_named_with_the_operation():
    with pytest.raises(ValueError, match=r"add of float64\[2\] and float64\[3\]"):
        Tensor([1.0, 2.0]) + np.ones(3)
    with pytest.raises(ValueError, match=r"matmul of shapes \(2, 3\) and \(2, 3\)"):
        gw.matmul(Tensor(np.ones((2, 3))), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"reshape of float64\[4\]"):
        Tensor(np.ones(4)).reshape(3)
    with pytest.raises(IndexError, match=r"getitem of float64\[4\]"):
        Tensor(np.ones(4))[7]
    with pytest.raises(ValueError, match=r"conv2d of x \(1, 3, 5, 5\) and weight \(2, 2, 3, 3\)"):
        gw.conv2d(np.ones((1, 3, 5, 5)), Tensor(np.ones((2, 2, 3, 3))))
    with pytest.raises(ValueError, match="do not fit"):
        gw.max_pool2d(np.ones((1, 1, 2, 2)), 3)
    with pytest.raises(ValueError, match=r"mse_loss of a prediction \(2,\) and a target \(3,\)"):
        gw.mse_loss(Tensor([1.0, 2.0]), np.ones(3))
    with pytest.raises(ValueError, match=r"target must be integers of shape \(2,\)"):
        gw.cross_entropy(Tensor(np.ones((2, 3))), np.zeros(3, int))
    with pytest.raises(IndexError, match="outside the 3 classes"):
        gw.cross_entropy(Tensor(np.ones((2, 3))), np.array([0, 3]))


def test_backward_from_a_result_that_is_no_scalar_needs_a_seed():
    x = Tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"backward from a result of shape \(2,\) \(of multiply\)"):
        (x * x).backward()
    with pytest.raises(ValueError, match=r"a seed of shape \(3,\) for a result of \(2,\)"):
        (x * x).backward(np.ones(3))


def test_the_gradient_of_a_function_that_is_no_scalar_is_refused_by_its_name():
    def square(x: Any) -> Any:
        return x * x

    with pytest.raises(ValueError, match=r"grad of square, which returned shape \(2,\)"):
        grad(square)(np.ones(2))


def test_integer_arrays_asked_for_gradients_are_refused():
    with pytest.raises(TypeError, match=r"dtype int64 and shape \(3,\) has no gradient"):
        Tensor(np.arange(3), requires_grad=True)
    with pytest.raises(TypeError, match="dtype int64"):
        grad(lambda x: x.sum())(np.arange(3))
    with pytest.raises(TypeError, match="nothing to differentiate"):
        Tensor(np.arange(3)).sum().backward()


def test_the_array_of_a_tensor_cannot_be_written_to():
    x = Tensor([1.0, 2.0])
    y = gw.exp(x)
    for array in (x.array, x.data, y.array, x.reshape(2, 1).array):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5.0


def test_assigning_to_an_element_of_a_tensor_is_refused_with_its_shape_and_maker():
    with pytest.raises(TypeError, match=r"Tensor of shape \(2,\) made by exp"):
        gw.exp(Tensor([1.0, 2.0]))[0] = 5.0


def test_writing_to_what_a_tensor_was_made_from_does_not_reach_it():
    array = np.array([1.0, 2.0])
    x = Tensor(array)
    y = (x * x).sum()
    array[:] = 100.0
    y.backward()
    assert gradient(x).tolist() == [2.0, 4.0]


def test_writing_to_a_small_constant_after_its_use_does_not_reach_the_graph():
    x, constant = Tensor([1.0, 2.0]), np.array([3.0, 4.0])
    y = (x * constant).sum()
    constant[:] = 100.0
    y.backward()
    assert gradient(x).tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.__setitem__((3, 5), 7.0),
        lambda a: a.sort(axis=0),
        lambda a: a.__setitem__(slice(None), a[::-1].copy()),
        lambda a: a.__imul__(-1.0),
    ],
    ids=["one element", "sorted", "reversed", "negated"],
)
def test_in_place_change_of_a_large_saved_array_is_an_error_that_names_the_operation(change: Any):
    array = np.random.default_rng(0).normal(size=(100, 100))
    x = Tensor(np.ones((1, 100)))
    y = gw.matmul(x, array).sum()
    change(array)
    with pytest.raises(
        ValueError, match=r"through matmul of shapes \(1, 100\), \(100, 100\).*in place"
    ):
        y.backward()


def test_in_place_change_is_noticed_through_a_view_too():
    array = np.random.default_rng(0).normal(size=(100, 100))
    flat = gw.reshape(array, (10_000,))
    y = (Tensor(2.0) * flat).sum()
    array[0, 0] = 9.0
    with pytest.raises(ValueError, match=r"multiply of shapes \(\), \(10000,\).*in place"):
        y.backward()


def test_what_is_no_number_is_refused_with_the_name_of_the_operation():
    with pytest.raises(TypeError, match=r"add of float64\[1\] and 'one'"):
        Tensor([1.0]) + "one"
    with pytest.raises(TypeError, match="no number"):
        Tensor([1.0], requires_grad=False) + gw.Value(1.0)


def test_in_place_change_between_vjp_and_its_pullback_is_an_error():
    x = np.random.default_rng(0).normal(size=(100, 100))
    _, pullback = gw.vjp(lambda x: (x * x).sum(), x)
    x += 1.0
    with pytest.raises(ValueError, match=r"multiply.*in place"):
        pullback(None)


def test_replacing_the_data_of_a_parameter_before_backward_is_an_error():
    w = Tensor([1.0, 2.0])
    y = (w * w).sum()
    w.data = np.array([5.0, 6.0])
    with pytest.raises(ValueError, match=r"multiply of shapes \(2,\), \(2,\).*replaced"):
        y.backward()


def test_data_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2,\) was assigned data of \(3,\)"):
        Tensor([1.0, 2.0]).data = np.ones(3)


def test_a_function_without_a_complex_derivative_refuses_complex_numbers():
    with pytest.raises(TypeError, match=r"absolute.*complex"):
        gw.numerical_gradient(lambda x: abs(x).sum(), np.ones(2), method="complex")


def test_mixed_precision_gives_each_leaf_a_gradient_of_its_own_type():
    a, b = Tensor(np.ones(2, np.float32)), Tensor(np.ones(2))
    (a * b).sum().backward()
    assert (gradient(a).dtype, gradient(b).dtype) == (np.float32, np.float64)


def test_torch_agrees_that_a_saved_output_is_used_not_recomputed():
    # exp's derivative is its own output: overflow in one is overflow in the other, and no NaN.
    x = np.array([1000.0, -1000.0])
    with np.errstate(over="ignore"):
        ours = grad(lambda x: gw.exp(x).sum())(x)
    t = torch.tensor(x, requires_grad=True)
    t.exp().sum().backward()
    assert t.grad is not None
    assert ours.tolist() == t.grad.tolist() == [np.inf, 0.0]
