"""Watching one optimizer: its step hooks, and which steps are looked at."""

from __future__ import annotations

import cmath
import functools
import math
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from gradwatch.activations import ActivationTaps, Outputs
from gradwatch.clipping import Clipped
from gradwatch.flight import FlightRecorder
from gradwatch.interrupts import is_scripts_own
from gradwatch.inventory import Inventory
from gradwatch.layers import PARALLEL_WRAPPERS
from gradwatch.locate import Locator, gradient_storages
from gradwatch.measure import plain, read_scalar
from gradwatch.notice import say, told
from gradwatch.pacer import UNSEEN_SHARE, WARM_UP_STEPS, Clock, Pacer
from gradwatch.pending import PendingFrame
from gradwatch.rank_check import RankCheck
from gradwatch.reading import NoGradient, Reading
from gradwatch.scaling import carried_scale, found_overflow, scale_of, skips_by_itself
from gradwatch.uncompiled import leave_uncompiled, uncompiled_hook
from gradwatch.waiting import WaitClock

if TYPE_CHECKING:
    from gradwatch.job import Job
    from gradwatch.tracer import Trace

# Shares of the budget: norms are what every step wants, details cost several times as much. The
# flight recorder has a twentieth, and another is left for what no clock of ours sees: the caches
# that the job finds emptied.
NORM_SHARE = 0.5
DETAIL_SHARE = 0.4
# Part of the norms' share that comparing ranks may take, in a job of several.
COMPARE_SHARE = 0.15
# After this many faults of its own, the watch gives up rather than cost the job more.
MAX_FAULTS = 5
NEVER = 1 << 62  # a step


