"""`gradwatch.doctor(model, batch, loss_fn)`: the checks on a model and one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.checkup import optimizers
from gradwatch.checkup.checks import examine
from gradwatch.checkup.observation import Observation
from gradwatch.checkup.observing import Observer
from gradwatch.checkup.randomness import preserved, seeded
from gradwatch.checkup.verdict import Report

# Layers of zeros pass a gradient on from the second step; a third shows that it stays.
STEPS = 3
OWN_RATE = 1e-3

LossFunction = Callable[..., Tensor]


def doctor(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Report:
    """Check a model, one batch of its data, its loss and its optimizer, as before a training.

    batch: (inputs, targets), where inputs is a tensor, a tuple of arguments or a mapping of
    keywords; or one mapping, which is given to the model as keywords. loss_fn: called with the
    model's output and the targets, or with the output alone when there are none; None takes the
    output's own `loss`, as of transformers. optimizer: the job's, if there is one already.

    Everything is done on copies: model, optimizer and random generators stay as they are, to the
    bit. Takes a few hundred forward and backward passes of the batch. Raises TypeError for
    arguments that cannot be used, and whatever copying the model raises.
    """
    return Report(tuple(examine(observed(model, batch, loss_fn, optimizer))))


def observed(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Observation:
    """What the first steps of a training on the batch show; made on copies. As `doctor` takes."""
    inputs, targets = _parts(model, batch, optimizer)
    with preserved():
        memo: dict[int, Any] = {}
        own = copy.deepcopy(model, memo)
        if optimizer is None:
            trained = [item for item in own.parameters() if item.requires_grad]
            stepping = torch.optim.Adam(trained, lr=OWN_RATE) if trained else None
        else:
            stepping = optimizers.copied(optimizer, memo)
        observer = Observer()
        observer.seen.own_optimizer = optimizer is None
        observer.seen.seeded = seeded()
        try:
            with observer:
                for _ in range(STEPS):
                    _step(observer, own, inputs, targets, loss_fn, stepping)
        except Exception:  # it is in what was observed, and the report tells it
            pass
    return observer.seen


def _parts(model: Any, batch: Any, optimizer: Any) -> tuple[Any, tuple[Any, ...]]:
    """Inputs, and the targets if there are any."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"doctor() takes a torch.nn.Module first, not {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a torch optimizer, not {type(optimizer).__name__}")
    if isinstance(batch, Mapping):
        return batch, ()
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], (batch[1],)
    raise TypeError(
        "doctor() takes a batch second: (inputs, targets), or a mapping of the model's keywords"
    )


def _step(
    observer: Observer,
    model: nn.Module,
    inputs: Any,
    targets: tuple[Any, ...],
    loss_fn: LossFunction | None,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    def closure() -> Tensor:
        if optimizer is not None:
            optimizer.zero_grad()
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        loss = _loss(output, targets, loss_fn)
        loss.backward()
        return loss

    if optimizer is None:
        closure()
    elif isinstance(optimizer, torch.optim.LBFGS):
        observer.step(optimizer, closure)
    else:
        closure()
        observer.step(optimizer)


def _loss(output: Any, targets: tuple[Any, ...], loss_fn: LossFunction | None) -> Tensor:
    if loss_fn is not None:
        return loss_fn(output, *targets)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise TypeError("the model's output has no loss: give loss_fn")
    return loss
