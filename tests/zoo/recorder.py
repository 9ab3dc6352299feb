"""An independent recorder: the statistics by hand, in float64, from the full gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradwatch.health.window import Window

DETAIL = ("mean_abs", "absmax", "std", "zero_fraction", "dead_fraction", "weight_norm")
STATISTICS = ("norm", "nonfinite", *DETAIL)
DEAD_FRAMES = 5  # a unit is dead when its gradient was 0 on each of the last 5 detail frames
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class RecordedLayer:
    name: str
    shape: tuple[int, ...]
    module: str
    role: str
    depth: int
    trainable: bool
    optimized: bool = True
    dtype: str = "float32"
    sharding: str = ""


def role_of(module: nn.Module, name: str, parameter: Tensor) -> str:
    if isinstance(module, NORMS):
        return "norm"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    return "bias" if "bias" in name or parameter.ndim < 2 else "weight"


@dataclass
class Recorder:
    """Records every optimizer step of one model, as the agent is meant to.

    detail_every: after the first 10 steps, each so-many-th step is a detail frame.
    keep_every: only each so-many-th step is recorded at all (sampling stretched to stay cheap).
    """

    detail_every: int = 10
    keep_every: int = 1
    layers: list[RecordedLayer] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    rows: list[dict[str, NDArray[np.float64]]] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    step: int = 0

    def __call__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: object
    ) -> Recorder:
        """Stands in for `gradwatch.watch`."""
        self._held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._parameters: list[nn.Parameter] = []
        self._zero_rows: list[list[NDArray[np.bool_]]] = []
        order = self._execution_order(model)
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in self._held or any(
                    parameter is known for known in self._parameters
                ):
                    continue
                self._parameters.append(parameter)
                self._zero_rows.append([])
                self.layers.append(
                    RecordedLayer(
                        name=f"{prefix}.{name}" if prefix else name,
                        shape=tuple(parameter.shape),
                        module=type(module).__name__,
                        role=role_of(module, name, parameter),
                        depth=order[prefix],
                        trainable=parameter.requires_grad,
                    )
                )
        optimizer.register_step_pre_hook(self._record)
        return self

    @staticmethod
    def _execution_order(model: nn.Module) -> dict[str, int]:
        """Depth of each module: registration order, which is execution order in these models."""
        return {prefix: depth for depth, (prefix, _) in enumerate(model.named_modules())}

    def _record(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.step += 1
        if self.step % self.keep_every and self.step > 10:
            return
        detail = self.step <= 10 or self.step % self.detail_every == 0
        row = {name: np.full(len(self.layers), np.nan) for name in STATISTICS}
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            gradient = parameter.grad.detach().to_dense().numpy().astype(np.float64)
            # The agent's norm is taken in float32, so underflow and overflow must be seen here too.
            norm = parameter.grad.detach().to_dense().float().norm().item()
            row["norm"][index] = norm
            row["nonfinite"][index] = np.count_nonzero(~np.isfinite(gradient))
            if detail:
                self._measure_detail(index, gradient, parameter, row)
        self.steps.append(self.step)
        self.rows.append(row)

    def _measure_detail(
        self,
        index: int,
        gradient: NDArray[np.float64],
        parameter: Tensor,
        row: dict[str, NDArray[np.float64]],
    ) -> None:
        with np.errstate(all="ignore"):
            row["mean_abs"][index] = np.abs(gradient).mean()
            row["absmax"][index] = np.abs(gradient).max()
            row["std"][index] = gradient.std()
        row["zero_fraction"][index] = (gradient == 0).mean()
        row["weight_norm"][index] = np.linalg.norm(parameter.detach().numpy().astype(np.float64))
        if gradient.ndim >= 2:
            recent = self._zero_rows[index]
            recent.append((gradient.reshape(len(gradient), -1) == 0).all(axis=1))
            del recent[:-DEAD_FRAMES]
            row["dead_fraction"][index] = np.logical_and.reduce(recent).mean()

    def log(self, *, loss: Tensor) -> None:
        self.losses[self.step] = float(loss)

    def finish(self) -> None:
        pass

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def window(self, until: int | None = None, last: int = 500) -> Window:
        """The last recorded steps, up to and with step `until`."""
        chosen = [i for i, step in enumerate(self.steps) if until is None or step <= until][-last:]
        return Window(
            steps=np.array([self.steps[i] for i in chosen], dtype=np.int64),
            layers=self.layers,
            statistics={
                name: np.array([self.rows[i][name] for i in chosen], dtype=np.float32).reshape(
                    len(chosen), len(self.layers)
                )
                for name in STATISTICS
            },
            scalars={
                "loss": np.array([self.losses.get(self.steps[i], np.nan) for i in chosen]),
            },
        )
