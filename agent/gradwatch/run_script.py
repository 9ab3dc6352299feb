"""`gradwatch run train.py`: watch a script without changing a line of it."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import runpy
import sys
import time
import weakref
import zipfile
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from io import open_code
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradwatch.cli import Handover
from gradwatch.heirs import hand_on, heirs
from gradwatch.interrupts import is_scripts_own
from gradwatch.layers import living
from gradwatch.monitor import current_job, leaves_by, runs_begun
from gradwatch.notice import say, told
from gradwatch.pacer import WARM_UP_STEPS
from gradwatch.scaling import Follower, follow
from gradwatch.settings import SettingError, Settings
from gradwatch.uncompiled import uncompiled_hook

# Optimizers that may have come and gone before others have to wait.
FREE = 4
# What the script leaves lives on until the exit handlers are done, as under python. Let go of
# before, a process group that is destroyed with it could wait for ever for a thread of its own that
# waits for Python: the handlers give such threads their turn.
_left: dict[str, Any] = {}


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("-m", "module", is_flag=True, help="SCRIPT is a module or package, as in python -m.")
@click.option("--url", help="The collector, as http://127.0.0.1:8470 [GRADWATCH_URL].")
@click.option("--token", help="Its token, with scope ingest [GRADWATCH_TOKEN].")
@click.option("--project", help="Project that the run belongs to [GRADWATCH_PROJECT].")
@click.option("--name", help="Name of the run; the script's by default [GRADWATCH_NAME].")
@click.option("--norm-every", type=int, help="Steps between norm frames, at least (1).")
@click.option("--detail-every", type=int, help="Steps between detail frames, at least (20).")
@click.option(
    "--overhead-budget",
    type=float,
    help="Share of the training time that the agent may take (0.01); 0 lifts the limit.",
)
@click.option(
    "--stop-on",
    help="Kinds of findings, separated by commas, at which the script ends with an error.",
)
@click.option(
    "--locate-nan/--no-locate-nan",
    default=None,
    help="Trace every step, several times slower, to name what makes the first NaN.",
)
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(module: bool, script: str, arguments: tuple[str, ...], **options: Any) -> None:
    """Run a training script and watch it, without changing a line of it.

    Every model that an optimizer steps is recorded, under the names of its parameters.

    \b
    gradwatch run train.py --epochs 3
    gradwatch run -m package.train
    torchrun --nproc-per-node 2 -m gradwatch run train.py
    """
    try:
        settings = Settings.load(options)
    except SettingError as error:
        raise click.UsageError(str(error)) from None
    if not module and not Path(script).is_file():
        raise click.ClickException(f"there is no script {script!r} here")
    for name, value in options.items():
        if value is not None:
            # A later gradwatch.watch in the script joins this run, with these settings.
            os.environ[f"GRADWATCH_{name.upper()}"] = str(value)
    if not settings.disabled:
        watch_every_optimizer(settings)
        hand_on()
        atexit.register(_say_if_nothing_was_recorded)
    raise Handover(lambda: start_script(module, script, arguments))


def start_script(module: bool, script: str, arguments: tuple[str, ...]) -> None:
    """Run the script as `python script` and `python -m script` do."""
    sys.argv = [script, *arguments]
    folder = os.getcwd() if module else str(Path(script).resolve().parent)
    if sys.flags.safe_path:
        sys.path.insert(0, folder)
    else:
        sys.path[0] = folder  # there stands the folder of this command
    try:
        if module:
            _left.update(runpy.run_module(script, run_name="__main__", alter_sys=True))
        elif script.endswith(".pyc") or zipfile.is_zipfile(script):
            _left.update(runpy.run_path(script, run_name="__main__"))
        else:
            _run_source(os.path.abspath(script))
    except SystemExit as leaving:
        leaves_by(leaving)
        raise
    finally:
        # Python does so once a script is over, before any exit handler.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()


def _run_source(path: str) -> None:
    """Run a source file as the main module, which it stays: threads and exit handlers of the script
    may look for it when its last line is done, as to pickle what it defines.
    """
    main = ModuleType("__main__")
    main.__file__ = path
    main.__loader__ = SourceFileLoader("__main__", path)
    vars(main).update(__builtins__=builtins, __annotations__={}, __cached__=None)
    with open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    _left["before"] = sys.modules["__main__"]
    sys.modules["__main__"] = main
    exec(code, vars(main))


def watch_every_optimizer(settings: Settings) -> Callable[[], None]:
    """Record whatever optimizer steps, until the function returned is called."""
    attach = _attach_to(settings)
    hook = register_optimizer_step_pre_hook(uncompiled_hook(attach))
    leave = follow(_attach_to_scaled(attach))

    def stop() -> None:
        hook.remove()
        leave()

    return stop


class _Admission:
    """Which optimizers are worth being watched.

    To watch one takes a look at all that is alive, in each of its first steps. A script that makes
    a new one for each of its tasks, as meta-learning does, would take a hundred times as long: once
    some have come and gone, others are watched no more often than the budget has it, and those that
    stay have their turn.
    """

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._known: set[weakref.ref[torch.optim.Optimizer]] = set()
        self._gone = 0
        self._next_at = 0.0

    def admits(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether to watch it from this step on."""
        if self._budget and self._gone >= FREE:
            started = time.perf_counter()
            if started < self._next_at:
                return False
            living(nn.Module)
            look_s = time.perf_counter() - started
            self._next_at = started + WARM_UP_STEPS * look_s / self._budget
        self._known.add(weakref.ref(optimizer, self._let_go))
        return True

    def _let_go(self, known: weakref.ref[torch.optim.Optimizer]) -> None:
        self._known.discard(known)
        self._gone += 1


def _attach_to(settings: Settings) -> Any:
    """A global step pre-hook that watches each optimizer from its first step on."""
    admission = _Admission(settings.overhead_budget)
    refused: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # by a fault of ours

    def attach(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        try:
            job = current_job(settings)
            if job is None or job.watched(optimizer) or optimizer in refused:
                return
            if admission.admits(optimizer):
                refused.add(optimizer)
                job.watch(optimizer, None)
                refused.discard(optimizer)
            else:
                job.outlet.drops["short_lived_optimizer"] += 1
                say(
                    "many optimizers come and go: not every one is recorded; "
                    "`--overhead-budget 0` records all"
                )
        except Exception as error:
            if is_scripts_own(error):
                raise
            say(f"cannot watch {type(optimizer).__name__}: {told(error)}")

    return attach


def _attach_to_scaled(attach: Any) -> Follower:
    """The same for a loss scaler, which may skip the first steps, or all of a job's."""

    def follower(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        attach(optimizer, (), {})
        return lambda: None

    return follower


def _say_if_nothing_was_recorded() -> None:
    if not runs_begun() and not heirs():
        say(
            "nothing was recorded: no torch optimizer took a step. A script that changes its "
            "parameters by hand has nothing to hook into"
        )
