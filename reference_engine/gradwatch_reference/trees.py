"""Parameters in lists, tuples and dictionaries, nested as a network's are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast


def leaves(tree: Any) -> list[Any]:
    """What the lists, tuples and dictionaries of `tree` hold, in order."""
    return [leaf for _, leaf in named_leaves(tree)]


def named_leaves(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """The leaves of `tree` with the path to each, as "layers[0].weight"."""
    if isinstance(tree, dict):
        items = cast("dict[str, Any]", tree).items()
        branches = [(f"{name}.{key}" if name else str(key), value) for key, value in items]
    elif isinstance(tree, (list, tuple)):
        values = cast("Sequence[Any]", tree)
        branches = [(f"{name}[{i}]", value) for i, value in enumerate(values)]
    else:
        return [(name, tree)]
    return [leaf for path, branch in branches for leaf in named_leaves(branch, path)]


def rebuild(tree: Any, new: Sequence[Any]) -> Any:
    """A tree of the shape of `tree` that holds `new` in place of its leaves."""
    supply = iter(new)
    return map_leaves(lambda _: next(supply), tree)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of the shape of `tree` that holds `function` of each leaf."""
    if isinstance(tree, dict):
        items = cast("dict[str, Any]", tree).items()
        return {key: map_leaves(function, value) for key, value in items}
    if isinstance(tree, list):
        return [map_leaves(function, value) for value in cast("list[Any]", tree)]
    if isinstance(tree, tuple):
        return tuple(map_leaves(function, value) for value in cast("tuple[Any, ...]", tree))
    return function(tree)
