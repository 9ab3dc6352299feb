"""Pictures of the gradients of a network, of this engine or of torch, layer by layer.

A network is anything with `named_parameters()` whose parameters have a `grad`. Drawing needs
matplotlib: pip install 'gradwatch[pictures]'.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch_reference.tensor import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMALLEST = 1e-30  # where a gradient of exactly 0 stands on a logarithmic axis


@dataclass(frozen=True)
class LayerGradient:
    """The gradient of one parameter; the single Values of a row count as one."""

    name: str
    gradient: Array  # flat

    @property
    def mean_abs(self) -> float:
        return float(np.mean(np.abs(self.gradient)))

    @property
    def std(self) -> float:
        return float(np.std(self.gradient))

    @property
    def max_abs(self) -> float:
        return float(np.max(np.abs(self.gradient)))


def layer_gradients(network: Any) -> list[LayerGradient]:
    """The gradient of each layer of `network`, in its order; those without one are left out.

    Raises ValueError when none has a gradient: backward has not run.
    """
    found: dict[str, list[Array]] = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and np.prod(np.shape(parameter.grad)) > 0:
            layer = re.sub(r"(\.\d+)+$", "", name)  # "0.weight.2.1", one of the Values of a layer
            found.setdefault(layer, []).append(_flat(parameter.grad))
    if not found:
        raise ValueError("no parameter of the network has a gradient: call backward() first")
    return [LayerGradient(name, np.concatenate(parts)) for name, parts in found.items()]


def visualize_gradient_flow(network: Any) -> Figure:
    """Mean |g|, standard deviation and max |g| of each layer, on a logarithmic axis.

    Returns the figure: `.savefig("flow.png")` writes it. A healthy network is about level; one
    that falls to the left vanishes, one that climbs to the left explodes.
    Raises ImportError without matplotlib, ValueError when no parameter has a gradient.
    """
    layers = layer_gradients(network)
    figure = _new_figure(max(6.0, 0.5 * len(layers)), 4.5)
    axes = figure.subplots()
    at = np.arange(len(layers))
    for label, marker, numbers in (
        ("max |g|", "v", [layer.max_abs for layer in layers]),
        ("mean |g|", "o", [layer.mean_abs for layer in layers]),
        ("std of g", "s", [layer.std for layer in layers]),
    ):
        axes.plot(at, np.maximum(numbers, _SMALLEST), marker=marker, label=label)
    axes.set_yscale("log")
    axes.set_xticks(at, [layer.name for layer in layers], rotation=60, ha="right")
    axes.set_ylabel("gradient")
    axes.set_title("Gradient flow, from the input to the output")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return figure


def gradient_histograms(network: Any, bins: int = 40) -> Figure:
    """A histogram of log10 |g| for each layer, all on one axis; zeros are counted in the title.

    Raises as `visualize_gradient_flow` does.
    """
    layers = layer_gradients(network)
    figure = _new_figure(6.0, 1.2 + 1.3 * len(layers))
    rows = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    finite = [np.abs(layer.gradient[np.isfinite(layer.gradient)]) for layer in layers]
    decades = [np.log10(sizes[sizes > 0]) for sizes in finite]
    ends = [end for each in decades if each.size for end in (each.min(), each.max())] or [0.0]
    edges = np.linspace(min(ends) - 0.5, max(ends) + 0.5, bins + 1)
    for axes, layer, sizes, each in zip(rows, layers, finite, decades, strict=True):
        axes.hist(each, bins=edges.tolist())
        zeros = int(np.sum(layer.gradient == 0))
        broken = layer.gradient.size - sizes.size
        axes.set_title(
            f"{layer.name}: {layer.gradient.size} elements, {zeros} zero, {broken} not finite",
            fontsize=9,
            loc="left",
        )
    rows[-1].set_xlabel("log10 |g|")
    return figure


def _flat(grad: Any) -> Array:
    if hasattr(grad, "detach"):  # torch's: numpy knows neither its devices nor bfloat16
        grad = grad.detach().double().cpu().numpy()
    return np.asarray(grad, dtype=np.float64).reshape(-1)


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'gradwatch[pictures]'") from error
    return Figure(figsize=(width, height), layout="constrained")
