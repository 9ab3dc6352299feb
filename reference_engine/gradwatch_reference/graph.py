"""The order in which a computation is walked backwards."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol, Self, TypeVar


class Node(Protocol):
    """Anything that knows what it was computed from."""

    @property
    def parents(self) -> Sequence[Self]: ...


N = TypeVar("N", bound=Node)


def topological_order(root: N, until: Container[N] = ()) -> list[N]:
    """Every node that `root` was computed from, each after all of its consumers.

    The walk does not go beneath a node in `until`.

    Kahn (1962), "Topological sorting of large networks". Iterative: depth costs no recursion.
    """
    waiting = {root: 0}  # how many consumers of a node are still to be walked
    found = [root]
    while found:
        node = found.pop()
        for parent in () if node in until else node.parents:
            if parent in waiting:
                waiting[parent] += 1
            else:
                waiting[parent] = 1
                found.append(parent)

    order = [root]
    for node in order:  # grows while it is walked
        for parent in () if node in until else node.parents:
            waiting[parent] -= 1
            if not waiting[parent]:
                order.append(parent)
    return order
