"""Samples of many tensors, in few operations.

Elements that lie far apart in memory cost a wait each, so a sample is of runs: several elements in
a row, and the runs at equal distances from end to end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.reduce import KIND, in_memory_order

RUN = 8  # elements
EMPTY = torch.empty(0, dtype=torch.float64, device="cpu")


class Sampled(NamedTuple):
    """places: of the tensors, in the order of their elements. sizes: elements of each."""

    places: list[int]
    sizes: NDArray[np.int64]
    elements: Tensor


def sampled(tensors: Sequence[Tensor], runs: int) -> Sampled:
    """So many runs of each tensor, all of one that has no more than a sample's elements."""
    return _parts(tensors, runs).sample()


class Sampler:
    """Samples tensors again and again: those that stay where they are by the same views.

    The views keep the tensors' memory, which therefore is no other tensor's: equal addresses are
    the same elements.
    """

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._addresses: list[int] = []
        self._parts = _Parts([], np.empty(0, dtype=np.int64), [], [])

    def sample(self, tensors: Sequence[Tensor]) -> Sampled:
        addresses = list(map(Tensor.data_ptr, tensors))
        if addresses == self._addresses and addresses:
            return self._parts.sample()
        parts = _parts(tensors, self._runs)
        lasting = parts.are_views_of(tensors)
        self._addresses, self._parts = (addresses, parts) if lasting else ([], self._parts)
        return parts.sample()


class _Parts(NamedTuple):
    """What a sample is joined of. places, sizes: see `Sampled`; small first, then large."""

    places: list[int]
    sizes: NDArray[np.int64]
    small: list[Tensor]  # [all of it]
    large: list[Tensor]  # [runs, RUN]

    def sample(self) -> Sampled:
        large = [joined(self.large).view(-1)] if self.large else []
        return Sampled(self.places, self.sizes, joined([*self.small, *large]))

    def are_views_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether none of them had to be copied."""
        return all(
            part.untyped_storage().data_ptr() == tensors[place].untyped_storage().data_ptr()
            for place, part in zip(self.places, [*self.small, *self.large], strict=True)
        )


def _parts(tensors: Sequence[Tensor], runs: int) -> _Parts:
    size = runs * RUN
    numels = list(map(Tensor.numel, tensors))
    large = [place for place, numel in enumerate(numels) if numel > size]
    small = [place for place, numel in enumerate(numels) if numel <= size]
    return _Parts(
        small + large,
        np.array([numels[place] for place in small] + [size] * len(large), dtype=np.int64),
        [tensors[place].reshape(-1) for place in small],
        [runs_of(tensors[place], runs) for place in large],
    )


def runs_of(tensor: Tensor, runs: int) -> Tensor:
    """Elements at equal distances, each with those after it. A view of shape [runs, RUN]."""
    if not tensor.is_contiguous():
        tensor = in_memory_order(tensor).contiguous()
    distance = _distance(tensor.numel(), tensor.shape[-1], runs)
    return tensor.as_strided((runs, RUN), (distance, 1))


@functools.lru_cache(maxsize=4096)
def _distance(size: int, width: int, runs: int) -> int:
    """Between the first elements of two runs of a tensor whose rows have this width."""
    distance = (size - RUN) // max(1, runs - 1)
    # One that shares a larger factor with the width sees the same few columns of each row.
    while math.gcd(distance, width) > RUN:
        distance -= 1
    return distance


def joined(parts: list[Tensor], room: Tensor | None = None) -> Tensor:
    """Tensors one after the other, on the device of the first, in float32 or float64.

    room: where they may be put, if it is of their size and type.
    """
    if not parts:
        return EMPTY
    first = parts[0]
    kinds = set(map(KIND, parts))
    if len(kinds) > 1:
        one = first.dtype if len({dtype for _, dtype in kinds}) == 1 else torch.float64
        parts = [part.to(first.device, one, non_blocking=True) for part in parts]
    if (
        room is not None
        and room.dtype == parts[0].dtype
        and room.device == first.device
        and room.numel() == sum(map(Tensor.numel, parts))
    ):
        return torch.cat(parts, out=room)
    joined = torch.cat(parts)
    return joined if joined.dtype in (torch.float32, torch.float64) else joined.float()
