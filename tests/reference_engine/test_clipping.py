"""Clipping of gradients, of Tensors and of Values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradwatch_reference import Tensor, Value, clip_grad_norm, clip_grad_value, total_norm


def parameters(*grads: list[float]) -> list[Tensor]:
    made = [Tensor(np.zeros(len(grad))) for grad in grads]
    for parameter, grad in zip(made, grads, strict=True):
        parameter.grad = np.array(grad)
    return made


def test_a_norm_above_the_limit_is_brought_to_it_and_returned_as_it_was():
    a, b = parameters([3.0, 0.0], [4.0])
    assert clip_grad_norm([a, b], 1.0) == 5.0
    assert total_norm([a, b]) == pytest.approx(1.0, rel=1e-6)
    assert a.grad == pytest.approx([3.0 / (5.0 + 1e-6), 0.0])


def test_a_norm_below_the_limit_is_left_alone():
    (a,) = parameters([0.3, 0.4])
    assert clip_grad_norm([a], 1.0) == pytest.approx(0.5)
    assert a.grad is not None
    assert a.grad.tolist() == [0.3, 0.4]


@pytest.mark.parametrize("max_norm", [0.1, 2.0, 100.0])
def test_it_agrees_with_torch(max_norm: float):
    grads = [[1.0, -2.0], [0.5], [3.0, 1.0, 1.0]]
    ours = parameters(*grads)
    theirs = [torch.zeros(len(g), dtype=torch.float64) for g in grads]
    for parameter, grad in zip(theirs, grads, strict=True):
        parameter.grad = torch.tensor(grad, dtype=torch.float64)
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert clip_grad_norm(ours, max_norm) == pytest.approx(norm.item(), rel=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.grad, b.grad, rtol=1e-12)


def test_values_are_clipped_as_tensors_are():
    a, b, c = Value(0.0), Value(0.0), Value(0.0)
    a.grad, b.grad = 3.0, -4.0
    assert clip_grad_norm([a, b, c], 1.0) == 5.0
    assert (a.grad, b.grad, c.grad) == pytest.approx((0.6, -0.8, 0.0), rel=1e-6)
    clip_grad_value([a, b], 0.7)
    assert (a.grad, b.grad) == pytest.approx((0.6, -0.7), rel=1e-6)


def test_clipping_by_value_cuts_every_element():
    (a,) = parameters([3.0, -0.5, -7.0])
    clip_grad_value([a, Tensor([1.0])], 1.0)
    assert a.grad is not None
    assert a.grad.tolist() == [1.0, -0.5, -1.0]


def test_huge_gradients_do_not_overflow_the_norm():
    a, b = parameters([3e200], [4e200])
    assert clip_grad_norm([a, b], 1.0) == pytest.approx(5e200)
    assert b.grad == pytest.approx([0.8])


def test_a_non_finite_norm_is_returned_as_it_is():
    with np.errstate(invalid="ignore"):
        assert clip_grad_norm(parameters([np.inf]), 1.0) == np.inf
        assert np.isnan(clip_grad_norm(parameters([np.nan]), 1.0))


def test_no_gradients_have_norm_zero_and_negative_limits_are_refused():
    assert clip_grad_norm([Tensor([1.0])], 1.0) == 0.0
    with pytest.raises(ValueError, match="max_norm is -1"):
        clip_grad_norm([], -1.0)
    with pytest.raises(ValueError, match="limit is -1"):
        clip_grad_value([], -1.0)
