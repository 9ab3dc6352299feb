"""The job: what this process says of one run, from its first watch to its end."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from gradwatch.acting import LocalJudge
from gradwatch.clipping import Clipped
from gradwatch.identity import Identity
from gradwatch.measure import read_scalar
from gradwatch.outlet import Outlet
from gradwatch.pacer import WARM_UP_STEPS
from gradwatch.pending import PendingFrame
from gradwatch.scaling import follow
from gradwatch.settings import Settings, kinds_of
from gradwatch.survey import Surveys
from gradwatch.turns import in_turn
from gradwatch.watching import OptimizerWatch
from gradwatch.wire.frame import Flight, Frame, Origin, Record, RunEnd, RunInfo

# A frame waits this long for what `log` adds to it, then goes without.
STALE_S = 0.5
# A configuration is shown, not computed with: what is deeper or longer is cut short.
MAX_CONFIG_DEPTH = 8
MAX_CONFIG_TEXT = 10_000


class Job:
    """One run of this process: its optimizers, their frames, and the way out."""

    def __init__(self, run: RunInfo, identity: Identity, settings: Settings) -> None:
        self.run = run
        self.settings = settings
        self.rank = identity.rank
        # False once finished, and in a process that was forked from the one that watches.
        self.alive = True
        self.news = False  # whether the next step has to be looked at, whatever it is
        _jobs.add(self)
        self._watches: dict[int, OptimizerWatch] = {}
        self._by_name: dict[str, OptimizerWatch] = {}
        self._kinds: Counter[str] = Counter()  # optimizers of each class
        self._living = 0  # optimizers that are watched
        self.sharers = 1  # of the budget: as many, but at least one
        self.surveys = Surveys(self._watches.values)
        self._stale_at = 0.0  # when frames that wait are looked through again
        self.latest: OptimizerWatch | None = None  # the last that stepped: what `log` speaks of
        self._early: dict[str, Callable[[], float]] = {}  # logged before its step
        self._logged_first: set[str] = set()  # names that the script logs before it steps
        self._free_s = 0.0  # of the sending thread, until the frames of the first steps had gone
        self._charged_s = 0.0
        self._detail_cpu_s = 0.0  # of the sending thread, for detail frames
        self._charged_detail_s = 0.0
        self._clipped: Clipped | None = None  # for the step to come
        self._flown: set[str] = set()  # optimizers whose flight was sent
        self.judge = LocalJudge(frozenset(kinds_of(settings.stop_on)), identity.world_size)
        self.outlet = Outlet(run, identity.rank, settings, self._send_stale)
        self._leave_scalers = follow(self._scaler_steps)

    @in_turn
    def watch(self, optimizer: torch.optim.Optimizer, models: Sequence[nn.Module] | None) -> None:
        """Record this optimizer's steps. A second watch of the same optimizer changes nothing."""
        if self.watched(optimizer):
            return
        name = self._unique_name(type(optimizer).__name__)
        watch = OptimizerWatch(self, optimizer, name, models)
        self._watches[id(optimizer)] = watch
        self._by_name[name] = watch
        self._share_among(self._living + 1)
        self.surveys.claim(watch.inventory, watch.inventory.held())

    def forgotten(self) -> None:
        """The script has let go of an optimizer."""
        self._share_among(self._living - 1)
        self.surveys.forget()

    def _share_among(self, optimizers: int) -> None:
        self._living, self.sharers = optimizers, max(1, optimizers)

    def watched(self, optimizer: torch.optim.Optimizer) -> bool:
        return self._watch_of(optimizer) is not None

    def _watch_of(self, optimizer: torch.optim.Optimizer) -> OptimizerWatch | None:
        known = self._watches.get(id(optimizer))
        return known if known is not None and known.optimizer is optimizer else None

    def _scaler_steps(
        self, scaler: GradScaler, optimizer: torch.optim.Optimizer
    ) -> Callable[[], None]:
        """Before a scaler steps an optimizer, and, by what it returns, after it."""
        watch = self._watch_of(optimizer)
        if watch is None:
            return lambda: None
        watch.scaler_steps(scaler)
        return watch.scaler_stepped

    def clipped(self, clipped: Clipped | None, scalars: Mapping[str, float | Tensor]) -> None:
        """Gradients were clipped for the step to come, which is to have these scalars."""
        self._clipped, self.news = clipped, True
        self._early.update({name: read_scalar(value) for name, value in scalars.items()})

    def take_news(self) -> tuple[Clipped | None, dict[str, Callable[[], float]]]:
        """What was clipped and what was logged for the step at hand, before it."""
        self.news = False
        if self.judge.stop is not None or not self.alive:
            self.news = True  # in this order: the sending thread may bring some
        if self.latest is None:
            self._logged_first.update(self._early)
        clipped, self._clipped = self._clipped, None
        early, self._early = self._early, {}
        return clipped, early

    def say(self, record: Record) -> None:
        """Send a record that is complete."""
        self._consider(record)
        self.outlet.submit(lambda: (record,), always=True)

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Add scalars to the step they belong to.

        That is the last one, or the next: if the last one has this scalar already, or if the
        script had logged it before its very first step.
        """
        pending = self.latest.frame() if self.latest is not None else None
        for name, value in values.items():
            reader = read_scalar(value)
            if name == "loss" and _at_hand(value) and not math.isfinite(reader()):
                self._locate("")
            late = name not in self._logged_first
            if late and pending is not None and pending.open and name not in pending.scalars:
                pending.scalars[name] = reader
            else:
                self._early[name] = reader
                self.news = True

    def uncharged_cost_s(self) -> tuple[float, float]:
        """Processor time that the sending thread took since this was asked last, or since the
        frames of the first steps.

        For detail frames, and for all else.
        """
        detail_s = self._detail_cpu_s - self._charged_detail_s
        charged_s = max(self._charged_s, self._free_s)
        other_s = max(0.0, self.outlet.cpu_s - charged_s - detail_s)
        self._charged_detail_s += detail_s
        self._charged_s = charged_s + detail_s + other_s
        return detail_s, other_s

    def finish(self, status: str, reason: str = "") -> bool:
        """Send what is left, say how it ended, stop watching. True when all of it was sent."""
        if not self.alive:
            return True
        self._leave_scalers()
        for watch in self._watches.values():
            watch.remove()
        for watch in self._by_name.values():
            self.send(watch.pending)
        for watch in self._watches.values():
            self.explain(watch.locator.finish)
        self._watches.clear()
        self.surveys.forget()
        self.outlet.submit(self._last_judgement, always=True)
        self.say(RunEnd(rank=self.rank, time=time.time(), status=status, reason=reason[:2000]))
        self.alive, self.news = False, True
        return self.outlet.close()

    def send(self, pending: PendingFrame | None) -> None:
        """In either thread, whichever is first."""
        if pending is not None and pending.claim() and not pending.empty:
            self.outlet.submit(lambda: self._finished(pending), hurry=pending.hurry)

    def _finished(self, pending: PendingFrame) -> Sequence[Record]:
        """In the sending thread: the frame with all of its numbers, and what a NaN brings along."""
        started = time.thread_time()
        frame = pending.frame(self.rank)
        if frame is None:
            return ()
        if pending.step <= WARM_UP_STEPS:
            # With them goes what is paid but once, as importing the HTTP client.
            self._free_s = time.thread_time()
        elif frame.histograms is not None:
            self._detail_cpu_s += time.thread_time() - started
        self._consider(frame)
        if "non_finite" not in frame.events:
            return (frame,)
        self._locate(frame.optimizer)
        return (frame, *self._flights(frame))

    def _flights(self, frame: Frame) -> Sequence[Flight]:
        """The steps before an optimizer's first NaN, once."""
        name = frame.optimizer
        if name in self._flown:
            return ()
        self._flown.add(name)
        flight = self._by_name[name].recorder.flight(
            name, self.rank, self.judge.layers(name), frame.step, self.judge.frames(name)
        )
        if flight is None:
            return ()
        self._consider(flight)
        return (flight,)

    def explain(self, explained: Callable[[], Sequence[Origin]]) -> None:
        """Have a trace read in the sending thread, and send what comes of it."""

        def told() -> Sequence[Origin]:
            origins = explained()
            for origin in origins:
                self._consider(origin)
            return origins

        self.outlet.submit(told, always=True)

    def _consider(self, record: Record) -> None:
        """Judge it, if somebody asked for that; the training may have to stop for it."""
        self.judge.take(record)
        if self.judge.stop is not None:
            self.news = True

    def _last_judgement(self) -> Sequence[Record]:
        """In the sending thread: nothing that the last frames showed goes untold."""
        if self.judge.listening:
            self.judge.tell()
        return ()

    def _locate(self, optimizer: str) -> None:
        """Look for where a NaN comes from, in the steps to come of this optimizer or of all."""
        named = (self._by_name[optimizer],) if optimizer else tuple(self._watches.values())
        for watch in named:
            watch.locator.arm()
            watch.wake()

    def _send_stale(self) -> None:
        """In the sending thread: let no frame wait for a loss that may never be logged."""
        now = time.monotonic()
        if now < self._stale_at:
            return
        self._stale_at = now + STALE_S / 4
        for watch in list(self._by_name.values()):
            pending = watch.pending
            if pending is not None and now - pending.opened_at > STALE_S:
                self.send(pending)

    def _unique_name(self, kind: str) -> str:
        """Never given twice in a run: steps are counted, and stored, by it."""
        name = kind
        while name in self._by_name or not self._kinds[kind]:
            self._kinds[kind] += 1
            name = kind if self._kinds[kind] == 1 else f"{kind}-{self._kinds[kind]}"
        return name


