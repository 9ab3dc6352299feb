"""Tensors inside of arguments and results: found, and replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

MAX_DEPTH = 6


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Every tensor of a value: of tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif depth < MAX_DEPTH:
        for item in _items(value):
            yield from tensors_in(item, depth + 1)


def replaced(value: Any, replace: Callable[[Tensor], Tensor], depth: int = 0) -> Any:
    """The same value with other tensors in it; the given one is left as it is."""
    if isinstance(value, Tensor):
        return replace(value)
    if depth >= MAX_DEPTH or not any(True for _ in tensors_in(value, depth)):
        return value

    def inner(item: Any) -> Any:
        return replaced(item, replace, depth + 1)

    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(inner, value))  # a named tuple
    if isinstance(value, list | tuple):
        return type(value)(map(inner, value))
    other: Any = copy.copy(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            other[key] = inner(item)
    else:
        for field in fields(value):
            object.__setattr__(other, field.name, inner(getattr(value, field.name)))
    return other


def _items(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, Mapping):
        return list(value.values())
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in fields(value)]
    return []
