"""The lives of findings: listed over all runs, their changes told, and what people make of them."""

from __future__ import annotations

import time
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from gradwatch.wire.api import FindingChangeView, FindingHistory, FindingPage, FindingPatch
from gradwatch_server.models import PENDING, Alert, FindingChange, FindingRow, Run
from gradwatch_server.queries import NotFoundError
from gradwatch_server.views import finding_view


class Wanted(NamedTuple):
    """Which findings to list; None for all."""

    project: str | None = None
    state: str | None = None
    severity: str | None = None
    kind: str | None = None
    muted: bool | None = None
    reach: str | None = None  # the only project that the caller may see


def page(session: Session, wanted: Wanted, after: int | None, limit: int) -> FindingPage:
    """One page of findings, newest first. after: `next` of the page before."""
    chosen = (
        select(FindingRow, Run.key)
        .join(Run, Run.id == FindingRow.run_id)
        .order_by(FindingRow.id.desc())
        .limit(limit + 1)
    )
    equal = {
        FindingRow.state: wanted.state,
        FindingRow.severity: wanted.severity,
        FindingRow.kind: wanted.kind,
    }
    chosen = chosen.where(*(column == value for column, value in equal.items() if value))
    projects = [name for name in (wanted.project, wanted.reach) if name is not None]
    chosen = chosen.where(*(Run.project == name for name in projects))
    if wanted.muted is not None:
        chosen = chosen.where(FindingRow.muted_at.is_not(None) == wanted.muted)
    if after is not None:
        chosen = chosen.where(FindingRow.id < after)
    rows = session.execute(chosen).all()
    return FindingPage(
        findings=[finding_view(row, key) for row, key in rows[:limit]],
        next=str(rows[limit - 1][0].id) if len(rows) > limit else None,
    )


def history(session: Session, finding: int, project: str | None) -> FindingHistory:
    """A finding and its changes. project: the caller's, None for any. Raises NotFoundError."""
    row, run = _find(session, finding, project)
    changes = session.scalars(
        select(FindingChange).where(FindingChange.finding_id == row.id).order_by(FindingChange.id)
    )
    return FindingHistory(
        finding=finding_view(row, run.key),
        changes=[
            FindingChangeView(
                at=item.at,
                change=item.change,
                step=item.step,
                severity=item.severity,
                note=item.note,
            )
            for item in changes
        ],
    )


def change(session: Session, finding: int, patch: FindingPatch, project: str | None) -> None:
    """Mute or acknowledge a finding, or take it back. Raises NotFoundError."""
    row, _ = _find(session, finding, project)
    now = time.time()
    if patch.muted is not None and patch.muted != (row.muted_at is not None):
        row.muted_at = now if patch.muted else None
        note_change(session, row, "muted" if patch.muted else "unmuted", patch.note)
        if patch.muted:
            waiting = (Alert.finding_id == row.id, Alert.state == PENDING)
            session.execute(delete(Alert).where(*waiting))
    if patch.acknowledged is not None and patch.acknowledged != (row.acknowledged_at is not None):
        row.acknowledged_at = now if patch.acknowledged else None
        said = "acknowledged" if patch.acknowledged else "unacknowledged"
        note_change(session, row, said, patch.note)
    session.flush()


def note_change(session: Session, row: FindingRow, change: str, note: str = "") -> None:
    """Add to a finding's history. The finding must be in the database."""
    session.add(
        FindingChange(
            finding_id=row.id,
            at=time.time(),
            change=change,
            step=row.last_step,
            severity=row.severity,
            note=note,
        )
    )


def _find(session: Session, finding: int, project: str | None) -> tuple[FindingRow, Run]:
    row = session.get(FindingRow, finding)
    run = row and session.get(Run, row.run_id)
    if row is None or run is None or project not in (None, run.project):
        raise NotFoundError(f"there is no finding {finding}")
    return row, run
