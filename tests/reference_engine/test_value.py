"""`Value`: reverse mode over Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch_reference import Value, Vector, dot

numbers = st.floats(-3.0, 3.0).filter(lambda x: abs(x) > 1e-3)


def test_a_squared_affine_function_has_the_gradients_worked_by_hand():
    x, w, b = Value(2), Value(3), Value(1)
    loss = (x * w + b) ** 2
    loss.backward()
    assert (loss.data, x.grad, w.grad, b.grad) == (49.0, 42.0, 28.0, 14.0)


def test_log_at_two_and_sigmoid_at_zero_have_their_textbook_values():
    two, zero = Value(2.0), Value(0.0)
    log, sigmoid = two.log(), zero.sigmoid()
    log.backward()
    sigmoid.backward()
    assert log.data == pytest.approx(0.6931, abs=1e-4)
    assert two.grad == 0.5
    assert (sigmoid.data, zero.grad) == (0.5, 0.25)


def test_the_cube_of_an_affine_function_at_one_is_27_with_slope_54():
    x = Value(1.0)
    y = (2 * x + 1) ** 3
    y.backward()
    assert (y.data, x.grad) == (27.0, 54.0)


BINARY = {
    "a + b": lambda a, b: a + b,
    "a - b": lambda a, b: a - b,
    "a * b": lambda a, b: a * b,
    "a / b": lambda a, b: a / b,
    "2 - a, b + 2": lambda a, b: (2 - a) * (b + 2),
    "2 / a, b / 2": lambda a, b: 2 / a + b / 2,
    "2 + a, 3 * b, b - 1": lambda a, b: (2 + a) * (3 * b) * (b - 1),
    "powers": lambda a, b: a**3 + b**-2 + (a * a) ** 0.5 + 2**a + a**1 + b**0,
    "power of two nodes": lambda a, b: (a * a + 1) ** b,
    "negation": lambda a, b: -a * -b,
    "tanh, exp, sigmoid": lambda a, b: a.tanh() * b.exp() + (a * b).sigmoid(),
    "relu, log": lambda a, b: a.relu() * b + (a * a + b * b).log(),
}


@pytest.mark.parametrize("name", BINARY)
@given(a=numbers, b=numbers)
@settings(max_examples=25, derandomize=True, deadline=None)
def test_every_operation_agrees_with_torch(name: str, a: float, b: float):
    ours = Value(a), Value(b)
    theirs = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b)]
    y, expected = BINARY[name](*ours), BINARY[name](*theirs)
    y.backward()
    grads = torch.autograd.grad(expected, theirs)
    assert y.data == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    for value, grad in zip(ours, grads, strict=True):
        assert value.grad == pytest.approx(grad.item(), rel=1e-10, abs=1e-10)


def test_a_node_used_twice_gets_both_shares():
    v = Value(3.0)
    (v + v).backward()
    assert v.grad == 2.0
    w = Value(3.0)
    (w * w).backward()
    assert w.grad == 6.0


def test_paths_of_a_diamond_add_up():
    x = Value(2.0)
    left, right = x * 3, x * x
    (left * right).backward()
    assert x.grad == pytest.approx(9 * 4.0)  # d(3x^3)/dx


def test_many_stacked_diamonds_cost_one_visit_a_node():
    x = Value(1.0)
    y = x
    for _ in range(200):  # 2^200 paths
        y = y + y
    y.backward()
    assert x.grad == 2.0**200


def test_a_second_backward_adds_the_same_gradient_once_more():
    x = Value(2.0)
    h = x * x
    y = h * 3
    y.backward()
    y.backward()
    assert (h.grad, x.grad) == (6.0, 24.0)


def test_two_losses_over_a_shared_node_add_their_gradients():
    x = Value(2.0)
    h = x * x
    (h * 3).backward()
    (h * 5).backward()
    assert (h.grad, x.grad) == (8.0, 32.0)


def test_a_chain_of_100_000_nodes_does_not_recurse():
    x = Value(1.0)
    y = x
    for _ in range(100_000):
        y = y + 1
    y.backward()
    assert x.grad == 1.0


def test_dot_agrees_with_the_sum_of_products():
    w = [Value(1.0), Value(2.0), Value(3.0)]
    x = [4.0, Value(5.0), 6]
    y = dot(w, x)
    y.backward()
    assert y.data == 32.0
    assert [v.grad for v in w] == [4.0, 5.0, 6.0]
    assert x[1].grad == 2.0


def test_dot_of_a_vector_with_itself_has_gradient_twice_itself():
    v = Vector([Value(1.0), Value(-2.0)])
    (v @ v).backward()
    assert [x.grad for x in v] == [2.0, -4.0]


def test_vector_takes_functions_element_by_element():
    v = Vector([Value(0.5), Value(2.0)])
    total = dot(v.tanh(), v.exp()) + dot(v.log(), v.sigmoid()) + dot(v.relu(), [1.0, 1.0])
    t = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    expected = (t.tanh() * t.exp() + t.log() * t.sigmoid() + t.relu()).sum()
    total.backward()
    expected.backward()
    assert total.data == pytest.approx(expected.item())
    assert [x.grad for x in v] == pytest.approx(t.grad.tolist())


def test_dot_of_different_lengths_names_both():
    with pytest.raises(ValueError, match="dot of 1 and 2 elements"):
        dot([Value(1.0)], [1.0, 2.0])


def test_relu_at_zero_passes_nothing():
    x = Value(0.0)
    x.relu().backward()
    assert x.grad == 0.0


@pytest.mark.parametrize("x", [-1000.0, 1000.0])
def test_sigmoid_and_exp_never_overflow(x: float):
    v = Value(x)
    assert v.sigmoid().data == (x > 0)
    assert v.exp().data == (math.inf if x > 0 else 0.0)


def test_powers_overflow_to_infinity_and_nan_passes_through_relu():
    assert (Value(1e200) ** 2).data == math.inf
    assert (Value(-1e200) ** 3).data == -math.inf
    assert math.isnan(Value(math.nan).relu().data)


def test_what_has_no_real_value_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"log of -1\.0"):
        Value(-1.0).log()
    with pytest.raises(ValueError, match=r"-8\.0 \*\* 0\.5 is not a real number"):
        Value(-8.0) ** 0.5
    with pytest.raises(ZeroDivisionError, match=r"division of 1\.0 by zero"):
        1 / Value(0.0)
    with pytest.raises(TypeError):
        Value(1.0) + "1"
