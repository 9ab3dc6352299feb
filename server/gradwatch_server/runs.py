"""Runs as lists show them and people change them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, and_, exists, func, not_, select
from sqlalchemy.orm import Session

from gradwatch.health.finding import Severity
from gradwatch.wire.api import RunFinish, RunPage, RunPatch, RunView
from gradwatch_server.models import OPEN, FindingRow, Optimizer, Run
from gradwatch_server.views import run_info, run_view

# Rows read at a time where a filter looks into what jobs said of themselves.
CHUNK_ROWS = 200


class Wanted(NamedTuple):
    """Which runs to list; None for all."""

    project: str | None = None
    status: str | None = None
    verdict: str | None = None
    name: str | None = None
    tag: str | None = None
    reach: str | None = None  # the only project that the caller may see


def page(
    session: Session, wanted: Wanted, after: int | None, limit: int, silent_after_s: float
) -> RunPage:
    """One page of the runs that are wanted, newest first. after: `next` of the page before."""
    chosen = select(Run).order_by(Run.id.desc()).where(*_conditions(wanted, silent_after_s))
    rows: list[Run] = []
    for row in _rows(session, chosen, after, limit + 1):
        if _is_called(row, wanted):
            rows.append(row)
        if len(rows) > limit:
            break
    more = str(rows[limit - 1].id) if len(rows) > limit else None
    return RunPage(runs=shown(session, rows[:limit], silent_after_s), next=more)


def _rows(session: Session, chosen: Select[Any], after: int | None, size: int) -> Iterator[Run]:
    while True:
        beyond = chosen if after is None else chosen.where(Run.id < after)
        rows = session.scalars(beyond.limit(size)).all()
        yield from rows
        if len(rows) < size:
            return
        after, size = rows[-1].id, CHUNK_ROWS


def _conditions(wanted: Wanted, silent_after_s: float) -> list[ColumnElement[bool]]:
    projects = [name for name in (wanted.project, wanted.reach) if name is not None]
    conditions = [Run.project == name for name in projects]
    if wanted.status:
        heard_at = func.coalesce(Run.last_frame_at, Run.created_at)
        silent = heard_at < time.time() - silent_after_s
        conditions += {
            "running": [Run.status == "running", not_(silent)],
            "silent": [Run.status == "running", silent],
        }.get(wanted.status, [Run.status == wanted.status])
    if wanted.verdict:
        critical, warning = (_has_open(level) for level in (Severity.CRITICAL, Severity.WARNING))
        well = and_(not_(critical), not_(warning))
        conditions.append(
            {
                "critical": critical,
                "warning": and_(warning, not_(critical)),
                "healthy": and_(well, Run.judged > 0),
                "waiting": and_(well, Run.judged == 0),
            }[wanted.verdict]
        )
    return conditions


def _has_open(severity: Severity) -> ColumnElement[bool]:
    """Whether a run has a finding that makes its verdict; see views.run_view."""
    return exists().where(
        FindingRow.run_id == Run.id,
        FindingRow.state == OPEN,
        FindingRow.severity == severity.value,
        FindingRow.muted_at.is_(None),
    )


def _is_called(row: Run, wanted: Wanted) -> bool:
    if wanted.name is None and wanted.tag is None:
        return True
    info = run_info(row)
    named = wanted.name is None or wanted.name.lower() in info.name.lower()
    return named and (wanted.tag is None or wanted.tag in info.tags)


def shown(session: Session, rows: Iterable[Run], silent_after_s: float) -> list[RunView]:
    """Runs with their optimizers and findings, in the order given."""
    listed = list(rows)
    ids = [row.id for row in listed]
    optimizers = session.scalars(select(Optimizer).where(Optimizer.run_id.in_(ids))).all()
    findings = session.scalars(select(FindingRow).where(FindingRow.run_id.in_(ids))).all()
    return [
        run_view(
            row,
            [item for item in optimizers if item.run_id == row.id],
            [item for item in findings if item.run_id == row.id],
            silent_after_s,
        )
        for row in listed
    ]


def change(row: Run, patch: RunPatch) -> None:
    """Keep what somebody wants to be told of a run."""
    for name in ("name", "tags", "notes"):
        value = getattr(patch, name)
        if value is not None:
            setattr(row, name, value)


def finish(row: Run, said: RunFinish) -> None:
    """End a run whose job did not. One that has ended stays as it is."""
    if row.status == "running":
        row.status, row.reason = said.status, said.reason
