"""How long a rank waits for the others at the end of its backward passes.

DistributedDataParallel averages gradients while the backward pass runs and waits for the last of
them when it is over, in a callback of the autograd engine. Two callbacks of ours stand around that
one: the first is queued by a parameter's hook, before DDP queues its own, and queues the second.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradwatch.interrupts import is_scripts_own

# Gives, once both moments are over, the seconds between them.
Span = Callable[[], float]
# Queues a function to be called at the end of the backward pass that runs; it has no public name.
_at_the_end: Callable[[Callable[[], None]], None] = (
    torch.autograd.Variable._execution_engine.queue_callback  # pyright: ignore
)


class WaitClock:
    """Times the end of each backward pass that reaches one parameter.

    on_error: called when torch does not do what is expected of it; nothing is timed after that.
    """

    def __init__(self, parameter: Tensor, on_error: Callable[[Exception], None]) -> None:
        self.parameter = parameter
        self._on_error = on_error
        self._device = parameter.device
        self._queued = False
        self._began: Any = None
        self._spans: list[Span] = []
        self._starved_s = 0.0  # until now
        self._cores: int | None = None  # where the system tells that
        with contextlib.suppress(OSError):
            self._cores = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self._handle = parameter.register_post_accumulate_grad_hook(self._reached)

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()
        if self._cores is not None:
            os.close(self._cores)
            self._cores = None

    def take(self) -> list[Span] | None:
        """The waits since this was asked last; None when no backward pass reached the parameter."""
        spans, self._spans = self._spans, []
        return spans or None

    def starved_s(self) -> float:
        """Seconds since this was asked last in which the thread was ready and no core was free.

        Of the thread that made this clock; 0 where the system does not tell. On a machine that has
        more to do than cores this falls on one rank now, on another then.
        """
        if self._cores is None:
            return 0.0
        before = self._starved_s
        try:
            # On Linux: nanoseconds on a core, nanoseconds in wait of one, and how often.
            self._starved_s = int(os.pread(self._cores, 100, 0).split()[1]) / 1e9
        except (OSError, ValueError, IndexError):  # closed by the script, or another file by now
            self._cores = None
        return self._starved_s - before

    def _reached(self, _: Tensor) -> None:
        if self._queued:
            return
        try:
            _at_the_end(self._computed)
            self._queued = True
        except Exception as error:
            self._give_up(error)

    def _computed(self) -> None:
        """All gradients of this rank are there; the others' may not be."""
        self._queued = False
        try:
            self._began = _now(self._device)
            _at_the_end(self._averaged)
        except Exception as error:
            self._give_up(error)

    def _averaged(self) -> None:
        try:
            self._spans.append(_between(self._began, _now(self._device)))
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if is_scripts_own(error):
            raise error
        self.remove()
        self._on_error(error)


def _now(device: torch.device) -> float | torch.Event:
    """A moment: of this process on a CPU, else of the device, which runs behind it."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device=device.type, enable_timing=True)
    event.record()
    return event


def _between(first: Any, last: Any) -> Span:
    if isinstance(last, float):
        seconds = last - first
        return lambda: seconds

    def elapsed() -> float:
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return elapsed
