"""Clipping that shares its norms with the frame of its step, so that they are computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gradwatch.reduce import foreach_norm, needs_pieces, norms_of, tensor_of

# Accumulated and rounded as a frame's norms are; those of half precision are kept in it.
SHARED = frozenset({torch.float32, torch.float64})


class Clipped:
    """Norms of gradients after they were clipped; good as long as the gradients stay as they are.

    norms: float[len(gradients)] before. coefficient: what all were multiplied by.
    """

    def __init__(self, gradients: Sequence[Tensor], norms: Tensor, coefficient: Tensor) -> None:
        self._gradients = gradients  # kept until their step, so that none takes another's identity
        self._places = {id(gradient): place for place, gradient in enumerate(gradients)}
        self._versions = [gradient._version for gradient in gradients]
        self._norms = norms
        self._coefficient = coefficient

    def norms_of(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """float64[len(gradients)]; None when one was not clipped, or was changed since."""
        places = [self._places.get(id(gradient), -1) for gradient in gradients]
        for place, gradient in zip(places, gradients, strict=True):
            if place < 0 or gradient._version != self._versions[place]:
                return None
        norms = (self._norms.double() * self._coefficient)[places]
        large = [place for place, each in enumerate(gradients) if needs_pieces(each)]
        if large:
            norms[large] = tensor_of(norms_of([gradients[place] for place in large]))
        return norms


class Clipping(NamedTuple):
    """What clipping found. total: as torch returns it, over ranks perhaps not yet summed up.

    known: the whole total norm, on every rank. shared: norms for the frame, where a frame would
    compute them in the same way.
    """

    total: Tensor
    known: Tensor
    shared: Clipped | None = None


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Clipping:
    """torch.nn.utils.clip_grad_norm_, to the bit."""
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [gradient for each in given if (gradient := each.grad) is not None]
    if norm_type != 2.0 or error_if_nonfinite or foreach is not None or not _alike(gradients):
        total = get_total_norm(gradients, norm_type, error_if_nonfinite, foreach)
        known = _summed_up(total)
        clip_grads_with_norm_(given, max_norm, known, foreach)
        return Clipping(total, known)
    with torch.no_grad():
        norms = torch.stack(foreach_norm(gradients, 2.0))
        total = torch.linalg.vector_norm(norms, 2.0)
        coefficient = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, coefficient)  # pyright: ignore
    return Clipping(total, total, Clipped(gradients, norms, coefficient))


def _summed_up(total: Any) -> Tensor:
    """The total norm of sharded gradients over all ranks, else as it is.

    torch sums it up itself within its clipping, and no more once it is given the sum: all ranks
    communicate as often as without the agent.
    """
    if not hasattr(total, "redistribute"):
        return total
    from torch.distributed.tensor import Replicate

    return total.redistribute(placements=[Replicate()] * total.device_mesh.ndim)


def _alike(gradients: Sequence[Tensor]) -> bool:
    """Whether these are ordinary tensors of one type and device, for torch to clip in one go."""
    if not gradients:
        return False
    device, dtype = gradients[0].device, gradients[0].dtype
    return (
        dtype in SHARED
        and device.type in ("cpu", "cuda")
        and all(
            type(each) is Tensor
            and each.dtype == dtype
            and each.device == device
            and not each.is_sparse
            for each in gradients
        )
    )
