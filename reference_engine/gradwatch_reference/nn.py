"""Small networks of Tensors and of Values, built of modules that are functions with parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gradwatch_reference import layers
from gradwatch_reference.elementwise import relu, sigmoid, tanh
from gradwatch_reference.reductions import softmax
from gradwatch_reference.tensor import Tensor
from gradwatch_reference.value import Value, Vector, dot

Parameter = Tensor | Value


class Module:
    """A function with parameters: the Tensors and Values among its attributes and in theirs."""

    def __call__(self, x: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} says how to call it")

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Every parameter with the path to it, as "0.weight", in the order of creation."""
        for name, attribute in vars(self).items():
            yield from _named_parameters(attribute, f"{prefix}.{name}" if prefix else name)

    def parameters(self) -> list[Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def zero_grad(self) -> None:
        """Forget the gradients of earlier sweeps, which would otherwise be added to."""
        for parameter in self.parameters():
            parameter.zero_grad()


def _named_parameters(attribute: Any, name: str) -> Iterator[tuple[str, Parameter]]:
    if isinstance(attribute, (Tensor, Value)):
        yield name, attribute
    elif isinstance(attribute, Module):
        yield from attribute.named_parameters(name)
    elif isinstance(attribute, (list, tuple, Vector)):
        for i, element in enumerate(attribute):
            yield from _named_parameters(element, f"{name}.{i}")


class Linear(Module):
    """x @ weight^T + bias over Tensors. weight: [outputs, inputs]; bias: [outputs].

    Drawn as torch does, uniformly within 1 / sqrt(inputs) of 0.
    """

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator | None = None) -> None:
        draw, bound = rng or np.random.default_rng(), 1.0 / math.sqrt(inputs)
        self.weight = Tensor(draw.uniform(-bound, bound, (outputs, inputs)))
        self.bias = Tensor(draw.uniform(-bound, bound, outputs))

    def __call__(self, x: Any) -> Tensor:
        return layers.linear(x, self.weight, self.bias)


class Neurons(Module):
    """A linear layer of Values: each output is its own dot product. Drawn uniformly in [-1, 1].

    Takes and gives a `Vector`; a sequence of numbers will do as input.
    """

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator | None = None) -> None:
        draw = rng or np.random.default_rng()
        self.weight = [Vector(map(Value, row)) for row in draw.uniform(-1, 1, (outputs, inputs))]
        self.bias = Vector(map(Value, np.zeros(outputs)))

    def __call__(self, x: Sequence[Value | float] | Vector) -> Vector:
        x = Vector(x)
        return Vector([dot(w, x) + b for w, b in zip(self.weight, self.bias, strict=True)])


class _Activation(Module):
    """A function without parameters, of a Tensor or of a Vector of Values."""

    of_tensor: Callable[..., Tensor]
    of_value: Callable[[Value], Value]

    def __call__(self, x: Any) -> Any:
        return x.map(type(self).of_value) if isinstance(x, Vector) else type(self).of_tensor(x)


class ReLU(_Activation):
    of_tensor, of_value = relu, Value.relu


class Tanh(_Activation):
    of_tensor, of_value = tanh, Value.tanh


class Sigmoid(_Activation):
    of_tensor, of_value = sigmoid, Value.sigmoid


class Softmax(Module):
    def __init__(self, axis: int = -1) -> None:
        self.axis = axis

    def __call__(self, x: Tensor) -> Tensor:
        return softmax(x, self.axis)


class Sequential(Module):
    """One module after the other."""

    def __init__(self, *modules: Module) -> None:
        self.modules = modules

    def __call__(self, x: Any) -> Any:
        for module in self.modules:
            x = module(x)
        return x

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        for i, module in enumerate(self.modules):
            yield from module.named_parameters(f"{prefix}.{i}" if prefix else str(i))
