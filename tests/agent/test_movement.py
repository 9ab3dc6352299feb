"""How far the weights moved, and whether they are all the same, from a sample of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.layers import named_layers
from gradwatch.measure import Meter
from gradwatch.reading import NoGradient, Statistics


def measured(model: nn.Module, meter: Meter, step: int) -> Statistics:
    reading = meter.details([layer.parameter for layer in named_layers([model])], step=step)
    assert reading is not None
    return reading.resolve()


def row(found: Statistics, name: str) -> np.ndarray:
    return found.values[found.columns.index(name)]


def linear() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    model(torch.ones(1, 8)).sum().backward()
    return model


def test_the_update_ratio_is_the_movement_a_step_beside_the_weights_norm() -> None:
    model = linear()
    meter = Meter(list(named_layers([model])))
    assert np.isnan(row(measured(model, meter, 1), "update_ratio")).all()
    with torch.no_grad():
        model.weight.mul_(1.1)
    moved = row(measured(model, meter, 6), "update_ratio")
    assert moved[0] == pytest.approx(0.1 / 1.1 / 5, rel=1e-4)
    assert moved[1] == 0.0


def test_weights_that_are_all_equal_have_no_spread_and_zeros_have_no_ratio() -> None:
    model = linear()
    nn.init.constant_(model.weight, 0.3)
    nn.init.zeros_(model.bias)
    meter = Meter(list(named_layers([model])))
    measured(model, meter, 1)
    found = measured(model, meter, 2)
    assert row(found, "weight_spread")[0] == 0.0
    assert np.isnan(row(found, "update_ratio")[1])


def test_a_step_without_any_gradient_says_so_of_every_layer() -> None:
    found = NoGradient(3).resolve()
    assert found.values.shape == (2, 3)
    assert np.isnan(found.values).all()


def test_weights_that_were_put_elsewhere_are_looked_at_where_they_are_now() -> None:
    model = linear()
    model.weight.data = torch.randn(64, 64)
    meter = Meter(list(named_layers([model])))
    measured(model, meter, 1)
    model.weight.data = model.weight.data.clone().mul_(1.1)
    assert row(measured(model, meter, 2), "update_ratio")[0] == pytest.approx(0.1 / 1.1, rel=1e-4)


def test_weights_that_had_to_be_copied_are_looked_at_anew() -> None:
    model = linear()
    model.weight.data = torch.randn(64, 64, 2)[:, :, 0]
    meter = Meter(list(named_layers([model])))
    measured(model, meter, 1)
    with torch.no_grad():
        model.weight.mul_(1.1)
    assert row(measured(model, meter, 2), "update_ratio")[0] == pytest.approx(0.1 / 1.1, rel=1e-4)
