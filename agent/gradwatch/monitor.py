"""The one line: `monitor = gradwatch.watch(model, optimizer)`."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradwatch.acting import OnFinding
from gradwatch.clipping import clip_grad_norm_
from gradwatch.health.finding import Finding
from gradwatch.heirs import at_the_end
from gradwatch.identity import identify
from gradwatch.job import Job, make_run_info
from gradwatch.notice import described, say, told
from gradwatch.settings import Settings, default_run_name, kinds_of
from gradwatch.turns import in_turn
from gradwatch.uncompiled import uncompiled

_current: Job | None = None
MAX_SCALAR_NAME = 200
T = TypeVar("T")

_begun = 0  # runs that this process has recorded or is recording
_given_up = False  # for the rest of this process
_leaving: SystemExit | None = None  # what the script ends by


class Monitor:
    """A handle on the run that this process records.

    Every method is safe to call at any time and never raises for what the collector, the network
    or the disk do. As a context manager it finishes the run, as failed when the block raises.

    Inside of a function that torch.compile compiles, each call of `log` and `clip_grad_norm_` is
    one break of its graph, and an error with fullgraph=True: call them outside of it.
    """

    def __init__(self, job: Job | None) -> None:
        self._job = job
        if job is not None:
            self.log = uncompiled(self.log)
            self.clip_grad_norm_ = uncompiled(self.clip_grad_norm_)

    @property
    def run_id(self) -> str:
        """The run's identifier, 32 hexadecimal digits; empty when watching is disabled."""
        return self._job.run.id if self._job else ""

    @property
    def dropped(self) -> Mapping[str, int]:
        """Frames that had to be dropped, by reason."""
        return dict(self._job.outlet.drops) if self._job else {}

    @property
    def findings(self) -> list[Finding]:
        """What is wrong with this process's frames so far, the gravest first; judged when read."""
        return self._job.judge.findings if self._job else []

    def log(self, **values: float | Tensor) -> None:
        """Add scalars, as `log(loss=loss)`, to the step at hand. Tensors are taken without a sync.

        Raises TypeError for a value that is neither a number nor a one-element tensor.
        """
        for name, value in values.items():
            _check_scalar(name, value)
        if self._job and self._job.alive:
            self._job.log(values)

    def clip_grad_norm_(
        self, parameters: Any, max_norm: float, norm_type: float = 2.0, **keywords: Any
    ) -> Tensor:
        """torch.nn.utils.clip_grad_norm_, to the bit, recorded: the total norm before clipping.

        The norms that it computes serve the step's frame as well.
        """
        if not (self._job and self._job.alive):
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, **keywords)
        clipping = clip_grad_norm_(parameters, max_norm, norm_type, **keywords)
        scalars = {"total_norm_before_clip": clipping.known, "clip_max_norm": max_norm}
        self._job.clipped(clipping.shared, scalars)
        return clipping.total

    def finish(self, status: str = "finished", reason: str = "") -> None:
        """Send what is left and end the run. Calling it twice is fine.

        status: "finished" or "failed", with the reason.
        """
        if status not in ("finished", "failed"):
            raise ValueError(f"status is 'finished' or 'failed', not {status!r}")
        if self._job:
            _finish(self._job, status, reason)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.finish("failed", described(error))


def watch(
    model: nn.Module | Sequence[nn.Module],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    project: str | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    url: str | None = None,
    token: str | None = None,
    norm_every: int | None = None,
    detail_every: int | None = None,
    overhead_budget: float | None = None,
    locate_nan: bool | None = None,
    on_finding: OnFinding | None = None,
    stop_on: Sequence[str] | None = None,
) -> Monitor:
    """Record the gradients that `optimizer` applies to `model`, and stream them to a collector.

    url, token: the collector; without one (nor GRADWATCH_URL) the run is kept on local disk.
    norm_every, detail_every: steps between frames, at least (1 and 20). overhead_budget: share of
    the training time that the agent may take (0.01); it records less often to keep within it, and
    0 lifts the limit. locate_nan: trace every step, several times slower, so that the operation
    that makes the first NaN is named at its own step; without it the steps after are traced.
    on_finding: called with each `gradwatch.Finding`, once, in the agent's thread. stop_on: kinds of
    findings, as ("non_finite",), at which the next `optimizer.step()` raises TrainingStoppedError.
    A second call joins the run that is being recorded, as for a GAN's two
    networks. Raises TypeError or SettingError for arguments that cannot be used, nothing later.
    """
    models = _each(model, nn.Module, "a torch.nn.Module first")
    optimizers = _each(optimizer, torch.optim.Optimizer, "a torch optimizer second")
    settings = Settings.load(
        {
            "project": project,
            "name": name,
            "url": url,
            "token": token,
            "norm_every": norm_every,
            "detail_every": detail_every,
            "overhead_budget": overhead_budget,
            "locate_nan": locate_nan,
            "stop_on": None if stop_on is None else ",".join(_kinds(stop_on)),
        }
    )
    if on_finding is not None and not callable(on_finding):
        raise TypeError(f"on_finding takes a function, not {type(on_finding).__name__}")
    job = current_job(settings, config or {}, list(tags))
    if job is not None:
        job.judge.stop_at(kinds_of(settings.stop_on))
        if on_finding is not None:
            job.judge.listen(on_finding)
        for item in optimizers:
            try:
                job.watch(item, models)
            except Exception as error:
                say(f"cannot watch {type(item).__name__}: {told(error)}")
    return Monitor(job)


