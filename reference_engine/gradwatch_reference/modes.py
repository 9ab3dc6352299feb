"""Modes of differentiation: functions that take a function and return one of its derivatives.

All are made of two: `vjp` sweeps back over the recorded graph (one pass for the gradient by every
input), `jvp` carries a tangent forward (one pass for one direction, nothing stored). They nest in
each other to any depth. Functions take and return arrays, Tensors or numbers; arguments may be
lists, tuples and dictionaries of these. A result is a Tensor where an argument was one or where an
enclosing derivative needs it, and a plain array otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradwatch_reference import trees
from gradwatch_reference.elementwise import identity
from gradwatch_reference.forward import Level, bare, below, dual, open_levels
from gradwatch_reference.primitive import Primitive
from gradwatch_reference.reverse import Sweep, cotangent_of, owned
from gradwatch_reference.shapes import reshape, stack
from gradwatch_reference.tensor import Tensor, require_floats

Function = Callable[..., Any]

# ---- the two that everything is made of


def vjp(fn: Function, *primals: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """fn(*primals), and the function that takes a cotangent of it to those of the primals.

    The pullback may be called many times. It raises ValueError for a cotangent of another shape.
    """
    given = trees.leaves(primals)
    watched = [_watched(x, "vjp") for x in given]
    out = _as_tensor(fn(*trees.rebuild(primals, watched)))
    sweep = Sweep(out, watched)

    def pullback(cotangent: Any) -> tuple[Any, ...]:
        cotangents = sweep.cotangents(cotangent_of(out, cotangent, "vjp"))
        shares = [cotangents[x] if x in cotangents else _zeros_like(x) for x in watched]
        return trees.rebuild(primals, _released(shares, given))

    value = out if sweep.is_observed else bare(out)
    return _released([value], given, shared=True)[0], pullback


def jvp(fn: Function, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """fn at the primals, and its derivative there in the direction of the tangents.

    primals, tangents: two tuples of arguments, alike in structure and shapes; or, for a function of
    one argument, that argument and its tangent. Raises ValueError where the shapes differ.
    """
    if not isinstance(primals, tuple):
        primals, tangents = (primals,), (tangents,)
    given, directions = trees.leaves(primals), trees.leaves(tangents)
    if len(given) != len(directions):
        raise ValueError(f"jvp: {len(given)} primals but {len(directions)} tangents")
    with Level() as level:
        moving = [_dual(x, t, level) for x, t in zip(given, directions, strict=True)]
        out = _as_tensor(fn(*trees.rebuild(primals, moving)))
        tangent = out.tangents.get(level, _zeros_like(out))
        out = below(out, level)
    value, tangent = _released([out, tangent], [*given, *directions], shared=True)
    return value, tangent


# ---- gradients


def value_and_grad(fn: Function, argnums: int | Sequence[int] = 0) -> Function:
    """A function that returns fn(*args) and its gradient by the arguments at `argnums`.

    The gradient is shaped as the argument; for several argnums, a tuple. The function it returns
    raises ValueError when fn gives anything but a scalar, TypeError for integer arguments.
    """
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def value_and_gradient(*args: Any, **options: Any) -> tuple[Any, Any]:
        chosen, of_chosen = _choose(lambda *args: fn(*args, **options), args, positions)
        value, pullback = vjp(of_chosen, *chosen)
        if np.size(value) != 1:
            name = getattr(fn, "__name__", "the function")
            raise ValueError(
                f"grad of {name}, which returned shape {np.shape(value)}: only a scalar has a "
                "gradient; use vjp or jacobian"
            )
        gradients = pullback(None)
        return value, gradients[0] if isinstance(argnums, int) else gradients

    return value_and_gradient


def grad(fn: Function, argnums: int | Sequence[int] = 0) -> Function:
    """A function that returns the gradient of the scalar function `fn`; see `value_and_grad`."""
    both = value_and_grad(fn, argnums)

    def gradient(*args: Any, **options: Any) -> Any:
        return both(*args, **options)[1]

    return gradient


# ---- whole matrices of derivatives


def jacobian(fn: Function, mode: str = "reverse") -> Function:
    """A function of one array that returns d fn(x) / dx, shaped [*fn(x).shape, *x.shape].

    mode: "reverse" costs one pass for each output, "forward" one for each input.
    Raises ValueError for any other mode.
    """
    if mode not in ("reverse", "forward"):
        raise ValueError(f'jacobian: mode is "reverse" or "forward", not {mode!r}')

    def by_rows(x: Any) -> Any:
        value, pullback = vjp(fn, x)
        rows = [pullback(direction)[0] for direction in _basis(value)]
        return _stacked(rows, (*np.shape(value), *np.shape(x)), axis=0)

    def by_columns(x: Any) -> Any:
        columns = [jvp(fn, (x,), (direction,))[1] for direction in _basis(x)]
        shape = np.shape(columns[0]) if columns else np.shape(vjp(fn, x)[0])
        return _stacked(columns, (*shape, *np.shape(x)), axis=-1)

    return by_rows if mode == "reverse" else by_columns


def hessian(fn: Function) -> Function:
    """A function of one array that returns the second derivatives of the scalar function `fn`.

    Shaped [*x.shape, *x.shape]. Forward over reverse: one pass for each input.
    """
    return jacobian(grad(fn), mode="forward")


def hvp(fn: Function, primal: Any, direction: Any) -> Any:
    """The Hessian of the scalar function `fn` times `direction`, without making the Hessian.

    Forward over reverse, at a small multiple of the cost of one gradient: Pearlmutter (1994), "Fast
    exact multiplication by the Hessian". `primal` may be a tree, `direction` one alike.
    """
    given, directions = trees.leaves(primal), trees.leaves(direction)
    with Level() as level:
        moving = [_dual(x, t, level) for x, t in zip(given, directions, strict=True)]
        gradients = trees.leaves(grad(fn)(trees.rebuild(primal, moving)))
        products = [x.tangents.get(level, _zeros_like(x)) for x in gradients]
    return trees.rebuild(primal, _released(products, [*given, *directions]))


# ---- memory


class _Recomputed(Primitive):
    """A function treated as one primitive, whose inside is not kept but computed again."""

    def __init__(self, fn: Function) -> None:
        self.fn = fn
        super().__init__(
            f"checkpoint({getattr(fn, '__name__', 'fn')})", self._run, (), (), cases=()
        )

    def _run(self, *arrays: Any) -> Any:
        out = _as_tensor(self.fn(*map(_constant, arrays)))
        if out.requires_grad:
            raise ValueError(
                f"{self.name} uses a Tensor that requires a gradient and is not an argument: its "
                "gradient would be lost; pass it as one"
            )
        return out.array

    def pullback(
        self,
        cotangent: Tensor,
        out: Tensor,
        args: Sequence[Any],
        params: dict[str, Any],
        positions: Sequence[int],
    ) -> Any:
        chosen, of_chosen = _choose(self.fn, args, positions)
        return vjp(of_chosen, *chosen)[1](cotangent)

    def pushforward(
        self,
        tangents: Sequence[Tensor | None],
        out: Tensor,
        args: Sequence[Any],
        params: dict[str, Any],
    ) -> Tensor | None:
        positions = [i for i, tangent in enumerate(tangents) if tangent is not None]
        chosen, of_chosen = _choose(self.fn, args, positions)
        return jvp(of_chosen, chosen, tuple(tangents[i] for i in positions))[1]


def checkpoint(fn: Function) -> Function:
    """`fn`, storing only its arguments: what is inside is computed again in the backward sweep.

    fn takes arrays or Tensors and returns one Tensor. A chain of n steps kept as sqrt(n)
    checkpointed pieces holds O(sqrt(n)) arrays at a time instead of n, for one more forward pass:
    Chen et al. (2016), "Training deep nets with sublinear memory cost".
    Raises ValueError when fn uses a Tensor that requires a gradient and is not an argument.
    """
    return _Recomputed(fn)


# ---- ends of the wire


def _choose(
    fn: Function, args: Sequence[Any], positions: Sequence[int]
) -> tuple[tuple[Any, ...], Function]:
    """The arguments at `positions`, and `fn` as a function of them, the others held fixed."""
    positions = [range(len(args))[position] for position in positions]  # -1 is the last

    def of_chosen(*chosen: Any) -> Any:
        moved = dict(zip(positions, chosen, strict=True))
        return fn(*(moved.get(i, x) for i, x in enumerate(args)))

    return tuple(args[position] for position in positions), of_chosen


def _watched(x: Any, asker: str) -> Tensor:
    """A node that stands for `x` and for nothing else, with its gradient recorded."""
    if isinstance(x, Tensor):
        require_floats(x.array, asker)
        node = identity(x)
        node.requires_grad = True
        return node
    if isinstance(x, np.ndarray):
        require_floats(x, asker)
        return Tensor.borrowed(x, requires_grad=True)
    node = Tensor(x)
    require_floats(node.array, asker)
    return node


def _dual(x: Any, direction: Any, level: Level) -> Tensor:
    primal = x if isinstance(x, Tensor) else Tensor(x, requires_grad=False)
    require_floats(primal.array, "jvp")
    return dual(primal, cotangent_of(primal, direction, "jvp"), level)


def _as_tensor(x: Any) -> Tensor:
    if not isinstance(x, (Tensor, np.ndarray, np.generic, int, float)):
        raise TypeError(f"the function returned {type(x).__name__}; it must return one Tensor")
    return x if isinstance(x, Tensor) else Tensor(x, requires_grad=False)


def _constant(x: Any) -> Any:
    return Tensor.constant(x) if isinstance(x, np.ndarray) else x


def _zeros_like(x: Tensor) -> Tensor:
    return Tensor.constant(np.zeros_like(x.array))


def _released(results: Sequence[Tensor], given: Sequence[Any], shared: bool = False) -> list[Any]:
    """The results as they leave a mode: Tensors where anything outside is one, else arrays.

    shared: whether a graph, or the caller, may hold the same arrays; they are copied then.
    """
    outside = any(isinstance(x, Tensor) for x in given)
    if outside or any(x.requires_grad or open_levels(x) for x in results):
        return list(results)
    return [x.numpy() for x in results] if shared else list(owned(results))


def _basis(x: Any) -> list[Any]:
    size, shape = int(np.size(x)), np.shape(x)
    return [row.reshape(shape) for row in np.eye(size)]


def _stacked(parts: Sequence[Any], shape: tuple[int, ...], axis: int) -> Any:
    if any(isinstance(part, Tensor) for part in parts):
        return reshape(stack(parts, axis), shape)
    return np.stack(parts, axis).reshape(shape) if parts else np.zeros(shape)


__all__ = ["checkpoint", "grad", "hessian", "hvp", "jacobian", "jvp", "value_and_grad", "vjp"]
