"""The data of the step that broke: tensors in reach of the training loop that hold a NaN or Inf.

By the time that a NaN is noticed the forward pass is over and cannot be looked at any more, but the
batch is still there, in a variable of whoever called `optimizer.step()`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradwatch.shadows import has_storage, storage_key
from gradwatch.tracer import AGENT_FOLDER, TORCH_FOLDER
from gradwatch.wire.frame import Operand

MAX_DEPTH = 2
MAX_ITEMS = 64  # of a list or dict that are looked into
MAX_ELEMENTS = 100_000_000  # looked at in all
MAX_ROWS = 5  # named


class Suspect(NamedTuple):
    """A variable whose tensor is not finite."""

    name: str  # as the script has it: "batch['pixels']"
    rows: tuple[int, ...]  # of its first dimension
    tensor: Operand
    source: str  # file:line in function

    @property
    def note(self) -> str:
        """Which part of it is not finite."""
        named = ", ".join(map(str, self.rows[:MAX_ROWS]))
        more = ", ..." if len(self.rows) > MAX_ROWS else ""
        count = self.tensor.shape[0]
        return f"{len(self.rows)} of its {count} rows held NaN or Inf: {named}{more}"


def broken_data(frame: FrameType | None, own: frozenset[int]) -> Suspect | None:
    """The first variable, from `frame` outwards, that holds data which is not finite.

    Results of the model are told from data by their history: they have a gradient function, or
    come after their batch. own: storages of weights and gradients, which are no data.
    """
    left = MAX_ELEMENTS
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith((TORCH_FOLDER, AGENT_FOLDER)):
            for name, tensor in _tensors(dict(frame.f_locals)):
                left -= tensor.numel()
                if left < 0:
                    return None
                if storage_key(tensor) not in own and not torch.isfinite(tensor.sum()):
                    found = _suspect(name, tensor, frame)
                    if found is not None:
                        return found
        frame = frame.f_back
    return None


def _suspect(name: str, tensor: Tensor, frame: FrameType) -> Suspect | None:
    rows = ~torch.isfinite(tensor).flatten(1).all(1) if tensor.dim() > 1 else ~tensor.isfinite()
    broken = rows.nonzero().flatten().tolist()
    if not broken:
        return None  # a sum of finite numbers can overflow
    low, high = torch.aminmax(tensor)
    file, function = os.path.basename(frame.f_code.co_filename), frame.f_code.co_name
    return Suspect(
        name=name[:200],
        rows=tuple(broken),
        tensor=Operand(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            low=float(low),
            high=float(high),
        ),
        source=f"{file}:{frame.f_lineno} in {function}",
    )


def _tensors(values: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        yield from _inside(str(name), value, MAX_DEPTH)


def _inside(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        data = has_storage(value) and value.device.type == "cpu" and value.is_floating_point()
        if data and value.grad_fn is None and not value.requires_grad and value.numel() > 1:
            yield name, value
    elif depth and type(value) in (list, tuple):
        for place, item in enumerate(value[:MAX_ITEMS]):
            yield from _inside(f"{name}[{place}]", item, depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in list(value.items())[:MAX_ITEMS]:
            yield from _inside(f"{name}[{key!r}]", item, depth - 1)
