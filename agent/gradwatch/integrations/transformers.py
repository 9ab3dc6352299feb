"""The Trainer of transformers: `Trainer(..., callbacks=[GradwatchCallback()])`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from gradwatch.integrations.numbers import numbers_of
from gradwatch.layers import owning_models
from gradwatch.monitor import Monitor, watch


class GradwatchCallback(TrainerCallback):
    """Records a Trainer's gradients, its arguments and its model's configuration, and its metrics.

    settings: those of `gradwatch.watch`, as url and project; the run's name is the Trainer's
    run_name unless one is given.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        held = [item for group in optimizer.param_groups for item in group["params"]]
        config = getattr(kwargs["model"], "config", None)
        settings: dict[str, Any] = {
            "name": args.run_name or None,
            "config": {**args.to_dict(), "model": config.to_dict() if config else {}},
            **self._settings,
        }
        self._monitor = watch(owning_models(held), optimizer, **settings)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._monitor is not None:
            self._monitor.log(**numbers_of(kwargs.get("logs") or {}))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._monitor is not None:
            self._monitor.finish()
