"""Modules, optimizers, and networks that learn: of Tensors and of Values."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import gradwatch_reference as gw
from gradwatch_reference import Tensor, Value, nn, optim

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def xor() -> ModuleType:
    spec = importlib.util.spec_from_file_location("xor_values", EXAMPLES / "xor_values.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(10))
def test_xor_is_learnt_at_a_learning_rate_of_a_tenth(xor: ModuleType, seed: int):
    model = xor.network(seed)
    xor.train(model, learning_rate=0.1, epochs=3000)
    assert xor.has_learnt(model), xor.outputs(model)


@pytest.mark.parametrize("seed", range(10))
def test_xor_is_not_learnt_at_a_learning_rate_of_a_half(xor: ModuleType, seed: int):
    model = xor.network(seed)
    losses = xor.train(model, learning_rate=0.5, epochs=1000)
    assert not xor.has_learnt(model)
    assert np.mean(losses[-100:]) > 0.1  # and it is not about to be


# ---- 2-3-1, ReLU, squared error, worked by hand

X = np.array([1.0, 2.0])
T = 1.0
W1 = np.array([[0.5, 0.25], [-1.0, 0.25], [0.75, -0.25]])
B1 = np.array([0.25, 0.0, 0.5])
W2 = np.array([[1.0, -2.0, 0.5]])
B2 = np.array([0.25])

# z = W1 x + b1 = [1.25, -0.5, 0.75]; h = relu(z) = [1.25, 0, 0.75]
# y = W2 h + b2 = 1.25 + 0.375 + 0.25 = 1.875; L = (y - t)^2 = 0.765625; dL/dy = 1.75
BY_HAND = {
    "W2": np.array([[2.1875, 0.0, 1.3125]]),  # dL/dy h^T
    "b2": np.array([1.75]),
    "W1": np.array([[1.75, 3.5], [0.0, 0.0], [0.875, 1.75]]),  # (W2^T dL/dy * [1, 0, 1]) x^T
    "b1": np.array([1.75, 0.0, 0.875]),
}


def test_a_network_of_tensors_matches_the_matrices_worked_by_hand():
    first, second = nn.Linear(2, 3), nn.Linear(3, 1)
    for parameter, data in (
        (first.weight, W1),
        (first.bias, B1),
        (second.weight, W2),
        (second.bias, B2),
    ):
        parameter.data = data
    y = nn.Sequential(first, nn.ReLU(), second)(X)
    loss = gw.mse_loss(y, np.array([T]))
    loss.backward()
    assert loss.item() == 0.765625
    for parameter, name in (
        (first.weight, "W1"),
        (first.bias, "b1"),
        (second.weight, "W2"),
        (second.bias, "b2"),
    ):
        assert np.array_equal(parameter.grad, BY_HAND[name]), name


def test_a_network_of_values_matches_the_matrices_worked_by_hand():
    first, second = nn.Neurons(2, 3), nn.Neurons(3, 1)
    for layer, weight, bias in ((first, W1, B1), (second, W2, B2)):
        for row, numbers in zip(layer.weight, weight, strict=True):
            for value, number in zip(row, numbers, strict=True):
                value.data = number
        for value, number in zip(layer.bias, bias, strict=True):
            value.data = number
    loss = (nn.Sequential(first, nn.ReLU(), second)(X.tolist())[0] - T) ** 2
    loss.backward()
    assert loss.data == 0.765625
    for layer, w, b in ((first, "W1", "b1"), (second, "W2", "b2")):
        assert [[v.grad for v in row] for row in layer.weight] == BY_HAND[w].tolist()
        assert [v.grad for v in layer.bias] == BY_HAND[b].tolist()


# ---- modules


def test_parameters_have_the_names_of_their_places():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    names = [name for name, _ in model.named_parameters()]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    values = nn.Neurons(2, 1)
    assert [name for name, _ in values.named_parameters()] == ["weight.0.0", "weight.0.1", "bias.0"]


def test_the_same_generator_draws_the_same_network():
    a, b = (nn.Linear(3, 2, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(a.weight.array, b.weight.array)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Sigmoid()])
def test_an_activation_is_the_same_of_tensors_and_of_values(activation: Any):
    x = [-1.5, 0.5]
    of_tensor = activation(Tensor(x)).array
    of_values = [float(v) for v in activation(gw.Vector(map(Value, x)))]
    assert of_values == pytest.approx(of_tensor.tolist(), rel=1e-15)


def test_zero_grad_forgets_every_gradient():
    model = nn.Sequential(nn.Neurons(2, 2), nn.Tanh())
    (model([1.0, 2.0])[0] * 1.0).backward()
    assert any(p.grad for p in model.parameters())
    model.zero_grad()
    assert not any(p.grad for p in model.parameters())


# ---- optimizers

OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "SGD": (lambda p: optim.SGD(p, 0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "SGD with momentum": (
        lambda p: optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    ),
    "Adam": (lambda p: optim.Adam(p, 0.1), lambda p: torch.optim.Adam(p, 0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_agree_with_torch_on_tensors_and_on_values(name: str):
    ours, theirs = OPTIMIZERS[name]
    start = [1.0, -2.0]
    tensor, values = Tensor(start), [Value(x) for x in start]
    peer = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizers = [ours([tensor]), ours(values), theirs([peer])]
    for _ in range(10):
        losses = [
            (tensor * tensor * tensor + tensor * tensor).sum(),
            sum((v**3 + v * v for v in values), Value(0.0)),
            (peer**3 + peer * peer).sum(),
        ]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    np.testing.assert_allclose(tensor.data, peer.detach().numpy(), rtol=1e-9)
    np.testing.assert_allclose([v.data for v in values], peer.detach().numpy(), rtol=1e-9)


def test_a_parameter_without_a_gradient_stays_and_no_parameters_are_refused():
    parameter = Tensor([1.0])
    optim.Adam([parameter]).step()
    assert parameter.data.tolist() == [1.0]
    with pytest.raises(ValueError, match="SGD was given no parameters"):
        optim.SGD([], 0.1)


def test_a_network_of_tensors_separates_two_rings():
    rng = np.random.default_rng(0)
    angle, label = rng.uniform(0, 2 * np.pi, 80), np.arange(80) % 2
    x = ((1 + label) * np.array([np.cos(angle), np.sin(angle)])).T
    model = nn.Sequential(nn.Linear(2, 16, rng), nn.Tanh(), nn.Linear(16, 2, rng))
    optimizer = optim.Adam(model.parameters(), 0.05)
    for _ in range(150):
        loss = gw.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert np.mean(model(x).array.argmax(1) == label) == 1.0
