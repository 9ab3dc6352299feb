"""Gradient checking: right gradients pass, each kind of mistake is caught, kinks are told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradwatch_reference as gw
from gradwatch_reference import Primitive, Tensor, Value, gradient_check, nn, numerical_gradient
from gradwatch_reference.checking import relative_error


def wrong(name: str, value: Any, *vjps: Any) -> Primitive:
    """A primitive with a mistake in its backward, kept out of the table."""
    return Primitive(name, value, vjps, (), cases=())


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("x", [1e-3, 0.7, -40.0, 1e6])
def test_central_differences_find_the_slope(x: float):
    slope = numerical_gradient(lambda x: x * x, x)
    assert float(slope) == pytest.approx(2 * x, rel=1e-6)


def test_the_complex_step_is_exact_to_the_last_digit():
    def f(x: Any) -> Any:
        return (gw.exp(x) / (gw.sin(x) ** 3 + gw.cos(x) ** 3) ** 0.5).sum()

    x = np.array([0.3, 1.5])
    np.testing.assert_allclose(
        numerical_gradient(f, x, method="complex"), gw.grad(f)(x), rtol=1e-14
    )


def test_the_complex_step_is_refused_where_it_would_be_wrong():
    with pytest.raises(TypeError, match="relu of complex128"):
        numerical_gradient(lambda x: gw.relu(x).sum(), np.ones(2), method="complex")
    with pytest.raises(TypeError, match="drops the imaginary part"):
        numerical_gradient(lambda x: Tensor(x.array.real).sum(), np.ones(2), method="complex")


def test_the_step_grows_as_the_precision_falls():
    x = np.array([1.0, 2.0], np.float32)
    slope = numerical_gradient(lambda x: (x * x).sum(), x)
    np.testing.assert_allclose(slope, [2.0, 4.0], rtol=1e-3)


def test_integers_and_functions_that_are_no_scalars_are_refused():
    with pytest.raises(TypeError, match="dtype int64"):
        numerical_gradient(lambda x: x.sum(), np.arange(3))
    with pytest.raises(ValueError, match=r"function of shape \(2,\)"):
        numerical_gradient(lambda x: x, np.ones(2))


def test_the_relative_error_is_the_difference_over_both_sizes():
    assert relative_error(1.0, 3.0) == pytest.approx(2.0 / (4.0 + 1e-8))
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(np.nan, 1.0) == np.inf


def test_a_right_gradient_passes_and_the_report_names_its_worst_element():
    report = gradient_check(
        lambda w, b: gw.tanh(gw.matmul(normal(5, 3), w) + b), [normal(3, 2), normal(2)]
    )
    assert report
    assert [p.verdict for p in report.parameters] == ["right", "right"]
    assert report.worst.relative_error < 1e-5
    assert len(report["[0]"].index) == 2
    assert "right" in str(report)


def test_parameters_may_come_in_every_usual_way():
    x = normal(4, 3)
    layer = nn.Linear(3, 2, np.random.default_rng(0))
    assert gradient_check(lambda x: (x * x).sum(), x)
    assert gradient_check(lambda a, b: a * b, {"a": x, "b": x + 1.0})
    report = gradient_check(lambda: gw.tanh(layer(x)), dict(layer.named_parameters()))
    assert report
    assert [p.name for p in report.parameters] == ["weight", "bias"]
    assert layer.weight.grad is None
    a, b = Value(2.0), Value(3.0)
    assert gradient_check(lambda: (a * b).tanh() / b, [a, b])
    assert gradient_check(lambda a, b: (a * b).tanh() / b, [a, b])
    assert (a.data, a.grad) == (2.0, 0.0)


def test_integer_parameters_are_refused():
    with pytest.raises(TypeError, match="gradient_check: an array of dtype int64"):
        gradient_check(lambda x: x.sum(), np.arange(3))


# ---- mistakes


def test_a_wrong_sign_is_caught_at_the_element_where_it_shows():
    bad_cos = wrong("bad_cos", np.cos, lambda g, out, x: g * gw.sin(x))
    report = gradient_check(lambda x: bad_cos(x), np.array([0.0, 1.0]))
    assert not report
    assert report.worst.index == (1,)
    assert report.worst.analytic == pytest.approx(-report.worst.numeric, rel=1e-6)
    assert "WRONG" in str(report)


def test_a_missing_factor_is_caught():
    bad_square = wrong("bad_square", np.square, lambda g, out, x: g * x)
    report = gradient_check(lambda x: bad_square(x).sum(), normal(3))
    assert not report
    assert report.worst.relative_error == pytest.approx(1 / 3, rel=1e-4)


def test_a_factor_wrong_by_one_part_in_a_thousand_is_caught():
    bad = wrong("bad_exp", np.exp, lambda g, out, x: g * out * 1.001)
    assert not gradient_check(lambda x: bad(x).sum(), normal(3))


def test_a_forgotten_broadcast_sum_is_caught_with_the_name_of_the_operation():
    bad_add = wrong("bad_add", np.add, lambda g, out, a, b: g, lambda g, out, a, b: g)
    report = gradient_check(lambda a, b: bad_add(a, b), [normal(2, 3), normal(3)])
    assert not report
    assert "bad_add gave a cotangent of shape (2, 3)" in str(report)


def test_a_broadcast_sum_that_takes_one_row_only_is_caught():
    bad_add = wrong("bad_add", np.add, lambda g, out, a, b: g, lambda g, out, a, b: g[0])
    report = gradient_check(lambda a, b: bad_add(a, b), [normal(2, 3), normal(3)])
    assert [p.verdict for p in report.parameters] == ["right", "WRONG"]


def test_an_error_in_one_parameter_does_not_stain_the_other():
    bad = wrong("bad_mul", np.multiply, lambda g, out, a, b: g * b, lambda g, out, a, b: -g * a)
    report = gradient_check(lambda a, b: bad(a, b).sum(), {"a": normal(3), "b": normal(3, seed=1)})
    assert report["a"].is_right
    assert not report["b"].is_right


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.5])
def test_a_large_parameter_is_checked_along_random_directions(factor: float):
    cube = wrong("cube", lambda x: x**3, lambda g, out, x: factor * 3.0 * g * x * x)
    report = gradient_check(lambda x: cube(x).sum(), normal(60, 60))
    assert report.parameters[0].method == "directions"
    assert bool(report) == (factor == 1.0)


def test_single_precision_is_judged_by_its_own_measure():
    x = normal(4).astype(np.float32)
    assert gradient_check(lambda x: gw.tanh(x).sum(), x)
    bad_tanh = wrong("bad_tanh", np.tanh, lambda g, out, x: g * (1.0 + out * out))
    assert not gradient_check(lambda x: bad_tanh(x).sum(), x)


# ---- kinks


def test_a_kink_of_relu_is_reported_not_called_wrong():
    report = gradient_check(lambda x: gw.relu(x).sum(), np.array([1.0, 0.0, -1.0]))
    assert report
    assert report.parameters[0].kinks == ((1,),)
    assert report.parameters[0].verdict == "kink"


def test_a_kink_inside_a_network_is_seen_at_the_parameters_that_cross_it():
    # w @ x is exactly 0 for the first unit.
    w = np.array([[1.0, -1.0], [0.5, 0.2]])
    report = gradient_check(lambda w: gw.relu(gw.matmul(w, np.ones(2))), w)
    assert report
    assert report.parameters[0].kinks == ((0, 0), (0, 1))


def test_tied_maxima_are_kinks():
    report = gradient_check(lambda x: x.max(), np.array([2.0, 2.0, 1.0]))
    assert report
    assert report.parameters[0].kinks == ((0,), (1,))


def test_a_kink_close_by_is_stepped_over():
    report = gradient_check(lambda x: abs(x).sum(), np.array([3e-6, -3e-7]))
    assert report
    assert report.worst.relative_error < 1e-5


def test_a_gradient_outside_both_slopes_is_wrong_at_a_kink_too():
    bad_relu = wrong("bad_relu", lambda x: np.maximum(x, 0), lambda g, out, x: g * -1.0)
    report = gradient_check(lambda x: bad_relu(x).sum(), np.array([0.0]))
    assert not report


def test_a_strong_curve_is_not_a_kink():
    report = gradient_check(lambda x: gw.exp(100.0 * x).sum(), np.array([0.0, 0.1]))
    assert report
    assert report.parameters[0].kinks == ()
