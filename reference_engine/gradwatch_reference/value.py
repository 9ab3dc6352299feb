"""Reverse-mode differentiation of scalars: one `Value` a number, one line a derivative.

Every operation writes down its result and, beside it, the partial derivative by each parent.
`backward` then multiplies partials along the paths of the graph and adds the paths up: the chain
rule is the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from operator import mul
from typing import overload

from gradwatch_reference.graph import topological_order


class Value:
    """A float that remembers what it was computed from.

    After `y.backward()`, every `Value` x that y was computed from has dy/dx added to `x.grad`.
    """

    __slots__ = ("data", "grad", "op", "parents", "partials")

    def __init__(
        self,
        data: float,
        parents: tuple[Value, ...] = (),
        partials: tuple[float, ...] = (),
        op: str = "",
    ) -> None:
        self.data = float(data)
        self.grad = 0.0
        self.parents = parents
        self.partials = partials
        self.op = op

    def backward(self, seed: float = 1.0) -> None:
        """Add `seed` times the derivative of self by x to the `grad` of every x beneath it."""
        order = topological_order(self)
        earlier = [node.grad for node in order]  # of earlier sweeps: kept, not propagated again
        for node in order:
            node.grad = 0.0
        self.grad = float(seed)
        for node in order:
            grad = node.grad
            for parent, partial in zip(node.parents, node.partials, strict=True):
                parent.grad += partial * grad
        for node, grad in zip(order, earlier, strict=True):
            node.grad += grad

    def zero_grad(self) -> None:
        """Forget the gradient of earlier sweeps, which the next would add to."""
        self.grad = 0.0

    # ---- arithmetic: with a Value or a number on either side

    def __add__(self, other: Value | float) -> Value:
        if isinstance(other, Value):
            return Value(self.data + other.data, (self, other), (1.0, 1.0), "+")
        return Value(self.data + other, (self,), (1.0,), "+")

    def __sub__(self, other: Value | float) -> Value:
        if isinstance(other, Value):
            return Value(self.data - other.data, (self, other), (1.0, -1.0), "-")
        return Value(self.data - other, (self,), (1.0,), "-")

    def __mul__(self, other: Value | float) -> Value:
        if isinstance(other, Value):
            return Value(self.data * other.data, (self, other), (other.data, self.data), "*")
        return Value(self.data * other, (self,), (other,), "*")

    def __truediv__(self, other: Value | float) -> Value:
        if isinstance(other, Value):
            return _quotient(self, other)
        return _quotient(self, Value(other))

    def __pow__(self, other: Value | float) -> Value:
        if isinstance(other, Value):
            power = _power(self.data, other.data)
            by_base, by_exponent = _power_by_base(self.data, other.data), _log_or_zero(self.data)
            return Value(power, (self, other), (by_base, power * by_exponent), "**")
        power = _power(self.data, other)
        return Value(power, (self,), (_power_by_base(self.data, other),), "**")

    def __neg__(self) -> Value:
        return Value(-self.data, (self,), (-1.0,), "neg")

    def __radd__(self, other: float) -> Value:
        return self + other

    def __rsub__(self, other: float) -> Value:
        return Value(other - self.data, (self,), (-1.0,), "-")

    def __rmul__(self, other: float) -> Value:
        return self * other

    def __rtruediv__(self, other: float) -> Value:
        return _quotient(Value(other), self)

    def __rpow__(self, other: float) -> Value:
        return Value(other) ** self

    # ---- functions

    def relu(self) -> Value:
        # At 0 the derivative is taken to be 0; max in this order lets a NaN through.
        return Value(max(self.data, 0.0), (self,), (float(self.data > 0),), "relu")

    def tanh(self) -> Value:
        y = math.tanh(self.data)
        return Value(y, (self,), (1.0 - y * y,), "tanh")

    def exp(self) -> Value:
        try:
            y = math.exp(self.data)
        except OverflowError:
            y = math.inf
        return Value(y, (self,), (y,), "exp")

    def log(self) -> Value:
        if self.data <= 0.0:
            raise ValueError(f"log of {self.data}: it is defined for positive numbers only")
        return Value(math.log(self.data), (self,), (1.0 / self.data,), "log")

    def sigmoid(self) -> Value:
        small = math.exp(-abs(self.data))  # never overflows
        y = (1.0 if self.data >= 0 else small) / (1.0 + small)
        return Value(y, (self,), (small / (1.0 + small) ** 2,), "sigmoid")

    def __float__(self) -> float:
        return self.data

    def __repr__(self) -> str:
        return f"Value({self.data:.6g}, grad={self.grad:.6g})"


def dot(a: Iterable[Value | float], b: Iterable[Value | float]) -> Value:
    """Sum of products a1 b1 + a2 b2 + ..., as one node of the graph.

    Raises ValueError when the lengths differ.
    """
    a, b = tuple(a), tuple(b)
    if len(a) != len(b):
        raise ValueError(f"dot of {len(a)} and {len(b)} elements: the lengths must be equal")
    xs = [x.data if isinstance(x, Value) else x for x in a]
    ys = [y.data if isinstance(y, Value) else y for y in b]
    pairs = [(node, y) for node, y in zip(a, ys, strict=True) if isinstance(node, Value)]
    pairs += [(node, x) for node, x in zip(b, xs, strict=True) if isinstance(node, Value)]
    parents, partials = zip(*pairs, strict=True) if pairs else ((), ())
    return Value(sum(map(mul, xs, ys)), parents, partials, "dot")


class Vector:
    """A few Values in a row: `v @ w` is their dot product, `v.tanh()` is taken element by element.

    The elements may be Values or numbers (an input that needs no gradient).
    """

    __slots__ = ("elements",)

    def __init__(self, elements: Iterable[Value | float]) -> None:
        self.elements = tuple(elements)

    def __matmul__(self, other: Iterable[Value | float]) -> Value:
        return dot(self.elements, other)

    def __rmatmul__(self, other: Iterable[Value | float]) -> Value:
        return dot(other, self.elements)

    def relu(self) -> Vector:
        return self.map(Value.relu)

    def tanh(self) -> Vector:
        return self.map(Value.tanh)

    def exp(self) -> Vector:
        return self.map(Value.exp)

    def log(self) -> Vector:
        return self.map(Value.log)

    def sigmoid(self) -> Vector:
        return self.map(Value.sigmoid)

    def map(self, function: Callable[[Value], Value]) -> Vector:
        """`function` of every element; a plain number is taken as a `Value` first."""
        return Vector([function(x if isinstance(x, Value) else Value(x)) for x in self.elements])

    @overload
    def __getitem__(self, index: int) -> Value | float: ...
    @overload
    def __getitem__(self, index: slice) -> Vector: ...
    def __getitem__(self, index: int | slice) -> Value | float | Vector:
        if isinstance(index, slice):
            return Vector(self.elements[index])
        return self.elements[index]

    def __iter__(self) -> Iterator[Value | float]:
        return iter(self.elements)

    def __len__(self) -> int:
        return len(self.elements)

    def __repr__(self) -> str:
        return f"Vector({list(self.elements)})"


def _quotient(a: Value, b: Value) -> Value:
    if b.data == 0.0:
        raise ZeroDivisionError(f"division of {a.data} by zero")
    return Value(a.data / b.data, (a, b), (1.0 / b.data, -a.data / (b.data * b.data)), "/")


def _power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except ValueError:
        raise ValueError(f"{base} ** {exponent} is not a real number") from None
    except OverflowError:
        return -math.inf if base < 0 and exponent % 2 else math.inf


def _power_by_base(base: float, exponent: float) -> float:
    if exponent == 0.0:
        return 0.0
    if base == 0.0 and exponent < 1.0:
        return math.inf  # x ** 0.5 at 0: the tangent is vertical
    return exponent * _power(base, exponent - 1.0)


def _log_or_zero(base: float) -> float:
    return math.log(base) if base > 0.0 else 0.0 if base == 0.0 else math.nan
