"""Gathering what statistics are made of: from gradients where they lie, or from copies of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.reduce import Numbers, Reduced, finiteness, norms_of, reduce_layers, tensor_of
from gradwatch.sampling import EMPTY, RUN, joined, runs_of
from gradwatch.transfer import to_host

# Elements of a layer's gradient that its histogram is taken from; a smaller layer's are all taken.
SAMPLE_SIZE = 1024
# A layer of no more elements is not reduced where it lies: its sample is all of it.
WHOLE_SIZE = SAMPLE_SIZE
NOTHING = Reduced(EMPTY, EMPTY, EMPTY, [])

# It has no public name.
foreach_copy: Callable[..., None] = torch._foreach_copy_  # pyright: ignore


class Gathered(NamedTuple):
    """Of some gradients, on the CPU or on its way there. Sequences run over the gradients.

    rows: `norm`, and `nonfinite` or `peak`. sample: elements of one gradient after the other: of a
    large one some at equal distances, of another one all. large: places of the large ones, which
    l1, sum and peaks speak of, see `Reduced`; peaks of one after the other, peak_sizes of each.
    """

    rows: Mapping[str, Numbers]
    sample: Tensor
    sample_sizes: NDArray[np.int64]
    large: Sequence[int]
    l1: Tensor
    sum: Tensor
    peaks: Tensor
    peak_sizes: Sequence[int]


class Copy(NamedTuple):
    """Memory that holds some gradients, in float32 or float64.

    elements: of one gradient after the other. parts: views of each gradient's, in its shape, which
    is one of shapes.
    """

    elements: Tensor
    shapes: Sequence[tuple[int, ...]]
    parts: Sequence[Tensor]


def gather(gradients: Sequence[Tensor], unit_dims: Sequence[int | None]) -> Gathered:
    """Reduce what is large of some gradients, dense and real, and sample all.

    unit_dims: the dimension of each that runs over units, None where none does.
    """
    places = range(len(gradients))
    large = [place for place in places if gradients[place].numel() > WHOLE_SIZE]
    if large:
        reduced = reduce_layers(
            [gradients[place] for place in large], [unit_dims[place] for place in large]
        )
        rest = [place for place in places if gradients[place].numel() <= WHOLE_SIZE]
        norms = torch.empty(len(gradients), dtype=torch.float64, device=gradients[0].device)
        norms[large] = reduced.norm.to(norms.device)
        if rest:
            norms[rest] = tensor_of(norms_of([gradients[place] for place in rest])).to(norms.device)
    else:
        reduced, norms = NOTHING, norms_of(gradients)
    parts = [
        each.reshape(-1)
        if each.numel() <= max(WHOLE_SIZE, SAMPLE_SIZE)
        else runs_of(each, SAMPLE_SIZE // RUN).reshape(-1)
        for each in gradients
    ]
    return Gathered(
        rows=rows_of(gradients, norms),
        sample=to_host(joined(parts)),
        sample_sizes=np.array(list(map(Tensor.numel, parts)), dtype=np.int64),
        large=large,
        l1=to_host(reduced.l1),
        sum=to_host(reduced.sum),
        peaks=to_host(joined(reduced.peaks)),
        peak_sizes=list(map(Tensor.numel, reduced.peaks)),
    )


def copied(
    gradients: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], room: Copy | None
) -> Copy:
    """Copy whole gradients. room: an earlier copy, whose memory is used again where it fits."""
    one = torch.float64 if any(each.dtype is torch.float64 for each in gradients) else torch.float32
    device = gradients[0].device
    if (
        room is None
        or (room.elements.dtype, room.elements.device) != (one, device)
        or room.shapes != shapes
    ):
        elements = torch.empty(sum(map(math.prod, shapes)), dtype=one, device=device)
        room = Copy(elements, shapes, _parts_of(elements, shapes))
    foreach_copy(room.parts, gradients)
    return room


def is_broken(copy: Copy) -> bool:
    """Whether an element is not finite; on an accelerator that is not known at once: False."""
    if copy.elements.device.type != "cpu" or math.isfinite(copy.elements.sum().item()):
        return False
    # The sum of finite numbers can overflow.
    return not bool(torch.isfinite(copy.elements).all())


def parts_on_host(copy: Copy) -> Sequence[Tensor]:
    """Its parts on the CPU, or on their way there."""
    elements = to_host(copy.elements)
    return copy.parts if elements is copy.elements else _parts_of(elements, copy.shapes)


def _parts_of(elements: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    flat = elements.split(list(map(math.prod, shapes)))
    return [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]


def rows_of(gradients: Sequence[Tensor], norms: Numbers) -> dict[str, Numbers]:
    """Norms, and which are finite, on their way to the CPU or there."""
    return {name: hosted(row) for name, row in finiteness(gradients, norms).items()}


def hosted(numbers: Numbers) -> Numbers:
    """On their way to the CPU or there."""
    return to_host(numbers) if isinstance(numbers, Tensor) else numbers
