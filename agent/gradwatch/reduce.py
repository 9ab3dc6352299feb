"""Reducing gradients where they lie, in the training thread.

On a CPU memory is what limits: a layer is taken in pieces that stay in the cache while everything
is computed of them, so that all statistics together cost about three reads of it. On an
accelerator it is the launching of kernels: one multi-tensor norm serves all layers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

# Elements of a piece: with their magnitudes 2 MB of float32, which stay in a server's cache. Less
# costs more calls than it saves waits.
PIECE = 1 << 18
# Elements that torch's norm on a CPU still adds up to within 1e-5, and those it must not get.
NORM_PIECE = 1 << 18
LARGE = 1 << 22
# Squares lose digits below 1e-38: a layer of a billion elements does so below this norm.
TINY_NORM = 1e-15
INF = float("inf")
# Magnitudes are ordered as the integers of their bits are, NaN above all, and integers compare
# faster.
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}

KIND = operator.attrgetter("device", "dtype")
PLACE = operator.attrgetter("is_cpu", "dtype")
AT_HAND = frozenset({(True, torch.float32)})

# float64[n] on a device, or as many numbers that are known here: to make a tensor of them costs a
# small model's norm frame a tenth.
Numbers = Tensor | list[float]

# The multi-tensor norm that torch's own clip_grad_norm_ is built on; it has no public name.
foreach_norm: Callable[..., list[Tensor]] = torch._foreach_norm  # pyright: ignore


class Reduced(NamedTuple):
    """Sums over the elements of each layer, and magnitudes that the largest is among.

    norm, l1, sum: float64[layers]. peaks: of each layer, float[units] where a dimension runs over
    units, else float[a few].
    """

    norm: Tensor
    l1: Tensor
    sum: Tensor
    peaks: list[Tensor]


def reduce_layers(gradients: Sequence[Tensor], unit_dims: Sequence[int | None]) -> Reduced:
    """Reduce gradients, real and dense, of one dimension at least, and on one device or several.

    unit_dims: the dimension of each that runs over units, None where none does.
    """
    # One at a time: of a gradient in another order of memory this is a copy.
    rows = (_rows(each, dim) for each, dim in zip(gradients, unit_dims, strict=True))
    if any(each.device.type != "cpu" for each in gradients):
        return Reduced(
            norm=_multi_norm(gradients, 2),
            l1=_multi_norm(gradients, 1),
            sum=_stack([each.sum(dtype=_wide(each.dtype)) for each in gradients]),
            peaks=[torch.linalg.vector_norm(each, float("inf"), dim=1) for each in rows],
        )
    room = _Room()
    found: list[_Piece] = []
    owners: list[int] = []
    for place, matrix in enumerate(rows):
        pieces = [_reduced_piece(piece, room) for piece in _pieces(matrix)]
        found += pieces
        owners += [place] * len(pieces)
    owner = torch.tensor(owners, device="cpu")

    def total(sums: list[Tensor]) -> Tensor:
        zeros = torch.zeros(len(gradients), dtype=torch.float64, device="cpu")
        return zeros.index_add_(0, owner, torch.stack(sums).double())

    peaks: list[list[Tensor]] = [[] for _ in gradients]
    for place, piece in zip(owners, found, strict=True):
        peaks[place].append(piece.peaks)
    return Reduced(
        norm=total([piece.squares for piece in found]).sqrt(),
        l1=total([piece.l1 for piece in found]),
        sum=total([piece.sum for piece in found]),
        peaks=[each[0] if len(each) == 1 else torch.cat(each) for each in peaks],
    )


class _Piece(NamedTuple):
    """Of some rows: sums of squares, of magnitudes and of elements, and each row's largest."""

    squares: Tensor
    l1: Tensor
    sum: Tensor
    peaks: Tensor


class _Room:
    """Memory for the magnitudes of one piece after the other, so that it stays in the cache."""

    def __init__(self) -> None:
        self._room = torch.empty(0, device="cpu")  # whatever the script's default device is
        self._views: dict[torch.Size, tuple[Tensor, Tensor, Tensor]] = {}

    def magnitudes(self, piece: Tensor) -> tuple[Tensor, Tensor]:
        """Of its elements, flat, and as bits in its shape, until the next are asked for."""
        dtype = _wide(piece.dtype)
        if self._room.dtype != dtype or self._room.numel() < piece.numel():
            self._room = torch.empty(max(piece.numel(), PIECE), dtype=dtype, device="cpu")
            self._views = {}
        if piece.shape not in self._views:
            flat = self._room[: piece.numel()]
            shaped = flat.view(piece.shape)
            self._views[piece.shape] = shaped, flat, shaped.view(BITS[dtype])
        shaped, flat, bits = self._views[piece.shape]
        torch.abs(piece if piece.dtype == dtype else piece.to(dtype), out=shaped)
        return flat, bits


