"""What the doctor keeps of a training's first steps: plain records that the checks read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.checkup.objective import Objective
from gradwatch.layers import Layer


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function of torch's."""

    name: str
    given: Tensor  # what the network said
    target: Tensor
    activation: str  # function that made `given`, as "Softmax"; empty when it is another call
    invented: bool  # the step itself made the target, as a GAN's ones and zeros
    ignored: int  # the class index that does not count
    value: float  # NaN when it was not reduced to a mean
    error: str = ""
    cosines: bool = False  # whether `given` was made of cosines, scaled


@dataclass(frozen=True)
class Hazard:
    """A function that was given what it has no finite slope for."""

    function: str
    module: str  # class of the module that called it; empty outside of modules
    what: str
    share: float  # of the argument's elements


@dataclass(frozen=True)
class FunctionCall:
    """One call of an autograd.Function that is not torch's own."""

    function: type[torch.autograd.Function]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class ModelCall:
    """A module as the script calls it, with gradients wanted."""

    module: nn.Module
    data: tuple[Tensor, ...]  # the inputs that no other network made
    finite: bool  # whether all of the result is
    normalised: bool  # whether the first layer with weights is a normalisation


@dataclass(frozen=True)
class LayerGradient:
    """What one layer's gradient was at a step."""

    name: str
    norm: float  # NaN without a gradient
    numel: int
    nonfinite: int
    present: bool


@dataclass
class Training:
    """What one optimizer does."""

    name: str
    optimizer: torch.optim.Optimizer
    copied: torch.optim.Optimizer | None  # as it was before its first step, on the copies
    initial: dict[int, Tensor]  # identity of a parameter -> a copy of before the first step
    layers: list[Layer]  # of its models, in order of registration
    objectives: tuple[Objective, ...] = ()  # of its first step
    evaluating: bool = False  # dropout and batch-norm were all in eval mode at its first step
    gradients: list[list[LayerGradient]] = field(default_factory=list[list[LayerGradient]])
    cleared: list[bool] = field(default_factory=list[bool])  # between each step and the next
    problem: str | None = None  # why its step cannot be made again, once that was tried

    @property
    def held(self) -> list[Tensor]:
        """The parameters that the optimizer holds."""
        return [item for group in self.optimizer.param_groups for item in group["params"]]


@dataclass
class Observation:
    """What was seen of a training's first steps."""

    trainings: list[Training] = field(default_factory=list[Training])
    models: list[ModelCall] = field(default_factory=list[ModelCall])
    called: dict[int, nn.Module] = field(default_factory=dict[int, nn.Module])
    losses: list[LossCall] = field(default_factory=list[LossCall])
    hazards: list[Hazard] = field(default_factory=list[Hazard])
    functions: list[FunctionCall] = field(default_factory=list[FunctionCall])
    sigmoid_fed: set[int] = field(default_factory=set[int])  # weights whose input a sigmoid made
    values: list[float] = field(default_factory=list[float])  # the loss at each backward
    reached: dict[int, Tensor] = field(default_factory=dict[int, Tensor])  # by some backward
    held: set[int] = field(default_factory=set[int])  # by any optimizer alive at the end
    gradient_stopped: bool = False  # by a detach inside of a module
    no_graph: bool = False  # a backward of a loss that depends on no trainable weight
    seeded: bool = False
    own_optimizer: bool = False  # the doctor's, because none was given
    idle: str = ""  # class of the optimizer that holds the weights and takes no step
    error: str = ""  # that ended the training
    module_in_error: str = ""  # class of the innermost module that raised it
