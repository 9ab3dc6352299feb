"""accelerate: `Accelerator(log_with=GradwatchTracker())`, then its own tracking calls."""

from __future__ import annotations

from typing import Any

from accelerate.tracking import GeneralTracker

from gradwatch.integrations.numbers import numbers_of
from gradwatch.monitor import Monitor, current_job
from gradwatch.run_script import watch_every_optimizer
from gradwatch.settings import Settings


class GradwatchTracker(GeneralTracker):
    """Records the gradients of every optimizer that steps, and what the script tracks.

    From here to `accelerator.end_training()`. settings: the agent's, as url, project and name.
    """

    name = "gradwatch"
    requires_logging_directory = False
    main_process_only = False  # each process has gradients of its own

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = Settings.load(settings)
        # Here and not in `start`, which accelerate calls in the main process alone.
        self._leave = watch_every_optimizer(self._settings)
        self._finished = False

    @property
    def tracker(self) -> Monitor:
        """The handle on the run, which begins with the first optimizer's step at the latest."""
        return Monitor(None if self._finished else current_job(self._settings))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        current_job(self._settings, values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.tracker.log(**numbers_of(values))

    def finish(self) -> None:
        self._leave()
        self.tracker.finish()
        self._finished = True
