"""What an operation is: a value, and the two ways in which derivatives pass through it.

A primitive f has, for each argument, two rules that are each other's transpose:

    vjp(g, out, *args, **params)   the cotangent of `out` -> that of the argument (reverse mode)
    jvp(t, out, *args, **params)   the tangent of the argument -> that of `out`   (forward mode)

Rules are written in terms of primitives, so they can be differentiated in their turn: every
higher order comes for free. Three constructors cover almost everything: `pointwise` (one
derivative serves both rules), `linear_map` (the jvp is the primitive itself), and `primitive`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradwatch_reference import forward
from gradwatch_reference.loans import borrow
from gradwatch_reference.tensor import Tensor, shape_of

Rule = Callable[..., Tensor]
Rules = Sequence[Rule | None] | Callable[[int], Rule]

TABLE: dict[str, Primitive] = {}  # every primitive, by its name


class Case(NamedTuple):
    """An example of a call. A tuple of ints among `args` stands for a random array of that shape.

    Every primitive has at least one: the checks against finite differences and against torch walk
    the table and call each primitive on its cases.
    """

    args: tuple[Any, ...]
    params: dict[str, Any]


def case(*args: Any, **params: Any) -> Case:
    """An example call, written as the call itself; see `Case`."""
    return Case(args, params)


class Primitive:
    """A function of arrays whose derivatives are known. Calling it records it."""

    def __init__(
        self,
        name: str,
        value: Callable[..., Any],
        vjps: Rules,
        jvps: Rules,
        *,
        cases: Sequence[Case],
        domain: tuple[float, float] = (-2.0, 2.0),
        analytic: bool = True,
    ) -> None:
        self.name = name
        self.value = value
        self.vjps = vjps
        self.jvps = jvps
        self.cases = cases
        self.domain = domain  # where the random arrays of the cases are drawn from
        self.analytic = analytic  # whether it may be evaluated at complex numbers

    def __call__(self, *args: Any, **params: Any) -> Tensor:
        args = tuple([Tensor.borrowed(x) if isinstance(x, np.ndarray) else x for x in args])
        arrays = tuple([x.array if isinstance(x, Tensor) else x for x in args])
        if not self.analytic and any(map(np.iscomplexobj, arrays)):
            raise TypeError(f"{self.name} of {_describe(arrays)}: it has no complex derivative")
        try:
            array = self.value(*arrays, **params)
        except (IndexError, ValueError, TypeError) as error:
            raise _kind(error)(f"{self.name} of {_describe(arrays)}: {error}") from error
        out = Tensor.constant(array if isinstance(array, np.ndarray) else np.asarray(array))
        parents = tuple([x for x in args if isinstance(x, Tensor) and x.requires_grad])
        if parents and out.array.dtype.kind == "f":
            out.requires_grad = True
            out.primitive = self
            out.args, out.saved, out.params, out.parents = args, arrays, params, parents
        else:
            _pass_on_loans(out, args)
        for x in args:
            if isinstance(x, Tensor) and x.tangents:
                forward.push(self, out, args, params)
                break
        return out

    def vjp(self, position: int) -> Rule | None:
        return _rule(self.vjps, position)

    def jvp(self, position: int) -> Rule | None:
        return _rule(self.jvps, position)

    def pullback(
        self,
        cotangent: Tensor,
        out: Tensor,
        args: Sequence[Any],
        params: dict[str, Any],
        positions: Sequence[int],
    ) -> Iterator[Tensor]:
        """The cotangents of the arguments at `positions`."""
        for position in positions:
            rule = self.vjp(position)
            if rule is None:
                raise TypeError(f"{self.name} has no derivative by its argument {position}")
            yield rule(cotangent, out, *args, **params)

    def pushforward(
        self,
        tangents: Sequence[Tensor | None],
        out: Tensor,
        args: Sequence[Any],
        params: dict[str, Any],
    ) -> Tensor | None:
        """The tangent of `out`; None where no argument moves."""
        total = None
        for position, tangent in enumerate(tangents):
            rule = self.jvp(position)
            if tangent is not None and rule is not None:
                share = rule(tangent, out, *args, **params)
                total = share if total is None else total + share
        return total

    def __repr__(self) -> str:
        return f"<primitive {self.name}>"


def primitive(
    name: str, value: Callable[..., Any], vjps: Rules, jvps: Rules, **of: Any
) -> Primitive:
    """Define a primitive and enter it in the table. Raises ValueError without an example call."""
    if name in TABLE:
        raise ValueError(f"a primitive named {name} exists already")
    if not of.get("cases"):
        raise ValueError(f"primitive {name} needs at least one case to be checked on")
    TABLE[name] = Primitive(name, value, vjps, jvps, **of)
    return TABLE[name]


def linear_map(name: str, value: Callable[..., Any], *vjps: Rule | None, **of: Any) -> Primitive:
    """A primitive that is linear in each argument that has a vjp: its jvp is itself."""

    def jvp(position: int) -> Rule:
        def rule(t: Tensor, out: Tensor, *args: Any, **params: Any) -> Tensor:
            return itself(*args[:position], t, *args[position + 1 :], **params)

        return rule

    itself = primitive(name, value, vjps, [jvp(i) if r else None for i, r in enumerate(vjps)], **of)
    return itself


def pointwise(
    name: str, value: Callable[..., Any], *derivatives: Callable[..., Any] | float | None, **of: Any
) -> Primitive:
    """A primitive that works element by element, its arguments broadcast against each other.

    derivatives: by each argument, as functions of (out, *args, **params), or numbers where they are
    constant; None for an argument that has none. A boolean derivative selects: it passes 1 or 0.
    """

    def vjp(position: int, derivative: Callable[..., Any] | float) -> Rule:
        def rule(g: Tensor, out: Tensor, *args: Any, **params: Any) -> Tensor:
            factor = derivative(out, *args, **params) if callable(derivative) else derivative
            return shapes.sum_to(_scaled(g, factor), shape_of(args[position]))

        return rule

    def jvp(derivative: Callable[..., Any] | float) -> Rule:
        def rule(t: Tensor, out: Tensor, *args: Any, **params: Any) -> Tensor:
            factor = derivative(out, *args, **params) if callable(derivative) else derivative
            return shapes.broadcast_to(_scaled(t, factor), out.shape)

        return rule

    of.setdefault("cases", _POINTWISE_CASES.get(len(derivatives)))
    return primitive(
        name,
        value,
        [None if d is None else vjp(i, d) for i, d in enumerate(derivatives)],
        [None if d is None else jvp(d) for d in derivatives],
        **of,
    )


_POINTWISE_CASES = {
    1: (case((2, 3)), case(()), case((0, 3))),
    2: (
        case((2, 3), (2, 3)),
        case((2, 3), (3,)),
        case((2, 1), (1, 3)),
        case((), (2, 3)),
        case((0, 3), (1, 3)),
    ),
}


def _scaled(x: Tensor, factor: Any) -> Tensor:
    if isinstance(factor, float):
        return x if factor == 1.0 else -x if factor == -1.0 else x * factor
    if isinstance(factor, np.ndarray) and factor.dtype == bool:
        return elementwise.where(factor, x, 0.0)  # not a product: 0 * inf would be NaN
    return x * factor


def _rule(rules: Rules, position: int) -> Rule | None:
    if callable(rules):
        return rules(position)
    return rules[position] if position < len(rules) else None


def _kind(error: Exception) -> type[Exception]:
    """The plain kind of an error of numpy's, whose own kinds take other arguments."""
    if isinstance(error, IndexError):
        return IndexError
    return ValueError if isinstance(error, ValueError) else TypeError


def _pass_on_loans(out: Tensor, args: Sequence[Any]) -> None:
    """A view of a borrowed array is on loan as well."""
    if out.array.dtype == object:
        raise TypeError("a Tensor and an object that is no number were put into one array")
    for x in args:
        if isinstance(x, Tensor) and x.fingerprint and np.may_share_memory(out.array, x.array):
            out.array, out.fingerprint = borrow(out.array)


def _describe(arrays: Sequence[Any]) -> str:
    kinds = [f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else repr(x) for x in arrays]
    return " and ".join(kinds)


# Rules are made of primitives, which are made by this module.
from gradwatch_reference import elementwise, shapes  # noqa: E402