class OptimizerWatch:
    """Reads the gradients that one optimizer applies, in its step hooks.

    Only the step's pre-hook sees what is applied: averaged over ranks, accumulated, unscaled and
    clipped. An optimizer that is given a closure computes its gradients inside the step, so there
    they are read after it.
    """

    def __init__(
        self,
        job: Job,
        optimizer: torch.optim.Optimizer,
        name: str,
        models: Sequence[nn.Module] | None,
    ) -> None:
        # What every step touches comes first: attributes lie in memory as they are made.
        self._job = job
        self.step = 0
        self._clock = Clock(job.settings.overhead_budget)
        self._wake_step = 0  # until this step, and until the clock shows
        self._wake_s = 0.0  # this, no step needs more than to be counted
        self._started_at = 0.0
        self._elapsed_s = 0.0  # between the last two steps
        self._sentinel: Tensor | None = None
        self._broken = False
        self._within = False  # a step of the optimizer,
        self._inner = 0  # and so many that it calls, as an override does torch's
        self._wait_clock: WaitClock | None = None  # where torch averages over ranks
        self._lr: Any = None  # at the last step, as the optimizer has it
        self.pending: PendingFrame | None = None  # of the last step, if it has one
        self.name = name
        self._optimizer = weakref.ref(optimizer)
        self.inventory = Inventory(job, self._optimizer, name, models)
        self._faults = 0
        self._scaler: GradScaler | None = None  # within its step,
        self._scaled_step = 0  # after this one of ours
        settings = job.settings
        copies = any(type(model).__name__ in PARALLEL_WRAPPERS for model in models or ())
        # Under DDP every rank holds the same gradients: the others only show whether they drift.
        self._replica = copies and job.rank > 0
        budget = settings.overhead_budget
        norm_every = settings.detail_every if self._replica else settings.norm_every
        self.recorder = FlightRecorder(budget)
        self.locator = Locator(
            name, job.rank, settings.locate_nan, lambda: self.inventory.survey().modules.named
        )
        self._norm_pacer = Pacer(norm_every, budget * NORM_SHARE)
        self._detail_pacer = Pacer(settings.detail_every, budget * DETAIL_SHARE)
        self._taps = ActivationTaps()
        self._rank_check = RankCheck(settings.detail_every, budget * COMPARE_SHARE)
        self._cost_s = 0.0  # of the last step in the training thread, if it was looked at
        self._surveys = job.surveys
        self._observe_uncompiled = uncompiled_hook(self._guarded_observe)
        self._trace_uncompiled = uncompiled_hook(self._trace_next)
        self._send_uncompiled = uncompiled_hook(job.send)
        _leave_uncompiled()
        self._optimizer = weakref.ref(optimizer, self._gone)  # not of a watch that is but half made
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if models:
            self._trace_next()

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """None once the training script has let go of it."""
        return self._optimizer()

    def remove(self) -> None:
        """Take every hook away, and let go of the model."""
        for hook in self._hooks:
            hook.remove()
        self.locator.close()
        self.inventory.close()
        self._forget()

    def _gone(self, _: object) -> None:
        """The script has let go of the optimizer."""
        if self._job.alive:  # else this may be the interpreter's end, and half of it is gone
            self._forget()
            self._job.forgotten()

    def _forget(self) -> None:
        """Keep none of the optimizer's tensors alive."""
        self.inventory.forget()
        self._time_waits(None)
        self._sentinel = None
        self._taps.forget()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is not self._optimizer():
            return  # a wrapper that shares its optimizer's hooks; that one steps too
        if self._within and _steps_already(optimizer):
            self._inner += 1
            return
        self._within, self._inner = True, 0  # still within, where a step has raised
        if not _has_closure(optimizer, args, kwargs):
            if self._passed(optimizer):
                return
            self._observe_uncompiled(optimizer)
        if self._job.alive:
            self._job.judge.raise_if_stopped()  # the one error that is meant for the script

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is not self._optimizer():
            return
        if self._inner:
            self._inner -= 1
            return
        self._within = False
        if _has_closure(optimizer, args, kwargs):
            self._observe_uncompiled(optimizer)
        wakes_s = self._clock.now_s + self._elapsed_s  # or later
        if self.step + 1 >= self._wake_step or wakes_s >= self._wake_s:
            self._trace_uncompiled()

    def _passed(self, optimizer: torch.optim.Optimizer) -> bool:
        """Count a step that nothing is to be recorded of; False when it has to be looked at.

        Where steps are short nearly all are of this kind, and the cost of them is what the budget
        leaves nothing beside: so this touches as little as can be.
        """
        started = time.perf_counter()
        job, step, elapsed_s = self._job, self.step + 1, started - self._started_at
        paced_s = elapsed_s / job.sharers
        wakes = step >= self._wake_step or self._clock.after(paced_s) >= self._wake_s
        if wakes or job.news:
            return False
        try:
            broken = self._is_broken()
            self._lr = optimizer.param_groups[0].get("lr")
            if broken and not self._broken:
                return False
            if self._wait_clock is not None:
                self._note_times(self._wait_clock, elapsed_s)
        except Exception as error:
            if is_scripts_own(error):
                raise
            return False  # where it is looked at, faults are told of
        self._broken = broken
        self.step, self._started_at, self._elapsed_s = step, started, elapsed_s
        if self.pending is not None:
            self._send_uncompiled(self.pending)
            self.pending = None
        job.latest = self
        self._clock.advance(paced_s, (1 + UNSEEN_SHARE) * (time.perf_counter() - started))
        return True

    def frame(self) -> PendingFrame | None:
        """That of the last step, for what is logged to it: made now if the step had none."""
        if self.pending is None and self.step:
            self.pending = self._opened(None)
        return self.pending

    def _opened(
        self,
        reading: Reading | NoGradient | None,
        overflow: Callable[[], float] | None = None,
        outputs: Outputs | None = None,
    ) -> PendingFrame:
        frame = PendingFrame(
            *(self.name, self.step, max(1, self.inventory.version), reading),
            *(_learning_rate(self._lr), overflow, outputs),
        )
        if self._elapsed_s:
            elapsed_s = self._elapsed_s
            frame.measured("step_time_s", lambda: elapsed_s)
        return frame

    def scaler_steps(self, scaler: GradScaler) -> None:
        """A loss scaler is about to step the optimizer, or to skip its step."""
        if not scaler.is_enabled():
            return  # it calls the optimizer's step, and has no scale
        self._scaler, self._scaled_step = scaler, self.step
        if skips_by_itself(self._optimizer()):
            self.wake()

    def scaler_stepped(self) -> None:
        """It is done. When the optimizer's step was not reached, it was skipped."""
        if self._scaler is not None and self.step == self._scaled_step:
            optimizer = self._optimizer()
            if optimizer is not None:
                self._guarded_observe(optimizer, skipped=True)
            self._trace_next()
        self._scaler = None

    def _guarded_observe(self, optimizer: torch.optim.Optimizer, skipped: bool = False) -> None:
        """No fault of the agent's own reaches the training loop."""
        scaler, self._scaler = self._scaler, None
        self.wake()
        try:
            trace, outputs = self.locator.end(), self._taps.close()
            if self._job.alive and self._faults < MAX_FAULTS:
                self._observe(optimizer, trace, outputs, scaler, skipped)
        except Exception as error:
            if is_scripts_own(error):
                raise
            self._failed("record", error)

    def _trace_next(self) -> None:
        """Between two steps: when a NaN is to be located, and for a detail frame to come."""
        started = time.perf_counter()
        try:
            if self._job.alive and self._faults < MAX_FAULTS:
                self.locator.begin()
                expected_s = self._clock.after(self._elapsed_s / self._job.sharers)
                detail = self._detail_pacer.due(self.step + 1, expected_s)
                if detail and self.inventory.layers and not self._replica:
                    self._taps.open(self.inventory.layers, lambda: self.inventory.survey().modules)
                self._sleep()
            if not self._taps.opened:  # else it is part of what they spent
                self._clock.advance(0.0, time.perf_counter() - started)
        except Exception as error:
            if is_scripts_own(error):
                raise
            self._failed("trace", error)

    def wake(self) -> None:
        """Look at the next step, whatever it is. In any thread."""
        self._wake_step = 0

    def _sleep(self) -> None:
        """Have steps only counted until one may be due."""
        if self.step < WARM_UP_STEPS:
            return
        now_s = self._clock.now_s
        if self._norm_pacer.due(self.step + 1, now_s):
            self.wake()
            return
        more = () if self._replica else (self._detail_pacer, self.recorder.pacer)
        pacers = (self._norm_pacer, *more)
        self._wake_s = min(
            (pacer.next_s for pacer in pacers if pacer.next_s > now_s), default=math.inf
        )
        wake_steps = [pacer.next_step for pacer in pacers if pacer.next_s <= now_s]
        if self.inventory.comparable:
            wake_steps.append(self._rank_check.next_step(self.step))
        # First to sleep, and then to look whether it may: another thread may wake this one.
        self._wake_step = min(wake_steps, default=NEVER)
        optimizer = self._optimizer()
        scaled = optimizer is not None and found_overflow(optimizer) is not None
        idle = self.locator.idle and self._surveys.fresh
        if self._taps.opened or scaled or not idle:
            self.wake()

    def _failed(self, what: str, error: Exception) -> None:
        self._faults += 1
        self._job.outlet.drops["agent_error"] += 1
        say(f"could not {what} a step of {self.name}: {told(error)}")

    def _observe(
        self,
        optimizer: torch.optim.Optimizer,
        trace: Trace | None,
        outputs: Outputs | None,
        scaler: GradScaler | None,
        skipped: bool,
    ) -> None:
        started = time.perf_counter()
        self._elapsed_s = elapsed_s = started - self._started_at if self._started_at else 0.0
        self._started_at = started
        self.step += 1
        self._surveys.stepped(self.name)
        clipped, early = self._job.take_news()
        detail_s, other_s = self._job.uncharged_cost_s()
        # The budget is the job's: its optimizers share it.
        self._clock.advance(elapsed_s / self._job.sharers, other_s)
        clock_s = self._clock.now_s
        self._detail_pacer.charge(clock_s, detail_s + self._taps.spent_s())
        overflow, skipped = _overflow(optimizer, skipped)
        norm_due = self._norm_pacer.due(self.step, clock_s) and not skipped
        detail_due = self._detail_pacer.due(self.step, clock_s) and not skipped
        detail_due = detail_due and not self._replica
        if self._wait_clock is not None:
            self._note_times(self._wait_clock, elapsed_s)
        compare = self.inventory.comparable and self._rank_check.due(self.step) and not skipped
        norm_due |= compare
        reading: Reading | NoGradient | None = None
        # A NaN is worth its frame at once, however far the budget has stretched the others.
        turned = not (norm_due or detail_due or skipped) and self._turned_non_finite()
        norm_due |= turned
        if skipped and not self.inventory.version:
            self._refresh()  # no frame is worth anything without its manifest
        if norm_due or detail_due:
            reading = self._measured(carried_scale(optimizer), clipped, detail_due, compare)
        self._lr = optimizer.param_groups[0].get("lr")
        known = outputs is not None and outputs.layers is self.inventory.layers
        frame = self._opened(reading, overflow, outputs if detail_due and known else None)
        for times_name, time_s in self._rank_check.times_s().items() if compare else ():
            frame.measured(times_name, time_s)
        loss_scale = None if scaler is None else scale_of(scaler)
        if loss_scale is not None and (reading is not None or skipped):
            frame.measured("grad_scale", read_scalar(loss_scale))
        self._job.send(self.pending)
        frame.scalars.update(early)
        self._job.latest, self.pending = self, frame
        broken = turned or (reading is not None and reading.broken)
        if reading is not None:
            self._broken = broken
        frame.hurry = broken or detail_due  # a detail frame holds copies of gradients
        if not skipped:
            self._locate(trace, broken)
        cost_s = time.perf_counter() - started
        if detail_due:
            self._detail_pacer.took(self.step, clock_s, cost_s)
            self._norm_pacer.seen(self.step)  # it holds the norms
        elif norm_due:
            self._norm_pacer.took(self.step, clock_s, cost_s)
        else:
            self._clock.advance(0.0, (1 + UNSEEN_SHARE) * cost_s)
        if compare:
            self._rank_check.took(cost_s)
        if not broken and not skipped:
            self._record(optimizer, clock_s)
        self._cost_s = time.perf_counter() - started

    def _measured(
        self, scale: Tensor | None, clipped: Clipped | None, detail: bool, compare: bool
    ) -> Reading | NoGradient:
        self._refresh()
        parameters, meter = self.inventory.parameters, self.inventory.meter
        if detail:
            reading = meter.details(parameters, scale, self.step, compare)
        else:
            reading = meter.norms(parameters, scale, clipped, compare)
        return reading or NoGradient(len(parameters))

    def _locate(self, trace: Trace | None, broken: bool) -> None:
        """Before the step: read what was traced, and keep the weights that NaN will reach."""
        weights = self.inventory.parameters
        if trace is not None:
            explain = self.locator.explain(trace, self.step, gradient_storages(weights))
            self._job.explain(explain)
        elif self.locator.obstructed:
            self._job.explain(self.locator.finish)
        if broken:
            self.locator.keep(weights, self.step, self._surveys.suspect)
            self.locator.arm()

    def _record(self, optimizer: torch.optim.Optimizer, clock_s: float) -> None:
        """Keep what the flight recorder may see of this step."""
        if not self.recorder.pacer.due(self.step, clock_s) or self._replica:
            return
        started = time.perf_counter()
        inventory, scale = self.inventory, carried_scale(optimizer)
        with torch.no_grad():
            self.recorder.sample(self.step, max(1, inventory.version), inventory.parameters, scale)
        self.recorder.pacer.took(self.step, clock_s, time.perf_counter() - started)

    def _turned_non_finite(self) -> bool:
        """Whether the input's layer has a non-finite gradient now and had none a step ago."""
        before, self._broken = self._broken, self._is_broken()
        return self._broken and not before

    def _is_broken(self) -> bool:
        """Whether the input's layer has a non-finite gradient.

        NaN spreads from where it arises to every layer before, so one small tensor shows it. Only
        on a CPU, where looking at a number is no synchronisation.
        """
        gradient = self._sentinel.grad if self._sentinel is not None else None
        if gradient is None or not gradient.is_cpu or gradient.is_sparse:
            return False
        # This rank's part alone: the sum of a DTensor would be a collective.
        local = gradient if type(gradient) is Tensor else plain(gradient)
        return not cmath.isfinite(local.sum().item())

    def _refresh(self) -> None:
        """See what the layers are now."""
        self.inventory.refresh()
        self._sentinel = self.inventory.sentinel
        self._time_waits(self.inventory.averaged)

    def _note_times(self, clock: WaitClock, elapsed_s: float) -> None:
        """What the rank check is made of: of every step, how long it took and what it waited."""
        lost_s, self._cost_s = self._cost_s + clock.starved_s(), 0.0
        self._rank_check.stepped(elapsed_s - lost_s, clock.take())

    def _time_waits(self, parameter: Tensor | None) -> None:
        """Time how long this rank waits for the others, at the backward passes that reach this."""
        known = self._wait_clock
        if known is not None and known.parameter is not parameter:
            known.remove()
            self._wait_clock = None
        if parameter is not None and self._wait_clock is None:
            self._wait_clock = WaitClock(parameter, lambda error: self._failed("time", error))