_jobs: weakref.WeakSet[Job] = weakref.WeakSet()


def _forked() -> None:
    """In a process that was forked from one that watches: it has the hooks and nobody who sends."""
    for job in _jobs:
        job.alive, job.news = False, True


os.register_at_fork(after_in_child=_forked)


def make_run_info(
    identity: Identity, settings: Settings, name: str, config: Mapping[str, Any], tags: list[str]
) -> RunInfo:
    """How the run introduces itself."""
    from gradwatch import __version__

    return RunInfo(
        id=identity.run,
        project=_text(settings.project, 200),
        name=_text(name, 200),
        started_at=time.time(),
        world_size=identity.world_size,
        config={_text(key): _plain_value(value) for key, value in config.items()},
        tags=[_text(tag, 200) for tag in tags if tag][:100],
        host=_text(os.uname().nodename, 200),
        agent_version=__version__,
    )


def _at_hand(value: float | Tensor) -> bool:
    """Whether a number can be looked at without waiting for a device."""
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _plain_value(value: Any, depth: int = 0) -> Any:
    """A configuration's value as JSON can carry it."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, int) and abs(value) < 2**63:
        return int(value)
    if isinstance(value, Mapping) and depth < MAX_CONFIG_DEPTH:
        return {_text(key): _plain_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and depth < MAX_CONFIG_DEPTH:
        return [_plain_value(item, depth + 1) for item in value]
    return _text(value)


def _text(value: Any, limit: int = MAX_CONFIG_TEXT) -> str:
    """As UTF-8 can carry it: a path may hold bytes that are no text."""
    try:
        text = str(value)
    except Exception:
        text = type(value).__name__
    return text[:limit].encode("utf-8", "replace").decode("utf-8")