def _rows(gradient: Tensor, unit_dim: int | None) -> Tensor:
    """A gradient as a matrix: a row a unit, or one row. A view where it can be."""
    if unit_dim is None:
        return gradient.reshape(1, -1)
    return gradient.movedim(unit_dim, 0).flatten(1) if gradient.dim() > 1 else gradient[:, None]


def _pieces(rows: Tensor) -> Iterator[Tensor]:
    """Several rows at a time, or a part of a row when there is but one."""
    if len(rows) == 1:
        yield from rows.split(PIECE, dim=1)
    else:
        yield from rows.split(max(1, PIECE // rows.shape[1]))


def _reduced_piece(piece: Tensor, room: _Room) -> _Piece:
    flat, bits = room.magnitudes(piece)
    peaks = bits.amax(1).view(flat.dtype)
    return _Piece(torch.dot(flat, flat), flat.sum(), piece.sum(dtype=flat.dtype), peaks)


def norms_of(gradients: Sequence[Tensor]) -> Numbers:
    """L2 norm of each."""
    if max(map(Tensor.numel, gradients), default=0) <= LARGE:
        if AT_HAND.issuperset(map(PLACE, gradients)):  # nearly always, and each look counts
            return [norm.item() for norm in foreach_norm(gradients, 2)]
        return _multi_norm(gradients, 2)
    pieces = [_split(each) if needs_pieces(each) else (each,) for each in gradients]
    norms = _multi_norm([piece for split in pieces for piece in split], 2)
    counts = torch.tensor([len(split) for split in pieces], device=norms.device)
    owner = torch.repeat_interleave(counts)
    sums = torch.zeros(len(pieces), dtype=norms.dtype, device=norms.device)
    return sums.index_add_(0, owner, norms**2).sqrt()


def tensor_of(numbers: Numbers) -> Tensor:
    """The same as a tensor, where they are."""
    if isinstance(numbers, Tensor):
        return numbers
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def needs_pieces(gradient: Tensor) -> bool:
    """Whether torch's own norm of it is too far off.

    On a CPU it adds up squares in float32, one after the other: it misses 2e-4 of the norm of 2^23
    elements, and 1.4 % of that of 2^27.
    """
    return gradient.numel() > LARGE and gradient.device.type == "cpu"


def in_memory_order(tensor: Tensor) -> Tensor:
    """Its dimensions in the order of memory, which those of a transposed one are not."""
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


def _split(gradient: Tensor) -> Sequence[Tensor]:
    ordered = in_memory_order(gradient)
    if ordered.is_contiguous():
        return ordered.view(-1).split(NORM_PIECE)
    return ordered.split(max(1, NORM_PIECE * len(ordered) // ordered.numel()))


def finiteness(gradients: Sequence[Tensor], norms: Numbers) -> dict[str, Numbers]:
    """Norms with those set right that float32 squares spoil, and which gradients are not finite.

    On a CPU `nonfinite` counts the elements, and is left out where all are finite. On an
    accelerator to look at the norms would be to wait for it: there `peak`, the largest magnitude,
    goes along.
    """
    if isinstance(norms, Tensor):
        if norms.device.type != "cpu":
            return {"norm": norms, "peak": _multi_norm(gradients, float("inf"))}
        norms = cast("list[float]", norms.tolist())
    doubtful = [place for place, norm in enumerate(norms) if not TINY_NORM <= norm < INF]
    if not doubtful:
        return {"norm": norms}
    counts = [0.0] * len(norms)
    for place in doubtful:
        gradient = gradients[place]
        # Squares of finite float32 values overflow from 1.8e19 on, and are 0 below 1e-23.
        norms[place] = torch.linalg.vector_norm(gradient, 2, dtype=torch.float64).item()
        if not math.isfinite(norms[place]):
            counts[place] = float(gradient.numel() - torch.isfinite(gradient).sum())
    return {"norm": norms, "nonfinite": counts}


def _multi_norm(tensors: Sequence[Tensor], order: float) -> Tensor:
    """A norm of each, accumulated in float32 at least. float64[len(tensors)]."""
    kinds = list(map(KIND, tensors))
    if len(set(kinds)) == 1 and tensors[0].dtype is torch.float32:
        return torch.stack(foreach_norm(tensors, order)).double()
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(place)
    norms: list[Tensor] = [tensors[0]] * len(tensors)
    for (_, dtype), places in groups.items():
        found = foreach_norm([tensors[place] for place in places], order, dtype=_wide(dtype))
        for place, norm in zip(places, found, strict=True):
            norms[place] = norm
    return _stack(norms)


def _stack(values: Sequence[Tensor]) -> Tensor:
    """Zero-dimensional tensors as one, on the device of the first. float64[len(values)]."""
    device = values[0].device
    wide = [value.to(device, torch.float64, non_blocking=True) for value in values]
    return torch.stack(wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What to accumulate in."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
