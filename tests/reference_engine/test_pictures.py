"""Pictures of gradients, for networks of the engine and of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradwatch_reference as gw
from gradwatch_reference import nn, pictures


def engine_network() -> Any:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(3, 4, rng), nn.Tanh(), nn.Linear(4, 2, rng))
    gw.cross_entropy(model(rng.normal(size=(5, 3))), np.array([0, 1, 0, 1, 0])).backward()
    return model


def torch_network() -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    model(torch.ones(5, 3)).sum().backward()
    return model


def value_network() -> Any:
    model = nn.Sequential(nn.Neurons(3, 4, np.random.default_rng(0)), nn.Tanh(), nn.Neurons(4, 1))
    model([1.0, 2.0, 3.0])[0].backward()
    return model


@pytest.mark.parametrize("network", [engine_network, torch_network, value_network])
def test_the_flow_shows_three_statistics_of_every_layer_on_a_log_axis(network: Any, tmp_path: Path):
    figure = pictures.visualize_gradient_flow(network())
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    assert [line.get_label() for line in axes.lines] == ["max |g|", "mean |g|", "std of g"]
    figure.savefig(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").stat().st_size > 1000


def test_the_statistics_are_those_of_the_gradient():
    network = torch_network()
    layer = pictures.layer_gradients(network)[0]
    grad = network[0].weight.grad
    assert layer.mean_abs == pytest.approx(grad.abs().mean().item(), rel=1e-6)
    assert layer.max_abs == pytest.approx(grad.abs().max().item(), rel=1e-6)
    assert layer.std == pytest.approx(grad.std(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("network", [engine_network, torch_network, value_network])
def test_there_is_a_histogram_for_every_layer(network: Any, tmp_path: Path):
    figure = pictures.gradient_histograms(network())
    assert len(figure.axes) == 4
    assert figure.axes[0].get_title(loc="left").startswith("0.weight: 12 elements")
    figure.savefig(tmp_path / "histograms.png")


def test_zeros_and_non_finite_gradients_are_counted_not_drawn():
    layer = gw.Tensor(np.zeros(4))
    layer.grad = np.array([0.0, np.nan, np.inf, 1.0])

    class Network:
        def named_parameters(self) -> list[tuple[str, gw.Tensor]]:
            return [("w", layer)]

    figure = pictures.gradient_histograms(Network())
    assert "1 zero, 2 not finite" in figure.axes[0].get_title(loc="left")


def test_a_network_before_backward_is_refused():
    with pytest.raises(ValueError, match=r"call backward\(\) first"):
        pictures.visualize_gradient_flow(nn.Linear(2, 2))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'gradwatch\[pictures\]'"):
        pictures.visualize_gradient_flow(engine_network())


def test_the_engine_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys, gradwatch_reference.pictures; "
        "print([m for m in ('torch', 'matplotlib', 'scipy', 'autograd') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
