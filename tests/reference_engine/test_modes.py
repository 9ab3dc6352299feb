"""Modes of differentiation and the ways in which they nest."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

import gradwatch_reference as gw
from gradwatch_reference import Tensor, checkpoint, grad, hessian, hvp, jacobian, jvp, vjp


def derivative(f: Any) -> Any:
    """The derivative of a function of one number, by forward mode."""
    return lambda x: jvp(f, x, 1.0)[1]


def cube(x: Any) -> Any:
    return x**3


@pytest.mark.parametrize("step", [grad, derivative], ids=["reverse", "forward"])
def test_every_derivative_of_the_cube_is_right(step: Any):
    f, seen = cube, []
    for _ in range(6):
        seen.append(float(f(2.0)))
        f = step(f)
    assert seen == [8.0, 12.0, 12.0, 6.0, 0.0, 0.0]


@pytest.mark.parametrize("outer", [grad, derivative])
@pytest.mark.parametrize("middle", [grad, derivative])
@pytest.mark.parametrize("inner", [grad, derivative])
def test_forward_and_reverse_nest_in_any_order(outer: Any, middle: Any, inner: Any):
    def f(x: Any) -> Any:
        return gw.sin(x) * gw.exp(x) / (1.0 + x * x)

    third = outer(middle(inner(f)))(0.7)
    reference = grad(grad(grad(f)))(0.7)
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = x.sin() * x.exp() / (1 + x * x)
    for _ in range(3):
        (y,) = torch.autograd.grad(y, x, create_graph=True)
    assert float(third) == pytest.approx(y.item(), rel=1e-12)
    assert float(reference) == pytest.approx(y.item(), rel=1e-12)


@pytest.mark.parametrize("outer", [grad, derivative])
@pytest.mark.parametrize("inner", [grad, derivative])
def test_an_inner_derivative_does_not_take_the_outer_perturbation_for_its_own(
    outer: Any, inner: Any
):
    # d/dx (x * d/dy (x + y)) = 1: Siskind and Pearlmutter (2005)
    assert float(outer(lambda x: x * inner(lambda y: x + y)(1.0))(1.0)) == 1.0
    assert float(outer(lambda x: x * inner(lambda y: x * y)(2.0))(3.0)) == 6.0


def test_the_gradient_of_a_number_an_array_and_a_tree_is_shaped_as_it():
    assert grad(cube)(2) == 12.0
    assert grad(lambda x: (x * x).sum())(np.ones((2, 3))).shape == (2, 3)
    params = {"layers": [np.ones(2), (np.ones(3), 2.0)]}
    got = grad(lambda p: (p["layers"][0] * 2).sum() * p["layers"][1][1])(params)
    assert got["layers"][0].tolist() == [4.0, 4.0]
    assert got["layers"][1][0].tolist() == [0.0, 0.0, 0.0]
    assert got["layers"][1][1] == 4.0


def test_argnums_chooses_the_arguments():
    def f(x: Any, y: Any, scale: float = 1.0) -> Any:
        return x * y * y * scale

    assert grad(f)(2.0, 3.0) == 9.0
    assert grad(f, 1)(2.0, 3.0, scale=10.0) == 120.0
    assert grad(f, -1)(2.0, 3.0) == 12.0
    with pytest.raises(IndexError):
        grad(f, 2)(2.0, 3.0)
    assert [float(g) for g in grad(f, (0, 1))(2.0, 3.0)] == [9.0, 12.0]


def test_the_result_is_an_array_to_write_to_unless_a_tensor_came_in():
    f = grad(lambda x: (x + x).sum())
    plain = f(np.ones(2))
    assert type(plain) is np.ndarray
    plain *= 2.0
    assert isinstance(f(Tensor(np.ones(2))), Tensor)


def test_gradients_that_are_equal_do_not_share_memory():
    a, b = grad(lambda x, y: (x + y).sum(), (0, 1))(np.ones(3), np.ones(3))
    a[0] = 5.0
    assert b.tolist() == [1.0, 1.0, 1.0]


def test_what_a_mode_returns_may_be_written_to_without_harm_to_what_is_saved():
    value, pullback = vjp(gw.exp, np.zeros(2))
    value += 100.0  # the derivative of exp is its saved value
    (first,) = pullback(np.ones(2))
    first += 100.0
    assert pullback(np.ones(2))[0].tolist() == [1.0, 1.0]
    constant = Tensor([1.0, 2.0], requires_grad=False)
    vjp(lambda x: constant, 1.0)[0][0] = 5.0
    jvp(lambda x: constant, 1.0, 1.0)[0][0] = 5.0
    vjp(gw.TABLE["identity"], np.zeros(2))[1](constant)[0][0] = 5.0
    assert constant.array.tolist() == [1.0, 2.0]
    assert not constant.array.flags.writeable


def test_value_and_grad_returns_both():
    value, gradient = gw.value_and_grad(lambda x: (x * x).sum())(np.array([1.0, 2.0]))
    assert (float(value), gradient.tolist()) == (5.0, [2.0, 4.0])


def test_what_a_function_does_not_use_has_gradient_zero():
    assert grad(lambda x: Tensor(3.0))(1.0) == 0.0
    assert grad(lambda x, y: x * x, 1)(1.0, np.ones(2)).tolist() == [0.0, 0.0]


def test_vjp_may_be_pulled_back_many_times():
    value, pullback = vjp(lambda x, y: x * y, np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    assert value.tolist() == [3.0, 8.0]
    for scale in (1.0, 10.0):
        x, y = pullback(np.array([scale, 0.0]))
        assert (x.tolist(), y.tolist()) == ([3.0 * scale, 0.0], [scale, 0.0])


def test_jacobians_by_rows_and_by_columns_agree():
    matrix = np.random.default_rng(0).normal(size=(3, 4))

    def f(x: Any) -> Any:
        return gw.tanh(gw.matmul(matrix, x))

    x = np.linspace(-1, 1, 4)
    rows, columns = jacobian(f)(x), jacobian(f, "forward")(x)
    assert rows.shape == (3, 4)
    np.testing.assert_allclose(rows, columns, rtol=1e-13)
    np.testing.assert_allclose(rows, (1 - np.tanh(matrix @ x) ** 2)[:, None] * matrix, rtol=1e-13)


def test_the_hessian_agrees_with_torch_and_hvp_with_the_hessian():
    def f(x: Any) -> Any:
        return (gw.exp(x).sum() * (x * x).sum()) ** 0.5

    x = np.array([[0.3, -0.5], [1.0, 0.2]])
    t = torch.tensor(x)
    expected = torch.autograd.functional.hessian(
        lambda x: (x.exp().sum() * (x * x).sum()) ** 0.5, t
    ).numpy()
    ours = hessian(f)(x)
    assert ours.shape == (2, 2, 2, 2)
    np.testing.assert_allclose(ours, expected, rtol=1e-11)
    v = np.array([[1.0, 2.0], [-1.0, 0.5]])
    np.testing.assert_allclose(hvp(f, x, v), np.tensordot(expected, v, 2), rtol=1e-11)


def test_hvp_of_a_tree_moves_along_all_of_it():
    params, direction = {"a": np.array([1.0]), "b": 2.0}, {"a": np.array([1.0]), "b": 1.0}
    got = hvp(lambda p: (p["a"] * p["b"] * p["b"]).sum(), params, direction)
    # H = [[0, 2b], [2b, 2a]]
    assert (got["a"].tolist(), float(got["b"])) == ([4.0], 6.0)


def test_a_gradient_penalty_reaches_the_parameters():
    # The gradient by the input is itself differentiated by a weight that the function closes over.
    w = Tensor(np.array([1.0, 2.0]))
    by_input = grad(lambda x: (w * x * x).sum())(np.array([3.0, 4.0]))
    (by_input * by_input).sum().backward()
    assert w.grad is not None
    np.testing.assert_allclose(w.grad, [2 * 36.0, 2 * 2 * 64.0])


def test_forward_mode_keeps_no_graph():
    _, tangent = jvp(lambda x: gw.exp(x) * x, np.ones(3), np.ones(3))
    assert type(tangent) is np.ndarray
    seen: list[Tensor] = []

    def f(x: Any) -> Any:
        y = gw.exp(x)
        seen.append(y)
        return y * y

    jvp(f, 1.0, 1.0)
    assert seen[0].primitive is None


def test_a_function_that_returns_anything_but_one_tensor_is_refused():
    for mode in (lambda f: vjp(f, 1.0), lambda f: jvp(f, 1.0, 1.0), lambda f: grad(f)(1.0)):
        with pytest.raises(TypeError, match="returned tuple; it must return one Tensor"):
            mode(lambda x: (x, x))


def test_tangents_and_cotangents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"jvp: a seed of shape \(2,\)"):
        jvp(gw.exp, np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match=r"vjp: a seed of shape \(2,\)"):
        vjp(gw.exp, np.ones(3))[1](np.ones(2))


# ---- checkpointing


def _chain(x: Any, steps: int) -> Any:
    for _ in range(steps):
        x = gw.sin(x) * 1.1
    return x


def test_a_checkpoint_changes_no_derivative():
    piece = checkpoint(lambda x, y: gw.sin(x * y) + y)

    def plain(x: Any) -> Any:
        return (gw.sin(x * x) + x).sum()

    def kept(x: Any) -> Any:
        return piece(x, x).sum()

    x = np.array([0.3, 1.2])
    np.testing.assert_allclose(grad(kept)(x), grad(plain)(x), rtol=1e-14)
    np.testing.assert_allclose(hessian(kept)(x), hessian(plain)(x), rtol=1e-13, atol=1e-15)
    rows = [grad(lambda x, i=i: grad(kept)(x)[i])(x) for i in range(2)]
    np.testing.assert_allclose(rows, hessian(plain)(x), rtol=1e-13, atol=1e-15)
    tangent = jvp(kept, x, np.ones(2))[1]
    assert float(tangent) == pytest.approx(grad(plain)(x).sum(), rel=1e-14)


def test_a_checkpoint_of_mixed_constants_and_variables():
    piece = checkpoint(lambda x, scale, k: x * scale * k)

    def f(x: Any) -> Any:
        return piece(x, np.array([2.0, 3.0]), 5.0).sum()

    assert grad(f)(np.ones(2)).tolist() == [10.0, 15.0]
    assert jvp(f, np.ones(2), np.array([1.0, 0.0]))[1] == 10.0
    assert hessian(lambda x: f(x) ** 2)(np.zeros(2)).tolist() == [[200.0, 300.0], [300.0, 450.0]]


def test_a_checkpoint_refuses_to_lose_the_gradient_of_what_it_closes_over():
    w = Tensor(2.0)
    with pytest.raises(ValueError, match="not an argument"):
        checkpoint(lambda x: x * w)(Tensor(1.0))


def _peak_live_arrays(f: Any, x: np.ndarray) -> float:
    """The most memory that a gradient holds at a time, in units of one array."""
    grad(f)(x)
    tracemalloc.start()
    grad(f)(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / x.nbytes


def test_checkpoints_keep_a_chain_of_n_steps_in_sqrt_n_arrays():
    x = np.linspace(0.1, 1.0, 20_000)

    def plain(steps: int) -> Any:
        return lambda x: _chain(x, steps).sum()

    def checkpointed(steps: int) -> Any:
        pieces = round(steps**0.5)

        def f(x: Any) -> Any:
            piece = checkpoint(lambda x: _chain(x, steps // pieces))
            for _ in range(pieces):
                x = piece(x)
            return x.sum()

        return f

    few, many = 36, 324  # nine times the steps: three times the memory
    assert _peak_live_arrays(plain(many), x) > 8 * _peak_live_arrays(plain(few), x)
    assert _peak_live_arrays(checkpointed(many), x) < 4 * _peak_live_arrays(checkpointed(few), x)
    assert _peak_live_arrays(checkpointed(many), x) < 5 * many**0.5
