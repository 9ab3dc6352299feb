"""What a training step minimised, as a list of calls that can be made again on copies.

The list has what the script itself called between its data and `backward()`: modules as a whole,
and torch functions outside of modules. Everything that depends on no weight is a constant.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradwatch.checkup import optimizers
from gradwatch.checkup.randomness import set_torch_state, torch_state
from gradwatch.checkup.trees import replaced, tensors_in

# Elements of weights that are copied: more would need too much memory beside the job's own.
MAX_COPIED = 200_000_000
CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double)


class CannotRepeatError(Exception):
    """Why a step cannot be made again on copies."""


class Copies:
    """Copies of modules and parameters, made before the step that changes them.

    One memo for all of them, so that what is shared stays shared.
    """

    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}
        self.problem = ""
        self._elements = 0

    def add(self, original: nn.Module | Tensor) -> None:
        """Copy it, unless that was done; a failure is kept as `problem`."""
        if id(original) in self.memo or self.problem:
            return
        parts = original.parameters() if isinstance(original, nn.Module) else (original,)
        self._elements += sum(part.numel() for part in parts if id(part) not in self.memo)
        if self._elements > MAX_COPIED:
            self.problem = f"more than {MAX_COPIED:,} weights, too many to copy"
            return
        try:
            copy.deepcopy(original, self.memo)
        except Exception as error:
            self.problem = f"{type(original).__name__} cannot be copied ({error})"


@dataclass
class Call:
    """One call of the script: of a module, or of a torch function."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    copies: Copies
    result: Any = None
    random: Any = field(default_factory=torch_state)

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors that it made, or changed when it returns none."""
        made = list(tensors_in(self.result))
        return made or [item for item in self.arguments[:1] if isinstance(item, Tensor)]

    @property
    def inputs(self) -> list[Tensor]:
        return list(tensors_in((self.arguments, self.keywords)))


@dataclass(frozen=True)
class Objective:
    """One `backward()`: the calls that led to its loss, and what the loss was."""

    calls: tuple[Call, ...]
    loss: Tensor
    value: float
    reached: frozenset[int]  # identities of the leaf tensors that got a gradient


def leading_to(loss: Tensor, calls: Sequence[Call]) -> tuple[Call, ...]:
    """Of the calls, those that the loss depends on."""
    needed = {id(loss)}
    kept: list[Call] = []
    for call in reversed(calls):
        if any(id(tensor) in needed for tensor in call.outputs):
            kept.append(call)
            needed.update(id(tensor) for tensor in call.inputs)
    return tuple(reversed(kept))


def leaves(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that a backward pass from here gives a gradient to."""
    found: list[Tensor] = []
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.append(variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


class _AllIn(TorchFunctionMode):
    """Computes in one floating-point type where a model asks for another, as `logits.float()`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CASTS:
            return args[0].to(self._dtype)
        own = {key: self._own(value) for key, value in (kwargs or {}).items()}
        return func(*map(self._own, args), **own)

    def _own(self, value: Any) -> Any:
        is_float = isinstance(value, torch.dtype) and value.is_floating_point
        return self._dtype if is_float else value


class Trial:
    """A step's objectives on copies of their own: weights, buffers and optimizer.

    copied: the optimizer as it was before the step, on the copies. dtype: what floating-point
    weights, buffers and constants are converted to, if given. Raises CannotRepeatError when
    something could not be copied.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        copied: torch.optim.Optimizer | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._objectives = objectives
        self._dtype = dtype
        self._memo: dict[int, Any] = {}
        seen: dict[int, Call] = {}
        for objective in objectives:
            seen.update((id(call), call) for call in objective.calls)
        self._calls = list(seen.values())
        problems = [call.copies.problem for call in self._calls if call.copies.problem]
        if problems:
            raise CannotRepeatError(problems[0])
        self._modules = [
            self._own(call, call.function)
            for call in self._calls
            if isinstance(call.function, nn.Module)
        ]
        for module in self._modules:
            _convert(module, dtype)
        self.optimizer = optimizers.copied(copied, self._memo) if copied is not None else None
        reached: set[int] = set().union(*(objective.reached for objective in objectives))
        self._weights: dict[int, Tensor] = {}
        for call in self._calls:
            for identity in reached & call.copies.memo.keys():
                self._weights.setdefault(identity, self._own_weight(call.copies.memo[identity]))

    @property
    def weights(self) -> dict[int, Tensor]:
        """The copies of the tensors that get a gradient, by the identity of the original."""
        return self._weights

    @property
    def modules(self) -> list[nn.Module]:
        """The copies of the modules that the script calls."""
        return self._modules

    def loss(self) -> Tensor:
        """The sum of the objectives, computed anew with the random numbers of the step.

        Raises CannotRepeatError when the calls cannot be made again.
        """
        values: dict[int, Any] = {}
        fixed: dict[int, Tensor] = {}
        try:
            with torch.enable_grad(), _AllIn(self._dtype) if self._dtype else nullcontext():
                for call in self._calls:
                    self._repeat(call, values, fixed)
                losses = [values[id(objective.loss)] for objective in self._objectives]
                return torch.stack([loss.reshape(()) for loss in losses]).sum()
        except CannotRepeatError:
            raise
        except Exception as error:
            line = (str(error).splitlines() or [""])[0][:200]
            raise CannotRepeatError(f"{type(error).__name__}: {line}") from error

    def _repeat(self, call: Call, values: dict[int, Tensor], fixed: dict[int, Tensor]) -> None:
        def mine(tensor: Tensor) -> Tensor:
            if id(tensor) in values:
                return values[id(tensor)]
            own = call.copies.memo.get(id(tensor))
            if own is not None:
                return self._own_weight(own)
            if id(tensor) not in fixed:
                constant = tensor.detach().clone()
                floats = self._dtype is not None and constant.is_floating_point()
                fixed[id(tensor)] = constant.to(self._dtype) if floats else constant
            return fixed[id(tensor)]

        arguments = replaced(call.arguments, mine)
        set_torch_state(call.random)
        result = self._own(call, call.function)(*arguments, **replaced(call.keywords, mine))
        made = list(tensors_in(result)) or list(arguments[:1])
        if len(made) != len(call.outputs):
            raise CannotRepeatError("a call gives another number of results")
        values.update((id(before), after) for before, after in zip(call.outputs, made, strict=True))

    def _own(self, call: Call, function: Any) -> Any:
        """This trial's copy of a module; a function as it is."""
        if not isinstance(function, nn.Module):
            return function
        return copy.deepcopy(call.copies.memo[id(function)], self._memo)

    def _own_weight(self, pristine: Tensor) -> Tensor:
        own = copy.deepcopy(pristine, self._memo)
        _convert_tensor(own, self._dtype)
        return own


def _convert(module: nn.Module, dtype: torch.dtype | None) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        _convert_tensor(tensor, dtype)


def _convert_tensor(tensor: Tensor, dtype: torch.dtype | None) -> None:
    if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
        tensor.data = tensor.data.to(dtype)
