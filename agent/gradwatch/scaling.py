"""Loss scaling: the steps that a GradScaler skips.

A scaler that finds an overflow does not call the optimizer's step, so none of its hooks tells of
that. While a job is recorded `torch.amp.GradScaler.step` is wrapped, to be known of before and
after; what it does stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

# Called before a scaler steps an optimizer; what it returns is called after.
Follower = Callable[[GradScaler, torch.optim.Optimizer], Callable[[], None]]

_followers: list[Follower] = []
_torchs: Any = None  # GradScaler.step, while it is wrapped


def follow(follower: Follower) -> Callable[[], None]:
    """Tell `follower` of every scaler's step, until the function returned is called."""
    global _torchs
    if not _followers:
        _torchs = GradScaler.step
        GradScaler.step = _wrapped(_torchs)
    _followers.append(follower)

    def leave() -> None:
        if follower in _followers:
            _followers.remove(follower)
        # Left in place where somebody else has wrapped it since: it does nothing by then.
        if not _followers and getattr(GradScaler.step, "__wrapped__", None) is _torchs:
            GradScaler.step = _torchs

    return leave


def _wrapped(step: Any) -> Any:
    @functools.wraps(step)
    def followed(
        scaler: GradScaler, optimizer: torch.optim.Optimizer, *args: Any, **kw: Any
    ) -> Any:
        # A follower may add another, which is to be told too.
        after = [follower(scaler, optimizer) for follower in _followers]
        result = step(scaler, optimizer, *args, **kw)
        for each in after:
            each()
        return result

    return followed


def scale_of(scaler: GradScaler) -> Tensor | None:
    """What the scaler multiplies losses by, where it lies; None before its first use."""
    return scaler._scale  # pyright: ignore[reportPrivateUsage]


def carried_scale(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The loss scale that gradients still carry at the step of a fused optimizer."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None


def found_overflow(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """More than 0 when a fused optimizer is about to skip its step."""
    found = getattr(optimizer, "found_inf", None)
    return found if isinstance(found, Tensor) else None


def skips_by_itself(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether a loss scaler leaves it to the optimizer to skip a step: to a fused one."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
