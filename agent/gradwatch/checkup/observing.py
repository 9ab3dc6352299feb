"""Watching the first steps of a training from outside.

One observer sees the calls of modules, torch functions and custom autograd functions, `backward()`
and the steps of optimizers, and hands each to its notes. It changes nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode

from gradwatch.checkup import optimizers
from gradwatch.checkup.functions import INVENTING, LOSSES, name_of
from gradwatch.checkup.notes import Notes
from gradwatch.checkup.observation import Observation
from gradwatch.checkup.tapping import FunctionTap
from gradwatch.notice import told

# A script that has gone back so often without an optimizer's step has none.
MAX_BACKWARDS = 128


class EnoughSeen(BaseException):  # no error: it ends a script as SystemExit does
    """Raised in the script once its first steps have been seen."""


class Observer(TorchFunctionMode):
    """Observes what the block does, and raises EnoughSeen in it after so many steps (0: never)."""

    def __init__(self, steps: int = 0) -> None:
        super().__init__()
        self._notes = Notes()
        self._steps = steps
        self._stack: list[nn.Module] = []
        self._first_layer: nn.Module | None = None
        self._paused = False
        self._stepping = False
        self._functions = FunctionTap(self._function, self._unseen)
        self._thread, self._pid = threading.get_ident(), os.getpid()

    @property
    def seen(self) -> Observation:
        return self._notes.seen

    def __enter__(self) -> Observer:
        self._module_call = nn.Module.__call__
        observer = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return observer._module(module, args, kwargs)

        nn.Module.__call__ = call
        self._functions.open()
        self._hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        return super().__enter__()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        nn.Module.__call__ = self._module_call
        self._functions.close()
        for hook in self._hooks:
            hook.remove()
        self._guarded(self._notes.close)
        if isinstance(exc_val, Exception):
            self.seen.error = told(exc_val)

    @property
    def _away(self) -> bool:
        """Whether this is not the script's own doing: ours, an optimizer's, a worker's."""
        return (
            self._paused
            or (self._stepping and not torch.is_grad_enabled())
            or threading.get_ident() != self._thread
            or os.getpid() != self._pid
        )

    @property
    def _inside(self) -> nn.Module | None:
        """The innermost module whose forward is running."""
        return self._stack[-1] if self._stack else None

    def _guarded(self, note: Callable[..., Any], *arguments: Any) -> Any:
        """Do our own work unseen by ourselves; what fails leaves a check without its data."""
        self._paused = True
        try:
            return note(*arguments)
        except Exception as error:
            self._notes.fail(told(error))
            return None
        finally:
            self._paused = False

    def _unseen(self, body: Callable[[], Any]) -> Any:
        """Run a part of the script without observing it."""
        before, self._paused = self._paused, True
        try:
            return body()
        finally:
            self._paused = before

    # What the script calls.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._away:
            return func(*args, **kwargs)
        if func is Tensor.backward:
            return self._backward(func, args, kwargs)
        name = name_of(func)
        notes = self._notes
        self._guarded(notes.arguments, func, name, args, self._inside)
        call = None if self._stack else self._guarded(notes.begin, func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            if name in LOSSES:
                self._guarded(notes.loss, name, args, kwargs, None, told(error))
            raise
        if name in LOSSES:
            self._guarded(notes.loss, name, args, kwargs, result, "")
        if name in INVENTING and isinstance(result, Tensor):
            notes.invented[id(result)] = result
        self._guarded(notes.keep, call, result)
        return result

    def _module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._away:
            return self._module_call(module, *args, **kwargs)
        notes = self._notes
        self.seen.called[id(module)] = module
        outermost = not self._stack
        if outermost:
            self._first_layer = None
        if self._first_layer is None and next(module.parameters(recurse=False), None) is not None:
            self._first_layer = module
        call = self._guarded(notes.begin, module, args, kwargs) if outermost else None
        self._stack.append(module)
        try:
            result = self._module_call(module, *args, **kwargs)
        except Exception:
            self.seen.module_in_error = self.seen.module_in_error or type(module).__name__
            raise
        finally:
            self._stack.pop()
        if call is not None:
            self._guarded(notes.model, call, result, self._first_layer)
        self._guarded(notes.keep, call, result)
        return result

    def _function(self, function: Any, args: tuple[Any, ...]) -> None:
        # Inside of a function no gradient is kept, which elsewhere means that none is wanted.
        if not self._paused and threading.get_ident() == self._thread:
            self._guarded(self._notes.function, function, args)

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._guarded(self._notes.backward, args[0])
        result = self._unseen(lambda: func(*args, **kwargs))
        if self._steps and not self._notes.trainings and len(self.seen.values) >= MAX_BACKWARDS:
            raise EnoughSeen
        return result

    # The steps of optimizers.

    def step(self, optimizer: torch.optim.Optimizer, closure: Any = None) -> None:
        """Take a step that this observer sees, and no hook of anybody else."""
        self._before_step(optimizer, (), {})
        optimizers.step(optimizer, closure)
        self._after_step(optimizer, (), {})

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._away:
            return
        self._guarded(self._notes.begin_step, optimizer)
        self._stepping = True

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._stepping:
            return
        self._guarded(self._notes.end_step, optimizer)
        self._stepping = False
        first = next(iter(self._notes.trainings.values()), None)
        if self._steps and first is not None and len(first.gradients) >= self._steps:
            raise EnoughSeen