def _kinds(given: Sequence[str]) -> Sequence[str]:
    return (given,) if isinstance(given, str) else given


def _each(given: T | Sequence[T], kind: type[T], wanted: str) -> list[T]:
    """One or several, as a list. A ModuleList is one module, though it can be iterated."""
    items = [given] if isinstance(given, kind) else given
    if not isinstance(items, Iterable):
        raise TypeError(f"watch() takes {wanted}, not {type(items).__name__}")
    for item in items:
        if not isinstance(item, kind):
            raise TypeError(f"watch() takes {wanted}, not {type(item).__name__}")
    return list(items)


def current_job(
    settings: Settings, config: Mapping[str, Any] | None = None, tags: Sequence[str] = ()
) -> Job | None:
    """The run that this process records, begun now if there is none; None when disabled."""
    if settings.disabled:
        return None
    known = _current  # nearly always: each step under gradwatch run asks, and waits for nobody
    return known if known is not None and known.alive else _next_job(settings, config or {}, tags)


@in_turn
def _next_job(settings: Settings, config: Mapping[str, Any], tags: Sequence[str]) -> Job | None:
    global _current, _given_up
    if _given_up:
        return None
    if _current is not None and _current.alive:
        return _current  # another thread was quicker
    try:
        _current = _begin(settings, config, tags)
    except Exception as error:  # as where no more threads can be started
        _given_up = True
        say(f"nothing is recorded, for no run can be begun here: {told(error)}")
        return None
    return _current


def _begin(settings: Settings, config: Mapping[str, Any], tags: Sequence[str]) -> Job:
    global _begun
    identity = identify(settings.run_id, {**os.environ, **_place()}, _begun)
    _begun += 1
    name = settings.name or default_run_name()
    job = Job(make_run_info(identity, settings, name, config, list(tags)), identity, settings)
    atexit.register(_finish_at_exit, job)
    at_the_end(job, _finish_at_exit)
    if identity.rank == 0:
        if settings.url:
            say(f"recording run {name!r} ({job.run.id[:8]}), to be seen at {settings.url}")
        else:
            say(
                f"no collector configured (GRADWATCH_URL): keeping run {name!r} in "
                f"{settings.spool_dir}; `gradwatch sync` sends it later"
            )
    return job


def runs_begun() -> int:
    """Runs that this process has recorded or is recording."""
    return _begun


def _place() -> dict[str, str]:
    """This process's rank as torch knows it, where no launcher has put it into the environment."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    group = torch.distributed
    return {"RANK": str(group.get_rank()), "WORLD_SIZE": str(group.get_world_size())}


def _check_scalar(name: str, value: Any) -> None:
    if not 1 <= len(name) <= MAX_SCALAR_NAME:
        raise TypeError(f"log() takes names of 1 to {MAX_SCALAR_NAME} characters, not {name!r}")
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta:
            raise TypeError(f"log({name}=...) takes one number, not shape {tuple(value.shape)}")
    elif not hasattr(value, "__float__") or getattr(value, "size", 1) != 1:
        kind = type(value).__name__
        raise TypeError(f"log({name}=...) takes a number or a one-element tensor, not {kind}")
    else:
        try:
            float(value)
        except Exception as error:
            raise TypeError(f"log({name}=...) takes a number: {told(error)}") from None


def _finish(job: Job, status: str, reason: str) -> None:
    was_alive = job.alive
    try:
        sent = job.finish(status, reason)
    except Exception as error:
        say(f"run {job.run.id[:8]} could not be ended: {told(error)}")
        return
    if was_alive and not job.outlet.ended:
        say(f"the last of run {job.run.id[:8]} is lost: neither collector nor disk took it in time")
    elif was_alive and not sent and job.settings.url:
        say(f"some of run {job.run.id[:8]} is kept on disk; `gradwatch sync` sends it later")


def leaves_by(leaving: SystemExit) -> None:
    """The script ends by this, which the interpreter notes nowhere."""
    global _leaving
    _leaving = SystemExit(leaving.code)  # without the traceback, which keeps all that it ran alive


def _finish_at_exit(job: Job) -> None:
    reason = _failure()
    with contextlib.suppress(KeyboardInterrupt):  # who waits no longer, ends it
        _finish(job, "failed" if reason else "finished", reason)


def _failure() -> str:
    """What the process ends for; "" where it ends well."""
    # The interpreter notes the exception that nobody caught before it runs exit handlers.
    noted = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    error: BaseException | None = noted or sys.exc_info()[1] or _leaving
    if error is None or sys.flags.interactive:
        return ""
    if isinstance(error, SystemExit):
        code: object = error.code
        if code is None or code == 0:
            return ""
        return f"exit status {code}" if isinstance(code, int) else described(error)
    return described(error)
