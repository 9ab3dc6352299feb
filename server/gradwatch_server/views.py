"""Rows as the API shows them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import msgspec

from gradwatch.health.finding import Severity
from gradwatch.health.kinds import KINDS
from gradwatch.wire.api import FindingView, OptimizerView, RunView
from gradwatch.wire.frame import RunInfo
from gradwatch_server.models import OPEN, FindingRow, Optimizer, Run


def finding_view(row: FindingRow, run_key: str) -> FindingView:
    """A finding with the words of its kind."""
    kind = KINDS[row.kind]
    return FindingView(
        id=row.id,
        run=run_key,
        optimizer=row.optimizer,
        kind=row.kind,
        title=kind.title,
        severity=row.severity,
        state=row.state,
        layers=row.layers,
        first_step=row.first_step,
        last_step=row.last_step,
        summary=row.summary,
        evidence=row.evidence,
        meaning=kind.meaning,
        explanation=kind.explanation,
        action=kind.action,
        opened_at=row.opened_at,
        resolved_at=row.resolved_at,
    )


def finding_views(rows: Iterable[FindingRow], run_key: str) -> list[FindingView]:
    """Findings to read: open ones first, the gravest of them first."""
    ordered = sorted(
        rows,
        key=lambda row: (row.state != OPEN, -Severity(row.severity).rank, row.first_step),
    )
    return [finding_view(row, run_key) for row in ordered]


def run_view(
    run: Run,
    optimizers: Sequence[Optimizer],
    findings: Sequence[FindingRow],
    silent_after_s: float,
) -> RunView:
    """A run with its verdict: the gravest of its open findings."""
    return RunView(
        info=run_info(run),
        status=_status(run, silent_after_s),
        reason=run.reason,
        verdict=_verdict(run, findings),
        judged=run.judged >= run.changed > 0,
        last_step=max((optimizer.last_step for optimizer in optimizers), default=0),
        last_frame_at=run.last_frame_at,
        optimizers=[
            OptimizerView(
                name=optimizer.name,
                layers=optimizer.layers,
                frames=optimizer.frames,
                first_step=optimizer.first_step,
                last_step=optimizer.last_step,
            )
            for optimizer in optimizers
        ],
        findings=finding_views(findings, run.key),
        dropped=run.dropped,
        conflicts=run.conflicts,
        loss=run.loss,
        loss_nonfinite=run.loss_nonfinite,
    )


def run_info(run: Run) -> RunInfo:
    """How a run introduced itself."""
    return msgspec.json.decode(run.info, type=RunInfo)


def _status(run: Run, silent_after_s: float) -> str:
    heard_at = run.last_frame_at or run.created_at
    if run.status == "running" and time.time() - heard_at > silent_after_s:
        return "silent"
    return run.status


def _verdict(run: Run, findings: Sequence[FindingRow]) -> str:
    worst = max(
        (Severity(row.severity) for row in findings if row.state == OPEN),
        key=lambda severity: severity.rank,
        default=Severity.INFO,
    )
    if worst is not Severity.INFO:
        return worst.value
    return "healthy" if run.judged else "waiting"
