"""What Prometheus scrapes: gauges read from the database at scrape time.

So all collectors of one database agree, and a run that ended leaves no series behind. Labels stay
few: never a layer, a step or a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from gradwatch_server.models import OPEN, Alert, FindingRow, Optimizer, Run
from gradwatch_server.views import run_info

MAX_RUNS = 1000
Families = dict[str, GaugeMetricFamily | CounterMetricFamily]
RUN_LABELS = ("run", "project", "name")
OPTIMIZER_LABELS = ("run", "optimizer")


class Spec(NamedTuple):
    """A metric's name, help and labels; documented and exposed from this one table."""

    name: str
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily]
    help: str
    labels: tuple[str, ...]


SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(
            "gradwatch_run_info",
            GaugeMetricFamily,
            "A run that is being recorded; always 1.",
            RUN_LABELS,
        ),
        Spec(
            "gradwatch_run_last_frame_timestamp_seconds",
            GaugeMetricFamily,
            "When the run's last frame was taken, in Unix seconds.",
            ("run",),
        ),
        Spec(
            "gradwatch_run_loss",
            GaugeMetricFamily,
            "The loss that was logged last, absent when it is not finite.",
            ("run",),
        ),
        Spec(
            "gradwatch_run_step",
            GaugeMetricFamily,
            "The optimizer step that was seen last.",
            OPTIMIZER_LABELS,
        ),
        Spec(
            "gradwatch_run_gradient_norm",
            GaugeMetricFamily,
            "L2 norm of all gradients of the last measured step, absent when it is not finite.",
            OPTIMIZER_LABELS,
        ),
        Spec(
            "gradwatch_run_frames",
            CounterMetricFamily,
            "Frames stored.",
            OPTIMIZER_LABELS,
        ),
        Spec(
            "gradwatch_run_nonfinite_frames",
            CounterMetricFamily,
            "Frames that told of a NaN or Inf in a gradient or in the loss.",
            OPTIMIZER_LABELS,
        ),
        Spec(
            "gradwatch_run_dropped_frames",
            CounterMetricFamily,
            "Frames that the agent had to drop, by reason.",
            ("run", "reason"),
        ),
        Spec(
            "gradwatch_findings_open",
            GaugeMetricFamily,
            "Open findings of runs that are being recorded.",
            ("run", "optimizer", "kind", "severity"),
        ),
        Spec(
            "gradwatch_alerts",
            GaugeMetricFamily,
            "Alerts in the outbox, by state: pending, sent or failed.",
            ("state",),
        ),
        Spec(
            "gradwatch_batches_waiting",
            GaugeMetricFamily,
            "Batches that wait for a commit in this collector.",
            (),
        ),
    )
}


class DatabaseCollector(Collector):
    """Reads every metric anew at each scrape."""

    def __init__(self, engine: Engine, batches_waiting: Callable[[], int]) -> None:
        self._engine = engine
        self._batches_waiting = batches_waiting

    def describe(self) -> Iterable[Metric]:
        # An empty description keeps the registry from scraping at registration.
        return ()

    def collect(self) -> Iterator[Metric]:
        families: Families = {
            name: spec.kind(name, spec.help, labels=spec.labels) for name, spec in SPECS.items()
        }
        families["gradwatch_batches_waiting"].add_metric((), self._batches_waiting())
        with Session(self._engine) as session:
            runs = session.scalars(
                select(Run).where(Run.status == "running").order_by(Run.id.desc()).limit(MAX_RUNS)
            ).all()
            keys = {run.id: run.key for run in runs}
            for run in runs:
                _add_run(families, run)
            for optimizer in session.scalars(select(Optimizer).where(Optimizer.run_id.in_(keys))):
                _add_optimizer(families, keys[optimizer.run_id], optimizer)
            findings = select(FindingRow).where(
                FindingRow.run_id.in_(keys), FindingRow.state == OPEN
            )
            for row in session.scalars(findings):
                labels = (keys[row.run_id], row.optimizer, row.kind, row.severity)
                families["gradwatch_findings_open"].add_metric(labels, 1)
            for state, count in session.execute(
                select(Alert.state, func.count()).group_by(Alert.state)
            ):
                families["gradwatch_alerts"].add_metric((state,), count)
        yield from families.values()


def _add_run(families: Families, run: Run) -> None:
    info = run_info(run)
    families["gradwatch_run_info"].add_metric((run.key, info.project, info.name), 1)
    if run.last_frame_at is not None:
        name = "gradwatch_run_last_frame_timestamp_seconds"
        families[name].add_metric((run.key,), run.last_frame_at)
    if run.loss is not None:
        families["gradwatch_run_loss"].add_metric((run.key,), run.loss)
    for reason, count in run.dropped.items():
        families["gradwatch_run_dropped_frames"].add_metric((run.key, reason), count)


def _add_optimizer(families: Families, run_key: str, row: Optimizer) -> None:
    labels = (run_key, row.name)
    families["gradwatch_run_step"].add_metric(labels, row.last_step)
    families["gradwatch_run_frames"].add_metric(labels, row.frames)
    families["gradwatch_run_nonfinite_frames"].add_metric(labels, row.nonfinite_frames)
    if row.total_norm is not None:
        families["gradwatch_run_gradient_norm"].add_metric(labels, row.total_norm)


def expose(collector: DatabaseCollector) -> bytes:
    """The text format, version 0.0.4. A registry of its own: nothing of the process leaks in."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)