@functools.cache
def _leave_uncompiled() -> None:
    """What every step calls."""
    watch: Any = OptimizerWatch
    looking: list[Any] = [watch._before_step, watch._after_step, watch._passed, watch._is_broken]
    timing: list[Any] = [watch._note_times, WaitClock.starved_s, WaitClock.take, RankCheck.stepped]
    leave_uncompiled(*looking, *timing, _has_closure, _steps_already)


def _steps_already(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of this optimizer called the one whose hook this runs in.

    torch wraps the step of each class, so that hooks are called for an override and again for what
    it overrides.
    """
    wrapper = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    frame = wrapper.f_back
    while frame is not None:
        if frame.f_code is wrapper.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def _has_closure(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether a step was given a function that computes the gradients.

    torch hands its hooks the optimizer too, as the first of the arguments.
    """
    if not kwargs and len(args) == 1 and args[0] is optimizer:  # nearly always
        return False
    given = [*args, kwargs.get("closure")]
    return any(callable(item) for item in given if item is not optimizer)


def _overflow(
    optimizer: torch.optim.Optimizer, skipped: bool
) -> tuple[Callable[[], float] | None, bool]:
    """Says, by more than 0, whether a loss scaler skips this step, and whether that is known yet.

    skipped: by the scaler itself. A fused optimizer is told by a number, which on an accelerator
    would have to be waited for.
    """
    found = found_overflow(optimizer)
    if skipped or found is None:
        return (lambda: 1.0) if skipped else None, skipped
    read = read_scalar(found)
    return read, found.device.type == "cpu" and read() > 0


def _learning_rate(rate: Any) -> float:
    """A group's learning rate; NaN when it is no number, or lies on a device and would be waited
    for."""
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return math.nan
    try:
        return float(rate)
    except (TypeError, ValueError, RuntimeError):  # a schedule, or several rates
        return math.nan
