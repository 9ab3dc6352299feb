"""What is kept of the first steps of a training: the data that the checks ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.checkup import optimizers
from gradwatch.checkup.functions import (
    DOMAINS,
    WEIGHING,
    Domain,
    activation_of,
    argument,
    makes_cosines,
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
from gradwatch.checkup.trees import tensors_in
from gradwatch.layers import Layer, held_by_optimizers, living, named_layers, owning_models

# Calls of one step that are kept: a loop written out in tensors has more, and is not repeated.
MAX_CALLS = 20_000
# Calls of each custom function, of losses and of models that are kept.
MAX_FUNCTION_CALLS = 2
MAX_RECORDS = 64
SWITCHED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # pyright: ignore[reportPrivateUsage]


class Notes:
    """Takes down what an observer sees; what raises here must be kept from the script."""

    def __init__(self) -> None:
        self.seen = Observation()
        self.trainings: dict[int, Training] = {}
        self.invented: dict[int, Tensor] = {}
        self._calls: list[Call] = []
        self._known: set[int] = set()  # identities of tensors that depend on weights
        self._copies = Copies()
        self._copying = True  # until an optimizer's second step
        self._objectives: list[Objective] = []
        self._clean: set[int] = set()  # optimizers whose gradients were seen to be cleared
        self._unused = False  # whether gradients were cleared before any optimizer stepped

    def fail(self, problem: str) -> None:
        """Remember the first thing that could not be taken down."""
        self._copies.problem = self._copies.problem or problem

    def close(self) -> None:
        """Sum up what was seen, and let go of the script's tensors."""
        try:
            if not self.trainings and self._objectives:
                self._begin_without_optimizer()
        finally:
            self.seen.trainings = list(self.trainings.values())
            self.seen.held = held_by_optimizers()
            self._calls.clear()
            self.invented.clear()

    # Calls.

    def begin(self, function: Any, args: Any, kwargs: Any) -> Call | None:
        """A call that may have to be made again; copies its module before it changes."""
        if not (self._copying and torch.is_grad_enabled()):
            return None
        if isinstance(function, nn.Module):
            self._copies.add(function)
        return Call(function, args, kwargs, self._copies)

    def keep(self, call: Call | None, result: Any) -> None:
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

    def arguments(self, func: Any, name: str, args: Any, inside: nn.Module | None) -> None:
        """A torch function is called, in a module's forward or (None) in the script itself."""
        if inside is not None and args and isinstance(args[0], Tensor) and args[0].requires_grad:
            self.seen.gradient_stopped |= stops_gradient(func) or not torch.is_grad_enabled()
        if not torch.is_grad_enabled():
            return
        domain = DOMAINS.get(name)
        if domain is not None:
            self._note_domain(name, domain, args, inside)
        if name in WEIGHING and len(args) > 1 and activation_of(args[0]) == "Sigmoid":
            self.seen.sigmoid_fed.add(id(args[1]))

    def _note_domain(self, name: str, domain: Domain, args: Any, inside: nn.Module | None) -> None:
        tensors = [item for item in args if isinstance(item, Tensor)]
        given = argument(args, {}, domain.argument)
        if not isinstance(given, Tensor) or not any(item.requires_grad for item in tensors):
            return
        # A constant that log or sqrt is taken of has no slope that matters.
        if not given.requires_grad and name not in ("div", "true_divide", "divide"):
            return
        outside = domain.outside(given.detach(), domain.bound)
        if bool(outside.any()) and len(self.seen.hazards) < MAX_RECORDS:
            module = type(inside).__name__ if inside is not None else ""
            share = float(outside.double().mean())
            self.seen.hazards.append(Hazard(name, module, domain.what, share))

    def loss(self, name: str, args: Any, kwargs: Any, result: Any, error: str) -> None:
        """A loss function returned a result, or raised."""
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
                cosines=makes_cosines(given),
                invented=id(target) in self.invented,
                ignored=ignored,
                value=value,
                error=error,
            )
        )

    def model(self, call: Call, result: Any, first_layer: nn.Module | None) -> None:
        """A model returned; the first layer is the first module with weights that it called."""
        if next(call.function.parameters(), None) is None or len(self.seen.models) >= MAX_RECORDS:
            return
        first = type(first_layer).__name__ if first_layer is not None else ""
        data = tuple(
            tensor.detach()
            for tensor in call.inputs
            if not tensor.requires_grad and id(tensor) not in self._known
        )
        finite = not any(unusable(tensor.detach()) for tensor in tensors_in(result))
        self.seen.models.append(ModelCall(call.function, data, finite, "Norm" in first))

    def function(self, function: Any, args: tuple[Any, ...]) -> None:
        """A custom autograd function is applied."""
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

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss are about to be computed."""
        self.seen.seeded = self.seen.seeded or seeded()
        self.seen.no_graph |= not loss.requires_grad
        self.seen.values.append(float(loss.detach().double().sum()))
        reached = leaves(loss)
        self.seen.reached.update((id(tensor), tensor) for tensor in reached)
        if not self.trainings and len(self.seen.values) > 1:
            self._unused |= not any(carries(tensor) for tensor in reached)
        for identity, training in self.trainings.items():
            if not any(carries(parameter) for parameter in training.held):
                self._clean.add(identity)
        if self._copying:
            calls = leading_to(loss, self._calls)
            identities = frozenset(id(tensor) for tensor in reached)
            self._objectives.append(Objective(calls, loss, self.seen.values[-1], identities))

    # Steps of optimizers.

    def begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step."""
        if id(optimizer) not in self.trainings:
            self._begin_training(optimizer)
        training = self.trainings[id(optimizer)]
        if has_gradient(training.held):
            self._measure(training)

    def end_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped."""
        key = id(optimizer)
        training = self.trainings.get(key)
        if training is None:
            return
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
        taken = sum(type(other.optimizer) is type(optimizer) for other in self.trainings.values())
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
        self.trainings[id(optimizer)] = training

    def _begin_without_optimizer(self) -> None:
        """For a script that changes its weights by hand: the first backward as a step."""
        weights = [item for item in self.seen.reached.values() if isinstance(item, nn.Parameter)]
        if self._unused:
            self.seen.idle = _idle_optimizer(weights)
        standing_in = torch.optim.SGD(weights, lr=0.0)
        self._objectives = self._objectives[:1]
        self._begin_training(standing_in)
        initial = self.trainings[id(standing_in)].initial
        if not all(id(item) in initial and item.equal(initial[id(item)]) for item in weights):
            self.seen.idle = ""  # the script changes them by itself
        if has_gradient(weights):
            self._measure(self.trainings[id(standing_in)])
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


def _idle_optimizer(weights: Sequence[Tensor]) -> str:
    """Class of an optimizer that holds any of the weights, which none has stepped."""
    mine = set(map(id, weights))
    for optimizer in living(torch.optim.Optimizer):
        groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
        if any(id(item) in mine for group in groups for item in group["params"]):
            return type(optimizer).__name__
    return ""


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
