"""Rows as the API shows them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, cast

import msgspec

from gradwatch.health.finding import Severity
from gradwatch.health.kinds import KINDS
from gradwatch.health.score import score_of
from gradwatch.wire.api import FindingView, OptimizerView, RunView, TokenView
from gradwatch.wire.frame import RunInfo
from gradwatch_server.models import OPEN, FindingRow, Optimizer, Run, TokenRow

# The integers that msgpack has.
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1


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
        muted=row.muted_at is not None,
        acknowledged_at=row.acknowledged_at,
    )


def finding_views(rows: Iterable[FindingRow], run_key: str) -> list[FindingView]:
    """Findings to read: open ones first, the gravest of them first."""
    ordered = sorted(
        rows,
        key=lambda row: (row.state != OPEN, -Severity(row.severity).rank, row.first_step),
    )
    return [finding_view(row, run_key) for row in ordered]


def token_view(row: TokenRow) -> TokenView:
    """A token without its secret, which nobody knows."""
    return TokenView(
        key=row.key,
        name=row.name,
        scopes=row.scopes.split(),
        project=row.project,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
    )


def run_view(
    run: Run,
    optimizers: Sequence[Optimizer],
    findings: Sequence[FindingRow],
    silent_after_s: float,
) -> RunView:
    """A run with its verdict: the gravest of its open findings that nobody muted."""
    verdict = verdict_of(run, findings)
    return RunView(
        info=run_info(run),
        status=run_status(run, silent_after_s),
        reason=run.reason,
        verdict=verdict,
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
        notes=run.notes,
        score=None if verdict == "waiting" else round(score_of(_standing(findings)), 1),
    )


def run_info(run: Run) -> RunInfo:
    """How a run introduced itself, under the name and tags that people gave it since."""
    info = msgspec.json.decode(run.info, type=RunInfo)
    given = {"name": run.name, "tags": run.tags}
    kept = {field: value for field, value in given.items() if value is not None}
    return msgspec.structs.replace(info, config=_sendable(info.config), **kept)


def _sendable(value: Any) -> Any:
    """A value of JSON as msgpack can carry it too: an integer of more than 64 bits, as a seed may
    be, becomes its digits."""
    match value:
        case dict():
            items = cast("dict[str, Any]", value).items()
            return {name: _sendable(item) for name, item in items}
        case list():
            return [_sendable(item) for item in cast("list[Any]", value)]
        case int() if not MIN_INTEGER <= value <= MAX_INTEGER:
            return str(value)
        case _:
            return value


def run_status(run: Run, silent_after_s: float) -> str:
    """running, silent, finished or failed."""
    heard_at = run.last_frame_at or run.created_at
    if run.status == "running" and time.time() - heard_at > silent_after_s:
        return "silent"
    return run.status


def verdict_of(run: Run, findings: Sequence[FindingRow]) -> str:
    """critical, warning, healthy or waiting. findings: all of the run."""
    worst = max(_standing(findings), key=lambda severity: severity.rank, default=Severity.INFO)
    if worst is not Severity.INFO:
        return worst.value
    return "healthy" if run.judged else "waiting"


def _standing(findings: Sequence[FindingRow]) -> list[Severity]:
    """Of the findings that are open and that nobody muted."""
    return [
        Severity(row.severity) for row in findings if row.state == OPEN and row.muted_at is None
    ]
