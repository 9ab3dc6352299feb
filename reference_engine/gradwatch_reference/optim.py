"""Optimizers: from gradients to new parameters, for Tensors and Values alike.

A parameter without a gradient is left as it is. A step assigns new data and writes into none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gradwatch_reference.nn import Parameter


class Optimizer:
    def __init__(self, parameters: Iterable[Parameter], learning_rate: float) -> None:
        self.parameters: list[Any] = list(parameters)
        self.learning_rate = learning_rate
        if not self.parameters:
            raise ValueError(f"{type(self).__name__} was given no parameters")

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.zero_grad()

    def step(self) -> None:
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                parameter.data = parameter.data - self.learning_rate * self.direction(i, parameter)

    def direction(self, i: int, parameter: Any) -> Any:
        """What to move parameter `i` against, per unit of learning rate."""
        raise NotImplementedError(f"{type(self).__name__} says where to go")


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum: v = momentum v + g; p = p - learning_rate v."""

    def __init__(
        self, parameters: Iterable[Parameter], learning_rate: float, momentum: float = 0.0
    ) -> None:
        super().__init__(parameters, learning_rate)
        self.momentum = momentum
        self.velocities: list[Any] = [0.0] * len(self.parameters)

    def direction(self, i: int, parameter: Any) -> Any:
        self.velocities[i] = self.momentum * self.velocities[i] + parameter.grad
        return self.velocities[i]


class Adam(Optimizer):
    """Each element at its own pace: Kingma and Ba (2015), algorithm 1."""

    def __init__(
        self,
        parameters: Iterable[Parameter],
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, learning_rate)
        self.betas = betas
        self.eps = eps
        self.means: list[Any] = [0.0] * len(self.parameters)
        self.squares: list[Any] = [0.0] * len(self.parameters)
        self.steps = [0] * len(self.parameters)

    def direction(self, i: int, parameter: Any) -> Any:
        grad, (b1, b2) = parameter.grad, self.betas
        self.steps[i] += 1
        self.means[i] = b1 * self.means[i] + (1.0 - b1) * grad
        self.squares[i] = b2 * self.squares[i] + (1.0 - b2) * grad * grad
        mean = self.means[i] / (1.0 - b1 ** self.steps[i])
        square = self.squares[i] / (1.0 - b2 ** self.steps[i])
        return mean / (square**0.5 + self.eps)
