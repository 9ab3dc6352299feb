"""Findings in the database: opened, kept up to date and resolved by what detectors say."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from gradwatch.health import reference_mismatch
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.judge import DETECTORS
from gradwatch_server import alerts
from gradwatch_server.lives import note_change
from gradwatch_server.models import OPEN, RESOLVED, FindingRow, Run
from gradwatch_server.reports import add_reports
from gradwatch_server.storable import MAX_NUMBER

# What frames tell; audits tell of their own, and are all that can end it.
ALL_KINDS = frozenset(detector.kind for detector in DETECTORS) - {reference_mismatch.KIND}
NON_FINITE = "non_finite"
# A problem is over when it was not seen for this many steps; less would flap.
RESOLVE_AFTER_STEPS = 50
# Enough to show; the summary counts the rest.
MAX_LAYERS_KEPT = 200


def reconcile(
    session: Session,
    run: Run,
    optimizer: str,
    findings: Sequence[Finding],
    last_step: int,
    channels: Sequence[str],
    kinds: frozenset[str] = ALL_KINDS,
) -> bool:
    """Bring one optimizer's findings in line with a judgement that looked for `kinds`.

    last_step: the newest step that was judged. Returns whether alerts were written.
    """
    rows = session.scalars(
        select(FindingRow).where(FindingRow.run_id == run.id, FindingRow.optimizer == optimizer)
    )
    known = {row.kind: row for row in rows}
    alerted = False
    for finding in findings:
        row = known.get(finding.kind)
        if row is not None and row.state == RESOLVED and finding.last_step <= row.last_step:
            continue  # the same steps seen again, not a relapse
        alerted |= tell(session, run, optimizer, row, finding, channels)
    for kind in kinds & known.keys() - _current(findings, last_step):
        row = known[kind]
        if row.state == OPEN and last_step >= row.last_step + RESOLVE_AFTER_STEPS:
            resolve(session, row, channels)
            alerted = True
    return alerted


def tell(
    session: Session,
    run: Run,
    optimizer: str,
    row: FindingRow | None,
    finding: Finding,
    channels: Sequence[str],
    anew: bool = False,
) -> bool:
    """Open a finding, or keep an open one up to date. Returns whether alerts were written.

    row: of its kind; None for the first one. anew: whether all that an open one says is replaced,
    though what is said now began later.
    """
    if row is None:
        row = FindingRow(run_id=run.id, optimizer=optimizer, kind=finding.kind, state="")
        session.add(row)
    opened = row.state != OPEN
    _update(row, finding, opened, anew)
    if finding.kind == NON_FINITE:
        session.flush()
        add_reports(session, row)
    if opened:
        session.flush()
        note_change(session, row, "opened")
    if opened and finding.severity.rank >= Severity.WARNING.rank:
        alerts.enqueue(session, row, "opened", channels)
        return True
    return False


def resolve(session: Session, row: FindingRow, channels: Sequence[str]) -> None:
    """End an open finding, and tell it."""
    row.state = RESOLVED
    row.resolved_at = time.time()
    note_change(session, row, "resolved")
    alerts.enqueue(session, row, "resolved", channels)


def _current(findings: Sequence[Finding], last_step: int) -> frozenset[str]:
    """Kinds that cannot have resolved by `last_step`."""
    current = {item.kind for item in findings if last_step < item.last_step + RESOLVE_AFTER_STEPS}
    # While gradients are NaN no detector sees anything, so nothing can be said to have healed.
    return ALL_KINDS if NON_FINITE in current else frozenset(current)


def _update(row: FindingRow, finding: Finding, opened: bool, anew: bool) -> None:
    relapse = opened and row.state == RESOLVED
    if opened:
        row.opened_at = time.time()
        row.resolved_at = None
        row.acknowledged_at = None  # what comes back was not seen
        row.occurrence = row.occurrence + 1 if relapse else 1
        row.first_step = finding.first_step
    began_earlier = finding.first_step <= row.first_step
    row.state = OPEN
    row.severity = finding.severity.value
    row.last_step = finding.last_step if anew else max(finding.last_step, row.last_step or 0)
    if opened or began_earlier or anew:
        # The window slides on: where it began is only known while the beginning is in view.
        row.first_step = finding.first_step
        row.layers = list(finding.layers[:MAX_LAYERS_KEPT])
        row.summary = finding.summary
        row.evidence = _plain(finding.evidence)


def _plain(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Evidence as JSON and msgpack can carry it.

    A number that is not finite becomes its name, one that is too large for an integer a float.
    """
    plain: dict[str, Any] = {}
    for label, value in evidence.items():
        number = value.item() if isinstance(value, np.generic) else value
        if isinstance(number, int) and abs(number) > MAX_NUMBER:
            number = float(number)
        broken = isinstance(number, float) and not math.isfinite(number)
        plain[label] = str(number) if broken else number
    return plain
