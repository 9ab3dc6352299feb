"""Measuring gradients: the hot path, in the training thread.

`Meter` reads only, and on an accelerator starts work without waiting for it. Small layers are
copied whole, and a small model in one operation, for the agent's own thread to measure. What is
larger is reduced where it lies, and a sample of it goes along.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.clipping import Clipped
from gradwatch.gather import (
    Copy,
    Gathered,
    copied,
    gather,
    hosted,
    is_broken,
    parts_on_host,
    rows_of,
)
from gradwatch.layers import Layer
from gradwatch.reading import Details, Reading, Weights
from gradwatch.reduce import Numbers, norms_of
from gradwatch.sampling import EMPTY, Sampler
from gradwatch.transfer import copied_event, to_host
from gradwatch.units import UnitCounter

# Of 8 elements, of each layer's weights, that their movement and spread are taken from.
WEIGHT_RUNS = 16
# A model of no more elements is copied whole (8 MB), unless this many copies wait already.
SMALL_MODEL = 1 << 21
MAX_COPIES = 2
REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRADIENT = operator.attrgetter("grad")
SHAPE = operator.attrgetter("shape")
# Nearly all tensors are ordinary, and each look at one of a thousand layers counts.
KIND = operator.attrgetter("__class__", "layout", "dtype")
ORDINARY = frozenset(
    (kind, torch.strided, dtype) for kind in (Tensor, nn.Parameter) for dtype in REAL
)
IS_META, REQUIRES_GRAD = operator.attrgetter("is_meta"), operator.attrgetter("requires_grad")
Rows = Mapping[str, Numbers]


class Meter:
    """Measures the gradients of a fixed list of layers."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._units = UnitCounter(layers)
        # Of each layer, the dimension of its gradient that runs over units.
        self._dims = [
            self._units.dim(place) if self._units.counts(place) else None
            for place in range(len(layers))
        ]
        self._sampler = Sampler(WEIGHT_RUNS)
        self._weights: tuple[int, Tensor] | None = None  # step, sample
        self._copies: list[tuple[Reading, Copy]] = []

    def norms(
        self,
        parameters: Sequence[Tensor],
        scale: Tensor | None = None,
        clipped: Clipped | None = None,
        compare: bool = False,
    ) -> Reading | None:
        """Norm of each layer's gradient; None when no layer has one.

        scale, compare: see `details`. clipped: the norms that clipping computed for this step.
        """
        present, gradients = gradients_of(parameters)
        if not present:
            return None
        norms = clipped.norms_of(gradients) if clipped is not None else None
        if norms is None:
            norms = norms_of(gradients)
        rows = rows_of(gradients, norms)
        probed = self._sampled(plains(parameters)) if compare else None
        return Reading(
            len(parameters),
            present,
            rows,
            None if scale is None else to_host(scale.detach().clone()),
            copied_event(gradients[0].device),
            broken=_known_broken(rows),
            probed=probed,
        )

    @torch.no_grad()
    def details(
        self,
        parameters: Sequence[Tensor],
        scale: Tensor | None = None,
        step: int = 0,
        compare: bool = False,
    ) -> Reading | None:
        """Every statistic of each layer's gradient; None when no layer has one.

        scale: the loss scale that the gradients still carry (a fused optimizer under AMP).
        step: of the optimizer, by which the weights' movement is told a step. compare: whether
        the weights are to be compared with those of other ranks.
        """
        present, gradients = gradients_of(parameters)
        if not present:
            return None
        sizes = list(map(Tensor.numel, gradients))
        shapes = list(map(SHAPE, gradients))
        dims = [self._dims[layer] for layer in present]
        waiting = [copy for copy in self._copies if not copy[0].resolved]
        small = sum(sizes) <= SMALL_MODEL and len(waiting) < MAX_COPIES
        gathering: Callable[[], Gathered]
        if small:
            # New memory costs more than the copy: that of a frame which is done with is used again.
            room = next((room for reading, room in self._copies if reading.resolved), None)
            copy = copied(gradients, shapes, room)
            gathering = functools.partial(gather, parts_on_host(copy), dims)
            broken = is_broken(copy)
        else:
            copy, gathered = None, gather(gradients, dims)
            gathering, broken = (lambda: gathered), _known_broken(gathered.rows)
        weights = plains(parameters)
        weight_norm = hosted(norms_of([weights[layer] for layer in present]))
        movement = self._movement(weights, step)  # which then are in the cache
        details = Details(
            sizes=sizes,
            shapes=shapes,
            gather=gathering,
            weight_norm=weight_norm,
            weights=movement,
            units=self._units,
        )
        reading = Reading(
            len(parameters),
            present,
            {},
            None if scale is None else to_host(scale.detach().clone()),
            copied_event(gradients[0].device),
            details,
            broken=broken,
            probed=movement if compare else None,
        )
        self._copies = waiting if copy is None else [*waiting, (reading, copy)]
        return reading

    def _movement(self, weights: Sequence[Tensor], step: int) -> Weights:
        """A sample of the weights, beside that of the detail frame before."""
        found = self._sampled(weights)
        past, before = self._weights or (step, None)
        if before is not None and before.shape != found.now.shape:
            before = None
        self._weights = (step, found.now)
        return found._replace(before=before, steps=max(step - past, 1))

    @torch.no_grad()
    def _sampled(self, weights: Sequence[Tensor]) -> Weights:
        """A sample of the weights, by itself."""
        if any(map(IS_META, weights)):
            weights = [EMPTY if tensor.is_meta else tensor for tensor in weights]
        places, sizes, sample = self._sampler.sample(weights)
        return Weights(places, sizes, to_host(sample), None, 1)


def _known_broken(rows: Rows) -> bool:
    return "nonfinite" in rows and bool(np.asarray(rows["nonfinite"]).any())


def gradients_of(parameters: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """The layers that have a gradient, and their gradients as dense, real, local tensors."""
    held: list[Tensor | None] = list(map(GRADIENT, parameters))
    present = [layer for layer, gradient in enumerate(held) if gradient is not None]
    gradients = plains([gradient for gradient in held if gradient is not None])
    if any(map(REQUIRES_GRAD, gradients)):  # of create_graph=True
        gradients = [gradient.detach() for gradient in gradients]
    if not all(map(Tensor.numel, gradients)) or any(map(IS_META, gradients)):
        kept = [place for place, each in enumerate(gradients) if each.numel() and not each.is_meta]
        present = [present[place] for place in kept]
        gradients = [gradients[place] for place in kept]
    return present, gradients


def plains(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`plain` of each; of ordinary ones the tensors themselves, for use without autograd."""
    if ORDINARY.issuperset(map(KIND, tensors)):
        return list(tensors)
    return [plain(tensor) for tensor in tensors]


def plain(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, dense and real. Implicit zeros of a sparse one are left out."""
    plain = tensor.detach()
    if hasattr(plain, "to_local"):
        plain = cast("Tensor", plain.to_local())  # pyright: ignore[reportAttributeAccessIssue]
    if plain.is_sparse:
        plain = plain.coalesce().values()
    return plain.abs() if plain.is_complex() else plain


def read_scalar(value: float | Tensor) -> Callable[[], float]:
    """A number now, or soon from a device: taken without waiting, read by calling the result."""
    if not isinstance(value, Tensor):
        number = float(value)
        return lambda: number
    taken = plain(value).reshape(-1)[0].double()
    host = to_host(taken.clone())
    copied = copied_event(value.device)

    def read() -> float:
        if copied is not None:
            copied.synchronize()
        return float(host)

    return read
