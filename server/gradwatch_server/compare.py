"""Runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from gradwatch.wire.api import Comparison, RunSummary, numbers
from gradwatch_server.models import OPEN, FindingRow, Optimizer, Run
from gradwatch_server.queries import Span, scalars
from gradwatch_server.views import run_info, run_status, verdict_of

MAX_RUNS = 20
Series = tuple[NDArray[np.int64], NDArray[np.float64]]


def compare(
    session: Session, runs: Sequence[Run], scalar: str, columns: int, silent_after_s: float
) -> Comparison:
    """How runs went, in what their configurations differ, and a scalar of each.

    The scalar is that of the run's first optimizer which logged it.
    """
    configs = [run_info(run).config for run in runs]
    apart = differing(configs)
    found = {run.key: _series(session, run, scalar, columns) for run in runs}
    steps = np.unique(np.concatenate([np.empty(0, np.int64), *(s for s, _ in found.values())]))
    if len(steps) > columns:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, columns, dtype=int))]
    return Comparison(
        runs=[
            _summary(
                session,
                run,
                {name: config[name] for name in apart if name in config},
                silent_after_s,
            )
            for run, config in zip(runs, configs, strict=True)
        ],
        scalar=scalar,
        steps=steps.tolist(),
        series={key: numbers(held(series, steps)) for key, series in found.items()},
    )


def differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Names whose values are not the same in all configurations, or missing from some."""
    names = dict.fromkeys(name for config in configs for name in config)
    return [
        name
        for name in names
        if any(name not in config or config[name] != configs[0].get(name) for config in configs)
    ]


def held(series: Series, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """The last value at or before each step; NaN before the first one and after the last."""
    known, values = series
    if not len(known):
        return np.full(len(steps), np.nan)
    place = np.searchsorted(known, steps, side="right") - 1
    return np.where((place >= 0) & (steps <= known[-1]), values[place], np.nan)


def _series(session: Session, run: Run, scalar: str, columns: int) -> Series:
    """Steps at which the scalar was logged, and what was logged."""
    optimizers = select(Optimizer).where(Optimizer.run_id == run.id).order_by(Optimizer.id)
    for optimizer in session.scalars(optimizers).all():
        found = scalars(session, optimizer, Span(None, None, columns))
        if scalar in found.series_bytes:
            values = found.series(scalar)
            logged = np.isfinite(values) | found.broken(scalar)
            return found.steps[logged], values[logged]
    return np.empty(0, np.int64), np.empty(0)


def _summary(
    session: Session, run: Run, config: dict[str, Any], silent_after_s: float
) -> RunSummary:
    findings = session.scalars(select(FindingRow).where(FindingRow.run_id == run.id)).all()
    last_steps = session.scalars(select(Optimizer.last_step).where(Optimizer.run_id == run.id))
    return RunSummary(
        run=run.key,
        name=run_info(run).name,
        status=run_status(run, silent_after_s),
        verdict=verdict_of(run, findings),
        steps=max(last_steps, default=0),
        findings=[row.kind for row in findings if row.state == OPEN and row.muted_at is None],
        config=config,
    )
