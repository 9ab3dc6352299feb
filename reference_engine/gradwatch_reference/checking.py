"""Is a gradient right? Slopes measured by finite differences, and a verdict on each parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradwatch_reference import trees
from gradwatch_reference.reverse import CotangentShapeError
from gradwatch_reference.tensor import Array, Tensor, require_floats
from gradwatch_reference.value import Value

Line = Callable[[float], float]  # the function along a direction: step -> value

# The step that balances truncation against rounding is about the cube root of the spacing at 1;
# float64 keeps the customary 1e-5.
_EPSILON: dict[Any, float] = {
    np.dtype(np.float64): 1e-5,
    np.dtype(np.float32): 5e-3,
    np.dtype(np.float16): 1e-1,
}
TOLERANCE: dict[Any, float] = {
    np.dtype(np.float64): 1e-5,
    np.dtype(np.float32): 1e-2,
    np.dtype(np.float16): 1e-1,
}
_FLOOR = 1e-8


def relative_error(analytic: float, numeric: float) -> float:
    """|a - n| / (|a| + |n| + 1e-8); infinite where either is not finite."""
    if not np.isfinite([analytic, numeric]).all():
        return np.inf
    return abs(analytic - numeric) / (abs(analytic) + abs(numeric) + _FLOOR)


def numerical_gradient(
    fn: Callable[[Any], Any], x: Any, epsilon: float | None = None, method: str = "central"
) -> Array:
    """The slope of the scalar function `fn` by each element of `x`, without any derivative rule.

    x: an array of floats or a number; the result has its shape.
    method: "central" is (f(x + h) - f(x - h)) / 2h with h = epsilon max(1, |x|), wrong by about
    h^2 f''' / 6. "complex" is Im f(x + ih) / h with h = 1e-20, exact to the last digit where fn is
    analytic: Squire and Trapp (1998).
    Raises TypeError for integers and, for "complex", where fn is not analytic; ValueError where fn
    is not scalar.
    """
    if method not in ("central", "complex"):
        raise ValueError(f'numerical_gradient: method is "central" or "complex", not {method!r}')
    x = np.asarray(float(x) if isinstance(x, int) else x.array if isinstance(x, Tensor) else x)
    require_floats(x, "numerical_gradient")
    slope = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        if method == "complex":
            moved = x.astype(np.complex128)
            moved[index] += 1e-20j
            value = np.asarray(_array_of(fn(_constant(moved))))
            if value.dtype.kind != "c":
                raise TypeError("numerical_gradient: fn drops the imaginary part; use central")
            slope[index] = value.item().imag / 1e-20
        else:
            h = (epsilon or _EPSILON[x.dtype]) * max(1.0, abs(float(x[index])))
            slope[index] = _central(_along(fn, x, index), h)
    return slope


def _along(fn: Callable[[Any], Any], x: Array, index: tuple[int, ...]) -> Line:
    def line(step: float) -> float:
        moved = x.copy()
        moved[index] += step
        value = np.asarray(_array_of(fn(_constant(moved))))
        if value.size != 1:
            raise ValueError(f"numerical_gradient of a function of shape {value.shape}: not scalar")
        return float(value.item())

    return line


def _central(line: Line, h: float) -> float:
    return (line(h) - line(-h)) / (2.0 * h)


# ---- the report


@dataclass(frozen=True)
class ParameterCheck:
    """What was found for one parameter. The worst element is that of the largest error."""

    name: str
    shape: tuple[int, ...]
    method: str  # "elements", or "directions" for a parameter too large for that
    relative_error: float  # the worst
    index: tuple[int, ...]  # where; for directions, the number of the direction
    analytic: float
    numeric: float
    kinks: tuple[tuple[int, ...], ...]  # where the slopes on the two sides differ: not judged
    is_right: bool
    note: str = ""  # why there is no gradient to compare, where there is none

    @property
    def verdict(self) -> str:
        return "WRONG" if not self.is_right else "kink" if self.kinks else "right"


@dataclass(frozen=True)
class GradientReport:
    """The outcome of `gradient_check`; true when every parameter's gradient is right."""

    parameters: tuple[ParameterCheck, ...]
    tolerance: float

    @property
    def is_right(self) -> bool:
        return all(parameter.is_right for parameter in self.parameters)

    @property
    def worst(self) -> ParameterCheck:
        return max(self.parameters, key=lambda parameter: parameter.relative_error)

    def __bool__(self) -> bool:
        return self.is_right

    def __getitem__(self, name: str) -> ParameterCheck:
        return next(parameter for parameter in self.parameters if parameter.name == name)

    def __str__(self) -> str:
        rows = [
            f"{p.verdict:>7}  {p.name:<12} {p.shape!s:<14} error {p.relative_error:8.1e} at "
            f"{p.index!s:<10} analytic {p.analytic:+.6e} numeric {p.numeric:+.6e}"
            + (f"  kinks at {list(p.kinks)}" if p.kinks else "")
            + (f"  {p.note}" if p.note else "")
            for p in self.parameters
        ]
        return "\n".join(rows)


def gradient_check(
    fn: Callable[..., Any],
    params: Any,
    *,
    epsilon: float | None = None,
    tolerance: float | None = None,
    directions: int = 4,
    elementwise_limit: int = 1000,
) -> GradientReport:
    """Compare the engine's gradients of `fn` with slopes measured by central differences.

    fn: returns a Tensor, Value or number; anything but a scalar is first weighted with fixed random
    numbers and summed. It is called as fn(*params) for a sequence, fn(**params) for a dictionary,
    fn(params) for a single array, and fn() if it takes nothing, its parameters then being the
    Tensors or Values in `params`, whose data is moved and put back.
    epsilon, tolerance: 1e-5 and 1e-5 for float64, larger for shorter floats.
    directions: how many random directions to try on a parameter of more than `elementwise_limit`
    elements, in place of all elements: <gradient, v> against the slope along v, |v| = 1.

    An element where fn has a kink (relu at 0, tied maxima) has two slopes; it is reported, and
    called wrong only when the gradient is outside them.
    Raises TypeError for integer parameters.
    """
    problem = _Problem(fn, params)
    try:
        gradients = problem.gradients()
    except CotangentShapeError as error:
        return _no_gradients(problem, str(error))
    checks: list[ParameterCheck] = []
    limits = [tolerance or TOLERANCE[x.dtype] for x in problem.arrays]
    for i, (name, x) in enumerate(zip(problem.names, problem.arrays, strict=True)):
        h, limit, spacing = epsilon or _EPSILON[x.dtype], limits[i], float(np.finfo(x.dtype).eps)
        by_elements = x.size <= elementwise_limit
        probes = _elements(x, h) if by_elements else _random_directions(x, h, directions)
        found: list[tuple[tuple[int, ...], _Probe]] = []
        for index, direction, step in probes:
            slope = float(np.sum(gradients[i] * direction))
            found.append((index, _probe(problem.line(i, direction), slope, step, limit, spacing)))
        method = "elements" if by_elements else "directions"
        checks.append(_summary(name, x.shape, method, found, limit))
    return GradientReport(tuple(checks), max(limits, default=TOLERANCE[np.dtype(float)]))


def _no_gradients(problem: _Problem, note: str) -> GradientReport:
    named = zip(problem.names, problem.arrays, strict=True)
    return GradientReport(
        tuple(
            ParameterCheck(name, x.shape, "none", np.inf, (), np.nan, np.nan, (), False, note)
            for name, x in named
        ),
        0.0,
    )


def _elements(x: Array, h: float) -> Iterator[tuple[tuple[int, ...], Array, float]]:
    for index in np.ndindex(*x.shape):
        direction = np.zeros(x.shape)
        direction[index] = 1.0
        yield index, direction, h * max(1.0, abs(float(x[index])))


def _random_directions(
    x: Array, h: float, count: int
) -> Iterator[tuple[tuple[int, ...], Array, float]]:
    rng = np.random.default_rng(0)
    for number in range(count):
        direction = rng.normal(size=x.shape)
        yield (number,), direction / np.linalg.norm(direction), h * max(1.0, float(np.std(x)))


@dataclass(frozen=True)
class _Probe:
    analytic: float
    numeric: float
    relative_error: float
    is_kink: bool


def _probe(line: Line, analytic: float, h: float, tolerance: float, spacing: float) -> _Probe:
    """Compare `analytic` with the slope of `line` at 0, and say whether 0 is a kink."""
    here, right, left = line(0.0), line(h), line(-h)
    numeric = (right - left) / (2.0 * h)
    error = relative_error(analytic, numeric)
    noise = 10.0 * spacing * max(abs(here), abs(right), abs(left)) / h
    if abs(analytic - numeric) <= noise:
        error = min(error, tolerance)  # rounding of fn itself: nothing smaller can be measured
    slopes = _two_slopes(line, here, h, noise)
    if slopes is not None:
        slack = 10.0 * noise + tolerance * max(map(abs, slopes))
        inside = min(slopes) - slack <= analytic <= max(slopes) + slack
        return _Probe(analytic, numeric, 0.0 if inside else error, is_kink=True)
    for factor in (0.1, 0.01, 10.0):  # a kink nearby, or a strong curve, shows at another step
        if error <= tolerance:
            break
        other = _central(line, factor * h)
        if relative_error(analytic, other) < error:
            numeric, error = other, relative_error(analytic, other)
    return _Probe(analytic, numeric, error, is_kink=False)


def _two_slopes(line: Line, here: float, h: float, noise: float) -> tuple[float, float] | None:
    """The slopes on both sides, where they differ and go on differing as the step shrinks."""
    previous = None
    for step in (h, h / 30.0):
        left, right = (here - line(-step)) / step, (line(step) - here) / step
        gap = abs(right - left)
        if not gap > 1e-3 * (abs(left) + abs(right)) + 100.0 * noise:
            return None
        if previous is not None and gap < 0.5 * previous:
            return None  # it shrinks with the step: a curve
        previous = gap
    return left, right


def _summary(
    name: str,
    shape: tuple[int, ...],
    method: str,
    found: Sequence[tuple[tuple[int, ...], _Probe]],
    tolerance: float,
) -> ParameterCheck:
    kinks = tuple(index for index, probe in found if probe.is_kink)
    if not found:
        return ParameterCheck(name, shape, method, 0.0, (), 0.0, 0.0, (), is_right=True)
    index, worst = max(found, key=lambda pair: pair[1].relative_error)
    return ParameterCheck(
        name,
        shape,
        method,
        worst.relative_error,
        index,
        worst.analytic,
        worst.numeric,
        kinks,
        is_right=worst.relative_error <= tolerance,
    )


class _Problem:
    """`fn` as a scalar function of a list of arrays, whichever way it takes its parameters."""

    def __init__(self, fn: Callable[..., Any], params: Any) -> None:
        self.fn = fn
        self.params = params
        named = trees.named_leaves(params)
        self.leaves: list[Any] = [leaf for _, leaf in named]
        self.names = [name or "x" for name, _ in named]
        self.arrays = [_floats(leaf) for leaf in self.leaves]
        self.takes_nothing = not inspect.signature(fn).parameters
        self.weight: Array | None = None

    def line(self, i: int, direction: Array) -> Line:
        def value(step: float) -> float:
            moved = list(self.arrays)
            moved[i] = (moved[i] + step * direction).astype(moved[i].dtype)
            return float(np.sum(_array_of(self._value_at(moved))))

        return value

    def gradients(self) -> list[Array]:
        nodes = self._nodes(self.arrays)
        earlier = [node.grad for node in nodes]
        for node in nodes:
            node.zero_grad()
        self._call(nodes).backward()
        found = [
            np.zeros(x.shape) if node.grad is None else np.asarray(node.grad)
            for node, x in zip(nodes, self.arrays, strict=True)
        ]
        for node, grad in zip(nodes, earlier, strict=True):
            node.grad = grad
        return found

    def _value_at(self, arrays: Sequence[Array]) -> Any:
        if not self.takes_nothing:
            return self._call(self._nodes(arrays))
        self._put(arrays)
        try:
            return self._call(self.leaves)
        finally:
            self._put(self.arrays)

    def _nodes(self, arrays: Sequence[Array]) -> list[Any]:
        """The leaves that fn closes over, or new ones to call it with."""
        if self.takes_nothing:
            return self.leaves
        kinds: list[Any] = [Value if isinstance(leaf, Value) else Tensor for leaf in self.leaves]
        return [kind(array) for kind, array in zip(kinds, arrays, strict=True)]

    def _put(self, arrays: Sequence[Array]) -> None:
        for leaf, array in zip(self.leaves, arrays, strict=True):
            if isinstance(leaf, Value):
                leaf.data = float(array)
            else:
                leaf.data = array

    def _call(self, leaves: Sequence[Any]) -> Any:
        params = trees.rebuild(self.params, leaves)
        if self.takes_nothing:
            out = self.fn()
        elif isinstance(params, dict):
            out = self.fn(**params)
        else:
            out = self.fn(*params) if isinstance(params, (list, tuple)) else self.fn(params)
        return self._weighted(out)

    def _weighted(self, out: Any) -> Any:
        shape = np.shape(_array_of(out))
        if np.prod(shape) == 1:
            return out
        if self.weight is None:
            self.weight = np.random.default_rng(1).normal(size=shape)
        return (out * self.weight).sum()


def _floats(leaf: Any) -> Array:
    array = leaf.data if isinstance(leaf, (Tensor, Value)) else leaf
    array = np.asarray(float(array) if isinstance(array, int) else array)
    require_floats(array, "gradient_check")
    return array


def _constant(array: Array) -> Tensor:
    return Tensor(array, requires_grad=False)


def _array_of(x: Any) -> Any:
    return x.array if isinstance(x, Tensor) else x.data if isinstance(x, Value) else x
