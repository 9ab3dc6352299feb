"""Optimizers: copied whole, and stepped without anybody noticing."""

from __future__ import annotations

import copy
import inspect
from typing import Any, TypeVar

import torch

T = TypeVar("T", bound=torch.optim.Optimizer)


def copied(optimizer: T, memo: dict[int, Any]) -> T:
    """A copy that holds the copies of its parameters that the memo knows, without its hooks.

    torch copies what every optimizer has; some, as LBFGS, have more.
    """
    other = copy.deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():
        # A scheduler hangs its own `step` on the optimizer, which would call the original.
        if name not in vars(other) and not callable(value):
            setattr(other, name, copy.deepcopy(value, memo))
    return other


def step(optimizer: torch.optim.Optimizer, closure: Any = None) -> None:
    """One step that no hook sees, the optimizer's or a global one: a trial is no step of a job."""
    unhooked = inspect.unwrap(type(optimizer).step)
    with torch.no_grad():
        unhooked(optimizer, closure) if closure is not None else unhooked(optimizer)
