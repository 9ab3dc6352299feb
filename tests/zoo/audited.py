"""Audits of the zoo's jobs, made as examples/audit.py makes them of its own."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gradwatch.health.window import Compared
from gradwatch.wire.audit import AuditedLayer

from .faulty import WrongSign
from .fixtures import ZOO, Key

EXAMPLE = Path(__file__).parents[2] / "examples" / "audit.py"
# What a job calls with its network's output, beside what torch brings.
FUNCTIONS: dict[str, type[torch.autograd.Function]] = {"F39 wrong sign": WrongSign}


def example() -> ModuleType:
    """examples/audit.py as a module."""
    spec = importlib.util.spec_from_file_location("audit", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Auditor:
    """Stands in for `gradwatch.watch`: compares what the layers saw at some steps."""

    def __init__(self, key: Key, steps: Collection[int]) -> None:
        self.compared: list[Compared] = []
        self._function = FUNCTIONS.get(key.name)
        self._steps = steps
        self._audit = example()
        self._step = 0

    def __call__(self, model: Any, optimizer: Any, **_: object) -> _Auditor:
        self._taps = {
            name: self._audit.Tap(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        model.register_forward_hook(self._keep_output)
        optimizer.register_step_pre_hook(self._look)
        return self

    def _keep_output(self, _: Any, __: Any, output: torch.Tensor) -> None:
        self._output = output.detach().clone()

    def _look(self, *_: Any) -> None:
        self._step += 1
        if self._step not in self._steps:
            return
        for name, tap in self._taps.items():
            self._keep("reference", self._audit.compared_by_reference(name, tap))
        if self._function is not None:
            found = self._audit.compared_by_differences(
                self._function.__name__, self._function, self._output
            )
            self._keep("finite_difference", [found])

    def _keep(self, method: str, layers: Sequence[AuditedLayer]) -> None:
        self.compared += [
            Compared(
                layer=layer.layer,
                rank=0,
                method=method,
                step=self._step,
                dtype="float32",
                error=math.nan if layer.relative_error is None else layer.relative_error,
                nonfinite=layer.nonfinite,
                reference_nonfinite=layer.reference_nonfinite,
            )
            for layer in layers
        ]

    def log(self, **_: object) -> None:
        pass


def audits_of(key: Key, steps: Collection[int]) -> list[Compared]:
    """Train a job of one rank, and compare the gradients of its linear layers at these steps."""
    torch.set_num_threads(1)
    torch.manual_seed(key.seed)
    auditor: Any = _Auditor(key, steps)
    ZOO[key.name].train(auditor, random.Random(f"{key.name} {key.seed}"))
    return auditor.compared
