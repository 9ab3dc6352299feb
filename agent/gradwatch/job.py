"""The job: what this process says of one run, from its first watch to its end."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.identity import Identity
from gradwatch.measure import read_scalar
from gradwatch.outlet import Outlet
from gradwatch.pending import PendingFrame
from gradwatch.settings import Settings
from gradwatch.watching import OptimizerWatch
from gradwatch.wire.frame import Record, RunEnd, RunInfo

# A frame waits this long for what `log` adds to it, then goes without.
STALE_S = 0.5


class Job:
    """One run of this process: its optimizers, their frames, and the way out."""

    def __init__(self, run: RunInfo, identity: Identity, settings: Settings) -> None:
        self.run = run
        self.settings = settings
        self.rank = identity.rank
        self.finished = False
        self._pid = os.getpid()
        self._watches: dict[int, OptimizerWatch] = {}
        self._pending: dict[str, PendingFrame] = {}
        self._latest = ""  # the optimizer that stepped last: what `log` speaks of
        self._early: dict[str, Callable[[], float]] = {}  # logged before its step
        self._charged_s = 0.0
        self.outlet = Outlet(run, identity.rank, settings, self._send_stale)

    @property
    def alive(self) -> bool:
        """False once finished, and in a process that was forked from the one that watches."""
        return not self.finished and os.getpid() == self._pid

    def watch(self, optimizer: torch.optim.Optimizer, models: Sequence[nn.Module] | None) -> None:
        """Record this optimizer's steps. A second watch of the same optimizer changes nothing."""
        known = self._watches.get(id(optimizer))
        if known is not None and known.optimizer is optimizer:
            return
        name = self._unique_name(type(optimizer).__name__)
        self._watches[id(optimizer)] = OptimizerWatch(self, optimizer, name, models)
        for watch in self._watches.values():
            watch.layout_changed()

    def watched(self, optimizer: torch.optim.Optimizer) -> bool:
        known = self._watches.get(id(optimizer))
        return known is not None and known.optimizer is optimizer

    def held_by_others(self, watch: OptimizerWatch) -> set[int]:
        """Identities of the parameters that other watched optimizers hold."""
        return {
            id(parameter)
            for other in self._watches.values()
            if other is not watch
            for parameter in other.held()
        }

    def open_frame(self, frame: PendingFrame) -> None:
        """A step was taken: its frame waits for `log`, and the one before goes out."""
        self._send(self._pending.pop(frame.optimizer, None))
        frame.scalars.update(self._early)
        self._early = {}
        self._latest = frame.optimizer
        self._pending[frame.optimizer] = frame

    def say(self, record: Record) -> None:
        """Send a record that is complete."""
        self.outlet.submit(lambda: (record,))

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Add scalars to the step they belong to: the last one, or the next if it has them."""
        pending = self._pending.get(self._latest)
        for name, value in values.items():
            reader = read_scalar(value)
            if pending is not None and name not in pending.scalars:
                pending.scalars[name] = reader
            else:
                self._early[name] = reader

    def uncharged_cost_s(self) -> float:
        """Processor time that the sending thread took since this was asked last."""
        cost = self.outlet.cpu_s - self._charged_s
        self._charged_s += cost
        return cost

    def finish(self, status: str, reason: str = "") -> bool:
        """Send what is left, say how it ended, stop watching. True when all of it was sent."""
        if not self.alive:
            return True
        for watch in self._watches.values():
            watch.remove()
        for pending in list(self._pending.values()):
            self._send(pending)
        self._pending.clear()
        self.say(RunEnd(rank=self.rank, time=time.time(), status=status, reason=reason[:2000]))
        self.finished = True
        return self.outlet.close()

    def _send(self, pending: PendingFrame | None) -> None:
        if pending is not None and not pending.empty:
            self.outlet.submit(lambda: (pending.frame(self.rank),))

    def _send_stale(self) -> None:
        """In the sending thread: let no frame wait for a loss that may never be logged."""
        now = time.monotonic()
        for name, pending in list(self._pending.items()):
            if now - pending.opened_at > STALE_S and self._pending.pop(name, None) is pending:
                self._send(pending)

    def _unique_name(self, kind: str) -> str:
        taken = {watch.name for watch in self._watches.values()}
        number = 2
        name = kind
        while name in taken:
            name = f"{kind}-{number}"
            number += 1
        return name


def make_run_info(
    identity: Identity, settings: Settings, name: str, config: Mapping[str, Any], tags: list[str]
) -> RunInfo:
    """How the run introduces itself."""
    from gradwatch import __version__

    return RunInfo(
        id=identity.run,
        project=settings.project,
        name=name,
        started_at=time.time(),
        world_size=identity.world_size,
        config={str(key): _plain_value(value) for key, value in config.items()},
        tags=tags,
        host=os.uname().nodename,
        agent_version=__version__,
    )


def _plain_value(value: Any) -> Any:
    """A configuration's value as JSON can carry it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain_value(item) for item in value]
    return str(value)
