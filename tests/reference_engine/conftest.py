"""What the tests of the reference engine share: examples of every primitive, and yardsticks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gradwatch_reference import TABLE, Primitive, Tensor, grad

EXAMPLES = [(name, i) for name, primitive in TABLE.items() for i in range(len(primitive.cases))]


class Example:
    """One call of one primitive: `f(*xs)` with everything else held fixed."""

    def __init__(self, primitive: Primitive, index: int) -> None:
        args, self.params = primitive.cases[index]
        rng = np.random.default_rng(index + 1)
        self.primitive = primitive
        self.args = [
            rng.uniform(*primitive.domain, arg) if isinstance(arg, tuple) else arg for arg in args
        ]
        self.positions = [i for i, arg in enumerate(args) if isinstance(arg, tuple)]
        self.xs = tuple(self.args[i] for i in self.positions)

    def f(self, *xs: Any) -> Tensor:
        args = list(self.args)
        for position, x in zip(self.positions, xs, strict=True):
            args[position] = x
        return self.primitive(*args, **self.params)


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Example:
    name, index = request.param
    return Example(TABLE[name], index)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for an `example` runs on every case of every primitive in the table."""
    if "example" in metafunc.fixturenames:
        ids = [f"{name}-{index}" for name, index in EXAMPLES]
        metafunc.parametrize("example", EXAMPLES, indirect=True, ids=ids)


def relative_error(ours: Any, theirs: Any) -> float:
    """The largest |a - b| / (|a| + |b| + 1e-8) over the elements."""
    a = np.asarray(ours.array if isinstance(ours, Tensor) else ours)
    b = theirs.numpy(force=True) if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    assert a.shape == b.shape, f"{a.shape} against {b.shape}"
    if a.size == 0:
        return 0.0
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(same, 0.0, np.abs(a - b) / (np.abs(a) + np.abs(b) + 1e-8))))


def slopes(f: Callable[..., Any], xs: tuple[Any, ...], step: float = 1e-5) -> list[np.ndarray]:
    """Central differences of the scalar function f by every element of xs."""
    out: list[np.ndarray] = []
    for i, x in enumerate(xs):
        slope = np.zeros_like(x)
        for index in np.ndindex(*x.shape):
            sides: list[float] = []
            for sign in (1.0, -1.0):
                moved = x.copy()
                moved[index] += sign * step
                sides.append(float(f(*xs[:i], moved, *xs[i + 1 :])))
            slope[index] = (sides[0] - sides[1]) / (2 * step)
        out.append(slope)
    return out


@pytest.fixture
def slopes_agree() -> Callable[[Callable[..., Any], tuple[Any, ...]], None]:
    """Asserts that the gradient of a scalar function is its slope, by central differences."""

    def check(f: Callable[..., Any], xs: tuple[Any, ...]) -> None:
        gradients = grad(f, argnums=range(len(xs)))(*xs)
        for gradient, slope in zip(gradients, slopes(f, xs), strict=True):
            assert gradient.shape == slope.shape
            np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-8)

    return check


def _first_and_second(f: Any, xs: Any, weight: Any, directions: Any, gradient_of: Any) -> list[Any]:
    """[value, gradients, gradients of <gradients, directions>] of <f(xs), weight>."""
    return [f(*xs), *gradient_of(lambda *at: (f(*at) * weight).sum(), xs, directions)]


def _our_orders(f: Any, xs: Any, directions: Any) -> list[Any]:
    argnums = range(len(xs))
    gradient = grad(f, argnums)

    def along(*at: Any) -> Any:
        total = Tensor(0.0)
        for share, direction in zip(gradient(*at), directions, strict=True):
            total = total + (share * direction).sum()
        return total

    return [*gradient(*xs), *grad(along, argnums)(*xs)]


def _torch_orders(f: Any, xs: Any, directions: Any) -> list[Any]:
    def gradients(y: Any) -> list[Any]:
        if not y.requires_grad:
            return [torch.zeros_like(x) for x in xs]
        shares = torch.autograd.grad(y, xs, create_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(xs, shares, strict=True)]

    first = gradients(f(*xs))
    along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
    return [*first, *gradients(along)]


@pytest.fixture(scope="session")
def agrees_with_torch() -> Callable[..., None]:
    """Asserts that two functions of arrays agree in value, first and second derivatives."""

    def check(ours: Any, theirs: Any, xs: Any, second_order: float = 1e-8) -> None:
        rng = np.random.default_rng(11)
        weight = rng.normal(size=np.shape(ours(*xs)))
        directions = [rng.normal(size=x.shape) for x in xs]
        their_xs = [torch.tensor(x, requires_grad=True) for x in xs]
        their_directions = [torch.tensor(d) for d in directions]
        a = _first_and_second(ours, xs, weight, directions, _our_orders)
        b = _first_and_second(
            theirs, their_xs, torch.tensor(weight), their_directions, _torch_orders
        )
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            limit = 1e-10 if i <= len(xs) else second_order
            assert relative_error(x, y) <= limit, f"result {i} of value, {len(xs)} firsts, seconds"

    return check
