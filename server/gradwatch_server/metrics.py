"""What Prometheus scrapes: gauges read from the database at scrape time.

So all collectors of one database agree, and a run that ended leaves no series behind. Labels stay
few: never a layer, a step or a rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from gradwatch_server import task_counts
from gradwatch_server.models import (
    OPEN,
    Alert,
    AuditRow,
    FindingRow,
    Optimizer,
    Run,
    TaskCount,
)
from gradwatch_server.views import run_info

log = logging.getLogger(__name__)

MAX_RUNS = 1000
Family = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily
Families = dict[str, Family]
RUN_LABELS = ("run", "project", "name")
OPTIMIZER_LABELS = ("run", "optimizer")


class Spec(NamedTuple):
    """A metric's name, help and labels; documented and exposed from this one table."""

    name: str
    kind: type[Family]
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
            "gradwatch_run_audits",
            CounterMetricFamily,
            "Audits stored: comparisons of gradients with a reference.",
            OPTIMIZER_LABELS,
        ),
        Spec(
            "gradwatch_run_failed_audits",
            CounterMetricFamily,
            "Audits with a gradient beyond its tolerance.",
            OPTIMIZER_LABELS,
        ),
        Spec(
            "gradwatch_findings_open",
            GaugeMetricFamily,
            "Open findings of runs that are being recorded, without those that are muted.",
            ("run", "optimizer", "kind", "severity"),
        ),
        Spec(
            "gradwatch_alerts",
            GaugeMetricFamily,
            "Alerts in the outbox, by state: pending, sent or failed.",
            ("state",),
        ),
        Spec(
            "gradwatch_runs_waiting",
            GaugeMetricFamily,
            "Runs that changed since a worker judged them.",
            (),
        ),
        Spec(
            "gradwatch_task_duration_seconds",
            HistogramMetricFamily,
            "Time that workers took for a task.",
            ("task",),
        ),
        Spec(
            "gradwatch_task_failures",
            CounterMetricFamily,
            "Tasks that ended with an exception.",
            ("task",),
        ),
        Spec(
            "gradwatch_database_up",
            GaugeMetricFamily,
            "Whether the database answered this scrape; without it most of the others are absent.",
            (),
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
        _add(families, "gradwatch_batches_waiting", (), self._batches_waiting())
        try:
            with Session(self._engine) as session:
                _add_runs(families, session)
                _add_work(families, session)
        except SQLAlchemyError as error:
            log.warning("a scrape found no database: %s", error)
            _add(families, "gradwatch_database_up", (), 0)
        else:
            _add(families, "gradwatch_database_up", (), 1)
        yield from families.values()


def _add(families: Families, name: str, labels: Sequence[str], value: float) -> None:
    family = families[name]
    assert isinstance(family, GaugeMetricFamily | CounterMetricFamily)
    family.add_metric(labels, value)


def _add_runs(families: Families, session: Session) -> None:
    """The runs that are being recorded, and what is wrong with them."""
    runs = session.scalars(
        select(Run).where(Run.status == "running").order_by(Run.id.desc()).limit(MAX_RUNS)
    ).all()
    keys: dict[int | None, str] = {run.id: run.key for run in runs}
    for run in runs:
        _add_run(families, run)
    for optimizer in session.scalars(select(Optimizer).where(Optimizer.run_id.in_(keys))):
        _add_optimizer(families, keys[optimizer.run_id], optimizer)
    audits = (
        select(
            AuditRow.run_id,
            AuditRow.optimizer,
            func.count(),
            func.count().filter(AuditRow.passed.is_(False)),
        )
        .where(AuditRow.run_id.in_(keys))
        .group_by(AuditRow.run_id, AuditRow.optimizer)
    )
    for run_id, optimizer, stored, failed in session.execute(audits):
        labels = (keys[run_id], optimizer)
        _add(families, "gradwatch_run_audits", labels, stored)
        _add(families, "gradwatch_run_failed_audits", labels, failed)
    findings = select(FindingRow).where(
        FindingRow.run_id.in_(keys), FindingRow.state == OPEN, FindingRow.muted_at.is_(None)
    )
    for row in session.scalars(findings):
        labels = (keys[row.run_id], row.optimizer, row.kind, row.severity)
        _add(families, "gradwatch_findings_open", labels, 1)


def _add_work(families: Families, session: Session) -> None:
    """What workers have to do and have done."""
    for state, count in session.execute(select(Alert.state, func.count()).group_by(Alert.state)):
        _add(families, "gradwatch_alerts", (state,), count)
    waiting = session.scalar(select(func.count()).where(Run.changed > Run.judged))
    _add(families, "gradwatch_runs_waiting", (), waiting or 0)
    durations = families["gradwatch_task_duration_seconds"]
    assert isinstance(durations, HistogramMetricFamily)
    for row in session.scalars(select(TaskCount)):
        counts = accumulate(row.buckets.get(name, 0) for name in task_counts.NAMES)
        buckets = list(zip(task_counts.NAMES, counts, strict=True))
        durations.add_metric((row.task,), buckets, row.seconds)
        _add(families, "gradwatch_task_failures", (row.task,), row.failures)


def _add_run(families: Families, run: Run) -> None:
    info = run_info(run)
    _add(families, "gradwatch_run_info", (run.key, info.project, info.name), 1)
    if run.last_frame_at is not None:
        name = "gradwatch_run_last_frame_timestamp_seconds"
        _add(families, name, (run.key,), run.last_frame_at)
    if run.loss is not None:
        _add(families, "gradwatch_run_loss", (run.key,), run.loss)
    for reason, count in run.dropped.items():
        _add(families, "gradwatch_run_dropped_frames", (run.key, reason), count)


def _add_optimizer(families: Families, run_key: str, row: Optimizer) -> None:
    labels = (run_key, row.name)
    _add(families, "gradwatch_run_step", labels, row.last_step)
    _add(families, "gradwatch_run_frames", labels, row.frames)
    _add(families, "gradwatch_run_nonfinite_frames", labels, row.nonfinite_frames)
    if row.total_norm is not None:
        _add(families, "gradwatch_run_gradient_norm", labels, row.total_norm)


def expose(collector: DatabaseCollector, own: CollectorRegistry) -> bytes:
    """The text format, version 0.0.4: what the database says, and what this process counted.

    A registry of its own for the first: nothing of the process leaks in.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry) + generate_latest(own)
