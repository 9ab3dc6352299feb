"""Reverse mode: cotangents walk the recorded graph from the result back to what it came from."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike

from gradwatch_reference.forward import bare
from gradwatch_reference.graph import topological_order
from gradwatch_reference.loans import fingerprint
from gradwatch_reference.tensor import Array, Tensor, shape_of


class CotangentShapeError(ValueError):
    """A rule of a primitive is wrong: what it returns does not have the shape of its argument."""


class Sweep:
    """The way back from `root` to the `wanted` nodes, found once and walked for each seed."""

    def __init__(self, root: Tensor, wanted: Collection[Tensor]) -> None:
        self.root = root
        self.wanted = set(wanted)
        self.order = topological_order(root, until=self.wanted)
        self.needed = set(wanted)  # the nodes on a path to a wanted one
        for node in reversed(self.order):
            if not self.needed.isdisjoint(node.parents):
                self.needed.add(node)
        # Whether something outside is differentiated too, so that the way back must be recorded:
        # a leaf that is not wanted, or a wanted node that is not a leaf.
        self.is_observed = any(
            node.requires_grad and (node.primitive is None) != (node in self.wanted)
            for node in self.order
        )

    def cotangents(self, seed: Tensor, keep_all: bool = False) -> dict[Tensor, Tensor]:
        """Those of the wanted nodes when that of the root is `seed`; absent where it is zero.

        With `keep_all`, those of the nodes on the way there too.

        The rules run on bare numbers, or, where someone further out will differentiate the result
        again, on the recorded nodes themselves.
        """
        recording = self.is_observed or seed.requires_grad
        found = {self.root: seed} if self.root in self.needed else {}
        checked: set[Tensor] = set()
        for node in self.order:
            if node in self.wanted or node not in found:
                continue
            _check_saved(node, checked)
            cotangent = found[node] if keep_all else found.pop(node)
            for parent, share in _shares(node, cotangent, self.needed, recording):
                found[parent] = found[parent] + share if parent in found else share
        return found


def accumulate_gradients(root: Tensor, seed: ArrayLike | None) -> None:
    """See `Tensor.backward`."""
    if not root.requires_grad:
        raise TypeError(f"backward from a constant of shape {root.shape}: nothing to differentiate")
    leaves = [node for node in topological_order(root) if node.primitive is None]
    cotangents = Sweep(root, leaves).cotangents(cotangent_of(root, seed, "backward"))
    gradients = owned([cotangents[leaf] for leaf in leaves])
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def cotangent_of(root: Tensor, seed: ArrayLike | Tensor | None, asker: str) -> Tensor:
    """`seed` as a Tensor of the shape and dtype of `root`; ones where it is None."""
    if seed is None:
        if root.size != 1:
            raise ValueError(
                f"{asker} from a result of shape {root.shape}{_by(root)}: only a scalar has a "
                "gradient; give a seed of that shape, or reduce it first, as by .sum()"
            )
        return Tensor.constant(np.ones(root.shape, root.dtype))
    if not isinstance(seed, Tensor):
        seed = Tensor.constant(np.array(seed, root.dtype))
    elif not seed.requires_grad and not seed.tangents:
        seed = Tensor.constant(seed.numpy())  # it may come out again as a gradient, to write to
    if seed.shape != root.shape:
        raise ValueError(f"{asker}: a seed of shape {seed.shape} for a result of {root.shape}")
    return seed


def owned(cotangents: Sequence[Tensor]) -> list[Array]:
    """The arrays of the cotangents, each its receiver's own to write to."""
    given: set[int] = set()
    arrays: list[Array] = []
    for array in (x.array for x in cotangents):
        if array.base is not None or id(array) in given:
            array = array.copy()
        given.add(id(array))
        array.flags.writeable = True
        arrays.append(array)
    return arrays


def _shares(
    node: Tensor, cotangent: Tensor, needed: Collection[Tensor], recording: bool
) -> list[tuple[Tensor, Tensor]]:
    """What `node` hands to each of its arguments that is needed."""
    assert node.primitive is not None
    positions = [i for i, x in enumerate(node.args) if isinstance(x, Tensor) and x in needed]
    parents = [node.args[position] for position in positions]
    out, args = node, node.args
    if not recording:
        out, args = bare(node), [bare(x) if isinstance(x, Tensor) else x for x in args]
    shares = node.primitive.pullback(cotangent, out, args, node.params, positions)
    return [(x, _fitting(share, x, node)) for x, share in zip(parents, shares, strict=True)]


def _check_saved(node: Tensor, checked: set[Tensor]) -> None:
    """Raise ValueError if what `node` was computed from is no longer what it was."""
    for arg, array in zip(node.args, node.saved, strict=True):
        if not isinstance(arg, Tensor):
            continue
        changed = arg.array is not array
        if arg.fingerprint is not None and arg not in checked:
            checked.add(arg)
            changed = changed or fingerprint(array) != arg.fingerprint
        if changed:
            shapes_used = ", ".join(str(shape_of(x)) for x in node.saved)
            raise ValueError(
                f"backward through {node.op} of shapes {shapes_used}: its argument of shape "
                f"{array.shape} was changed in place or replaced after {node.op} used it"
            )


def _fitting(share: Tensor, x: Tensor, node: Tensor) -> Tensor:
    """`share` in the precision of `x`, whose cotangent it is."""
    if share.shape != x.shape:
        raise CotangentShapeError(
            f"the vjp of {node.op} gave a cotangent of shape {share.shape} for an argument of "
            f"shape {x.shape}: a broadcast that was not summed?"
        )
    return share if share.dtype == x.dtype else shapes.astype(share, dtype=x.dtype)


def _by(node: Tensor) -> str:
    return f" (of {node.op})" if node.op else ""


from gradwatch_reference import shapes  # noqa: E402 (made of Tensors, as is this module)
