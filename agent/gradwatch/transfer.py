"""From a device to this machine's memory, without waiting for either."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """A tensor's numbers on the CPU, once `copied_event` has fired; the tensor itself if there."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def copied_event(device: torch.device) -> torch.Event | None:
    """Fires when what was asked of the device until now is done; None on a CPU."""
    if device.type == "cpu":
        return None
    event = torch.Event(device=device.type)
    event.record()
    return event
