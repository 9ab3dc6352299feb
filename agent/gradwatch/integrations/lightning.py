"""Lightning's Trainer: `Trainer(..., callbacks=[GradwatchCallback()])`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradwatch.integrations.numbers import numbers_of
from gradwatch.monitor import Monitor, watch

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:  # the same library under its older name
        from pytorch_lightning import Callback


class GradwatchCallback(Callback):
    """Records a Trainer's gradients, the module's hyperparameters, its loss and its metrics.

    settings: those of `gradwatch.watch`, as url, project and name.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._monitor: Monitor | None = None
        self._told: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        settings: dict[str, Any] = {"config": dict(pl_module.hparams), **self._settings}
        self._monitor = watch(trainer.strategy.model, trainer.optimizers, **settings)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._log({"loss": loss.detach()})
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._log(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log(trainer.callback_metrics)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._monitor is not None:
            self._monitor.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._monitor is not None:
            self._monitor.finish("failed", f"{type(exception).__name__}: {exception}")

    def _log(self, metrics: Any) -> None:
        # Lightning keeps the metrics of the last validation among those of each step.
        fresh = {name: it for name, it in metrics.items() if self._told.get(name) is not it}
        self._told.update(fresh)
        if self._monitor is not None:
            self._monitor.log(**numbers_of(fresh))
