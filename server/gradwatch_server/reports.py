"""What agents found out of a non-finite value, kept beside its finding and told with it.

A report may come before its finding, after it, or twice; the finding ends up the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from gradwatch.wire.codec import decode_manifest, decode_record
from gradwatch.wire.frame import Flight, Origin
from gradwatch_server import alerts
from gradwatch_server.database import insert_new
from gradwatch_server.models import OPEN, Alert, FindingRow, ManifestRow, Optimizer, ReportRow, Run

KIND = "non_finite"
ORIGIN, FLIGHT = "origin", "flight"
Report = Origin | Flight
# Which rank's word is taken: one that saw it arise, before one that found it there already.
ORDER = ("operation", "gradient", "input", "constant", "batch", "weights", "nothing")

# How a finding's summary goes on once its origin is known.
BEGAN = " It began in "


def keep(session: Session, optimizer: Optimizer, report: Report, raw: bytes) -> None:
    """Store one rank's report. The first one stays."""
    kind = ORIGIN if isinstance(report, Origin) else FLIGHT
    row = {"optimizer_id": optimizer.id, "rank": report.rank, "kind": kind, "body": raw}
    session.execute(insert_new(session, ReportRow), [row])


def tell(session: Session, run: Run, optimizer: Optimizer, channels: Sequence[str]) -> bool:
    """Add what is known to the optimizer's finding. Returns whether alerts were written.

    Who was told of the finding without its origin is told again.
    """
    row = session.scalar(
        select(FindingRow).where(
            FindingRow.run_id == run.id,
            FindingRow.optimizer == optimizer.name,
            FindingRow.kind == KIND,
        )
    )
    if row is None or not add_reports(session, row) or BEGAN not in row.summary:
        return False
    session.flush()
    if row.state != OPEN or not _wanting(session, row):
        return False
    alerts.enqueue(session, row, "located", channels)
    return True


def _wanting(session: Session, row: FindingRow) -> bool:
    """Whether a message went out that could not name the origin, and none that did."""
    sent = session.execute(
        select(Alert.change, Alert.attempts).where(
            Alert.finding_id == row.id, Alert.occurrence == row.occurrence
        )
    ).all()
    return "located" not in {change for change, _ in sent} and any(
        attempts for change, attempts in sent if change == "opened"
    )


def add_reports(session: Session, row: FindingRow) -> bool:
    """Put the steps before and the origin into a finding. Returns whether that changed it."""
    reports = _reports(session, row)
    told: dict[str, Any] = {}
    flights = [report for report in reports if isinstance(report, Flight)]
    if flights:
        flight = min(flights, key=lambda report: (report.step, report.rank))
        told |= flight.evidence(_layer_names(session, row, flight))
    origin = min(
        (report for report in reports if isinstance(report, Origin)),
        key=lambda report: (ORDER.index(report.kind), report.step, report.rank),
        default=None,
    )
    if origin is not None:
        run = session.get_one(Run, row.run_id)
        told = origin.evidence(run.world_size) | told
    if all(row.evidence.get(label) == value for label, value in told.items()):
        return False
    row.evidence = told | row.evidence | told
    if origin is not None:
        row.summary = " ".join(filter(None, [row.summary.split(BEGAN)[0], origin.sentence]))
    return True


def _reports(session: Session, row: FindingRow) -> list[Report]:
    bodies = session.scalars(
        select(ReportRow.body)
        .join(Optimizer, Optimizer.id == ReportRow.optimizer_id)
        .where(Optimizer.run_id == row.run_id, Optimizer.name == row.optimizer)
    )
    return [report for report in map(decode_record, bodies) if isinstance(report, Report)]


def _layer_names(session: Session, row: FindingRow, flight: Flight) -> list[str]:
    """The layers that a flight speaks of."""
    body = session.scalar(
        select(ManifestRow.body)
        .join(Optimizer, Optimizer.id == ManifestRow.optimizer_id)
        .where(
            Optimizer.run_id == row.run_id,
            Optimizer.name == row.optimizer,
            ManifestRow.rank == flight.rank,
            ManifestRow.version == flight.manifest,
        )
    )
    return [] if body is None else [layer.name for layer in decode_manifest(body).layers]
