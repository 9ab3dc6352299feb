"""Forward mode: dual numbers, whose tangents ride along with the values.

A Tensor may carry one tangent for each `jvp` it is inside of. Each jvp opens a `Level`, and a
tangent belongs to one level and itself carries tangents of lower (outer) levels only. So
x + e1 t1 + e2 (t2 + e1 t21) is `x` with tangents {1: t1, 2: t2}, where t2 has {1: t21}, and no
level can take another's perturbation for its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradwatch_reference.tensor import Tensor

if TYPE_CHECKING:
    from gradwatch_reference.primitive import Primitive


class Level:
    """One running `jvp`; later ones are higher. Once closed, its tangents count for nothing."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.is_open = True

    def __enter__(self) -> Level:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False


def open_levels(x: Any) -> list[Level]:
    """The levels whose tangents `x` carries, lowest first."""
    if not isinstance(x, Tensor):
        return []
    return sorted((level for level in x.tangents if level.is_open), key=lambda level: level.number)


def dual(primal: Tensor, tangent: Tensor, level: Level) -> Tensor:
    """`primal` + e `tangent`, where e belongs to `level`."""
    x = primal.detach() if not primal.requires_grad else elementwise.identity(primal)
    x.tangents = {**{each: primal.tangents[each] for each in open_levels(primal)}, level: tangent}
    return x


def bare(x: Tensor) -> Tensor:
    """The numbers of `x` and its tangents, without the history of either."""
    plain = x.detach()
    if x.tangents:
        plain.tangents = {level: bare(x.tangents[level]) for level in open_levels(x)}
    return plain


def below(x: Any, level: Level) -> Any:
    """`x` without its tangents of `level` and above."""
    if not isinstance(x, Tensor) or not x.tangents:
        return x
    lower = {each: x.tangents[each] for each in open_levels(x) if each.number < level.number}
    plain = x.detach()
    if x.requires_grad:
        # The identity is linear: recorded on what x is, without pushing its tangents on.
        plain.requires_grad = True
        plain.primitive, plain.params = elementwise.identity, {}
        plain.args, plain.saved, plain.parents = (x,), (x.array,), (x,)
    plain.tangents = lower
    return plain


def push(primitive: Primitive, out: Tensor, args: Sequence[Any], params: dict[str, Any]) -> None:
    """Give `out`, just computed from `args`, the tangents that theirs imply."""
    levels = {level for x in args for level in open_levels(x)}
    for level in sorted(levels, key=lambda level: level.number):
        tangents = [x.tangents.get(level) if isinstance(x, Tensor) else None for x in args]
        primals = [below(x, level) for x in args]
        pushed = primitive.pushforward(tangents, below(out, level), primals, params)
        if pushed is not None:
            out.tangents = {**out.tangents, level: pushed}


from gradwatch_reference import elementwise  # noqa: E402 (made of Tensors, as is this module)
