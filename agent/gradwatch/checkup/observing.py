"""Watching the first steps of a training from outside: what it calls, and with what.

One observer sees the calls of modules, torch functions and custom autograd functions, `backward()`
and the steps of optimizers. It keeps what the checks ask for and changes nothing.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterable, Sequence
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
from gradwatch.checkup.functions import (
    DOMAINS,
    INVENTING,
    LOSSES,
    WEIGHING,
    Domain,
    activation_of,
    argument,
    name_of,
    stops_gradient,
    unusable,
)
from gradwatch.checkup.gradients import carries, gradient_of, has_gradient
from gradwatch.checkup.objective import Call, Copies, Objective, leading_to, leaves
from gradwatch.checkup.observation import (
    FunctionCall,
    Hazard,
    LossCall,
    ModelCall,
    Observation,
    Training,
)
from gradwatch.checkup.randomness import seeded
from gradwatch.checkup.tapping import FunctionTap
from gradwatch.checkup.trees import tensors_in
from gradwatch.layers import Layer, named_layers, owning_models
from gradwatch.notice import told

# Calls of one step that are kept: a loop written out in tensors has more, and is not repeated.
MAX_CALLS = 20_000
# Calls of each custom function, of losses and of models that are kept.
MAX_FUNCTION_CALLS = 2
MAX_RECORDS = 64
# A script that has gone back so often without an optimizer's step has none.
MAX_BACKWARDS = 128
SWITCHED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # pyright: ignore[reportPrivateUsage]


class EnoughSeen(BaseException):  # no error: it ends a script as SystemExit does
    """Raised in the script once its first steps have been seen."""


class Observer(TorchFunctionMode):
    """Observes what the block does, and raises EnoughSeen in it after so many steps (0: never)."""

    def __init__(self, steps: int = 0) -> None:
        super().__init__()
        self.seen = Observation()
        self._steps = steps
        self._calls: list[Call] = []
        self._known: set[int] = set()  # identities of tensors that depend on weights
        self._invented: dict[int, Tensor] = {}
        self._copies = Copies()
        self._copying = True  # until an optimizer's second step
        self._objectives: list[Objective] = []
        self._trainings: dict[int, Training] = {}
        self._clean: set[int] = set()  # optimizers whose gradients were seen to be cleared
        self._stack: list[nn.Module] = []
        self._first_layer: nn.Module | None = None
        self._paused = False
        self._stepping = False
        self._functions = FunctionTap(self._function, self._unseen)
        self._thread, self._pid = threading.get_ident(), os.getpid()

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
        if not self._trainings and self._objectives:
            self._guarded(self._begin_without_optimizer)
        self.seen.trainings = list(self._trainings.values())
        self.seen.held = _held_by_optimizers()
        if isinstance(exc_val, Exception):
            self.seen.error = told(exc_val)
        self._calls.clear()
        self._invented.clear()

    @property
    def _away(self) -> bool:
        """Whether this is not the script's own doing: ours, an optimizer's, a worker's."""
        return (
            self._paused
            or (self._stepping and not torch.is_grad_enabled())
            or threading.get_ident() != self._thread
            or os.getpid() != self._pid
        )

    # What the script calls.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._away:
            return func(*args, **kwargs)
        if func is Tensor.backward:
            return self._backward(func, args, kwargs)
        name = name_of(func)
        self._guarded(self._note_arguments, func, name, args, kwargs)
        call = None if self._stack else self._begin(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            if name in LOSSES:
                self._guarded(self._note_loss, name, args, kwargs, None, told(error))
            raise
        if name in LOSSES:
            self._guarded(self._note_loss, name, args, kwargs, result, "")
        if name in INVENTING and isinstance(result, Tensor):
            self._invented[id(result)] = result
        self._guarded(self._keep, call, result)
        return result

    def _module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._away:
            return self._module_call(module, *args, **kwargs)
        self.seen.called[id(module)] = module
        outermost = not self._stack
        if outermost:
            self._first_layer = None
        if self._first_layer is None and next(module.parameters(recurse=False), None) is not None:
            self._first_layer = module
        call = self._begin(module, args, kwargs) if outermost else None
        self._stack.append(module)
        try:
            result = self._module_call(module, *args, **kwargs)
        except Exception:
            self.seen.module_in_error = self.seen.module_in_error or type(module).__name__
            raise
        finally:
            self._stack.pop()
        if call is not None:
            self._guarded(self._note_model, call, result)
        self._guarded(self._keep, call, result)
        return result

    def _function(self, function: Any, args: tuple[Any, ...]) -> None:
        # Inside of a function no gradient is kept, which elsewhere means that none is wanted.
        if not self._paused and threading.get_ident() == self._thread:
            self._guarded(self._note_function, function, args)

    def _unseen(self, body: Callable[[], Any]) -> Any:
        """Run a part of the script without observing it."""
        before, self._paused = self._paused, True
        try:
            return body()
        finally:
            self._paused = before

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._guarded(self._note_backward, args[0])
        result = self._unseen(lambda: func(*args, **kwargs))
        if self._steps and not self._trainings and len(self.seen.values) >= MAX_BACKWARDS:
            raise EnoughSeen
        return result

    # What is kept of it. None of this may disturb the script.

    def _guarded(self, note: Callable[..., None], *arguments: Any) -> None:
        """Do our own work unseen by ourselves; what fails leaves a check without its data."""
        self._paused = True
        try:
            note(*arguments)
        except Exception as error:
            self._copies.problem = self._copies.problem or told(error)
        finally:
            self._paused = False

    def _begin(self, function: Any, args: Any, kwargs: Any) -> Call | None:
        """A call that may have to be made again; copies its module before it changes."""
        if not (self._copying and torch.is_grad_enabled()):
            return None
        if isinstance(function, nn.Module):
            self._guarded(self._copies.add, function)
        return Call(function, args, kwargs, self._copies)

    def _keep(self, call: Call | None, result: Any) -> None:
        """Remember a call if the loss may depend on it."""
        if call is None:
            return
        call.result = result
        inputs = call.inputs
        if not (
            any(tensor.grad_fn is not None for tensor in tensors_in(result))
            or any(id(tensor) in self._known for tensor in inputs)
        ):
            return
        for tensor in inputs:
            if tensor.is_leaf and tensor.requires_grad:
                self._copies.add(tensor)
        if len(self._calls) >= MAX_CALLS:
            self._copies.problem = "a step makes too many calls outside of modules"
            return
        self._calls.append(call)
        self._known.update(id(tensor) for tensor in call.outputs)

    def _note_arguments(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        if self._stack and args and isinstance(args[0], Tensor) and args[0].requires_grad:
            self.seen.gradient_stopped |= stops_gradient(func) or not torch.is_grad_enabled()
        if not torch.is_grad_enabled():
            return
        domain = DOMAINS.get(name)
        if domain is not None:
            self._note_domain(name, domain, args)
        if name in WEIGHING and len(args) > 1 and activation_of(args[0]) == "Sigmoid":
            self.seen.sigmoid_fed.add(id(args[1]))

    def _note_domain(self, name: str, domain: Domain, args: Any) -> None:
        tensors = [item for item in args if isinstance(item, Tensor)]
        given = argument(args, {}, domain.argument)
        if not isinstance(given, Tensor) or not any(item.requires_grad for item in tensors):
            return
        # A constant that log or sqrt is taken of has no slope that matters.
        if not given.requires_grad and name not in ("div", "true_divide", "divide"):
            return
        outside = domain.outside(given.detach(), domain.bound)
        if bool(outside.any()) and len(self.seen.hazards) < MAX_RECORDS:
            module = type(self._stack[-1]).__name__ if self._stack else ""
            share = float(outside.double().mean())
            self.seen.hazards.append(Hazard(name, module, domain.what, share))

    def _note_loss(self, name: str, args: Any, kwargs: Any, result: Any, error: str) -> None:
        given, target = (
            argument(args, kwargs, 0, "input"),
            argument(args, kwargs, 1, "target"),
        )
        if not (isinstance(given, Tensor) and isinstance(target, Tensor)):
            return
        if not torch.is_grad_enabled() or len(self.seen.losses) >= MAX_RECORDS:
            return
        ignored = kwargs.get("ignore_index", -100)
        mean = kwargs.get("reduction", "mean") == "mean" and kwargs.get("weight") is None
        value = float(result.detach()) if isinstance(result, Tensor) and mean else float("nan")
        self.seen.losses.append(
            LossCall(
                name=name,
                given=given.detach(),
                target=target.detach(),
                activation=activation_of(given),
                invented=id(target) in self._invented,
                ignored=ignored,
                value=value,
                error=error,
            )
        )

    def _note_model(self, call: Call, result: Any) -> None:
        if next(call.function.parameters(), None) is None or len(self.seen.models) >= MAX_RECORDS:
            return
        first = type(self._first_layer).__name__ if self._first_layer is not None else ""
        data = tuple(
            tensor.detach()
            for tensor in call.inputs
            if not tensor.requires_grad and id(tensor) not in self._known
        )
        finite = not any(unusable(tensor.detach()) for tensor in tensors_in(result))
        self.seen.models.append(ModelCall(call.function, data, finite, "Norm" in first))

    def _note_function(self, function: Any, args: tuple[Any, ...]) -> None:
        known = [item for item in self.seen.functions if item.function is function]
        if len(known) >= MAX_FUNCTION_CALLS:
            return
        kept = tuple(
            item.detach().clone().requires_grad_(item.requires_grad)
            if isinstance(item, Tensor)
            else item
            for item in args
        )
        self.seen.functions.append(FunctionCall(function, kept))

    def _note_backward(self, loss: Tensor) -> None:
        self.seen.seeded = self.seen.seeded or seeded()
        self.seen.no_graph |= not loss.requires_grad
        self.seen.values.append(float(loss.detach().double().sum()))
        reached = leaves(loss)
        self.seen.reached.update((id(tensor), tensor) for tensor in reached)
        for identity, training in self._trainings.items():
            if not any(carries(parameter) for parameter in training.held):
                self._clean.add(identity)
        if self._copying:
            calls = leading_to(loss, self._calls)
            identities = frozenset(id(tensor) for tensor in reached)
            self._objectives.append(Objective(calls, loss, self.seen.values[-1], identities))

    # The steps of optimizers.

    def step(self, optimizer: torch.optim.Optimizer, closure: Any = None) -> None:
        """Take a step that this observer sees, and no hook of anybody else."""
        self._before_step(optimizer, (), {})
        optimizers.step(optimizer, closure)
        self._after_step(optimizer, (), {})

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._away:
            return
        if id(optimizer) not in self._trainings:
            self._guarded(self._begin_training, optimizer)
        training = self._trainings.get(id(optimizer))
        if training is not None and has_gradient(training.held):
            self._guarded(self._measure, training)
        self._stepping = True

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._stepping:
            return
        training = self._trainings.get(id(optimizer))
        if training is not None:
            self._guarded(self._end_step, training)
        self._stepping = False
        first = next(iter(self._trainings.values()), None)
        if self._steps and first is not None and len(first.gradients) >= self._steps:
            raise EnoughSeen

    def _begin_training(self, optimizer: torch.optim.Optimizer) -> None:
        held = [item for group in optimizer.param_groups for item in group["params"]]
        objectives = _reaching(held, self._objectives)
        memo: dict[int, Any] = {}
        for objective in objectives:
            for call in objective.calls:
                memo.update(call.copies.memo)
        for parameter in held:
            if id(parameter) not in memo:
                self._copies.add(parameter)
        memo = {**self._copies.memo, **memo}
        models = owning_models(held)
        name = type(optimizer).__name__
        taken = sum(type(other.optimizer) is type(optimizer) for other in self._trainings.values())
        training = Training(
            name=name if not taken else f"{name}-{taken + 1}",
            optimizer=optimizer,
            copied=None if self._copies.problem else optimizers.copied(optimizer, dict(memo)),
            initial={id(item): memo[id(item)] for item in held if id(item) in memo},
            layers=list(named_layers(models))
            or [Layer(f"parameter_{place}", item, None) for place, item in enumerate(held)],
            objectives=objectives,
            evaluating=_evaluating(self._called_in(models), held),
        )
        self._trainings[id(optimizer)] = training

    def _begin_without_optimizer(self) -> None:
        """For a script that changes its weights by hand: the first backward as a step."""
        weights = [item for item in self.seen.reached.values() if isinstance(item, nn.Parameter)]
        standing_in = torch.optim.SGD(weights, lr=0.0)
        self._objectives = self._objectives[:1]
        self._begin_training(standing_in)
        if has_gradient(weights):
            self._measure(self._trainings[id(standing_in)])
        self.seen.own_optimizer = True

    def _called_in(self, models: Iterable[nn.Module]) -> list[nn.Module]:
        return [
            module
            for model in models
            for module in model.modules()
            if id(module) in self.seen.called
        ]

    def _measure(self, training: Training) -> None:
        training.gradients.append([gradient_of(layer) for layer in training.layers])

    def _end_step(self, training: Training) -> None:
        key = id(training.optimizer)
        steps = len(training.cleared) + 1
        if len(training.gradients) < steps:
            self._measure(training)  # its closure computed them, or there were none
            if not training.objectives:
                training.objectives = _reaching(training.held, self._objectives)[:1]
        training.cleared.append(key in self._clean)
        self._clean.discard(key)
        self._copies = Copies()  # the weights have changed
        if steps > 1:
            self._copying = False
            self._calls.clear()
            self._objectives.clear()


def _held_by_optimizers() -> set[int]:
    """Identities of the parameters of every optimizer alive: one may have its turn only later."""
    optimizers: list[Any] = [
        item for item in gc.get_objects() if issubclass(type(item), torch.optim.Optimizer)
    ]
    return {
        id(item)
        for optimizer in optimizers
        for group in getattr(optimizer, "param_groups", ())
        for item in group["params"]
    }


def _reaching(held: Sequence[Tensor], objectives: Sequence[Objective]) -> tuple[Objective, ...]:
    mine = {id(parameter) for parameter in held}
    return tuple(objective for objective in objectives if objective.reached & mine)


def _evaluating(modules: Sequence[nn.Module], held: Sequence[Tensor]) -> bool:
    """Whether all that behaves otherwise in training was in eval mode, though it is trained."""
    mine = {id(parameter) for parameter in held if parameter.requires_grad}
    switched = [
        module
        for module in modules
        if isinstance(module, SWITCHED)
        and (
            getattr(module, "p", 0) > 0
            or any(id(parameter) in mine for parameter in module.parameters())
        )
    ]
    return bool(switched) and not any(module.training for module in switched)
