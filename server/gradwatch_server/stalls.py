"""Runs that have fallen silent: told by the worker's clock, and resolved when they are heard again.

No frame comes of a job that hangs or was killed, so nothing marks its run as changed: all runs that
have not ended are looked at, those alone that were heard of once and of which it is not told yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from sqlalchemy import Engine, and_, exists, or_, select
from sqlalchemy.orm import Session

from gradwatch.health import stalled_run
from gradwatch.health.window import Silence, Window
from gradwatch_server.database import reading, writing
from gradwatch_server.findings import reconcile, resolve
from gradwatch_server.listening import since
from gradwatch_server.models import OPEN, FindingRow, Optimizer, Run
from gradwatch_server.rules import NO_RULES, Rules

KIND = "stalled_run"
RUNNING = "running"


class _Silent(NamedTuple):
    """A run that says nothing."""

    id: int
    heard_at: float
    silence: Silence
    settings: stalled_run.Thresholds


def judge_silence(engine: Engine, channels: Sequence[str], rules: Rules = NO_RULES) -> bool:
    """Tell of runs that are silent for too long, resolve what is over. Safe to repeat at any time.

    Returns whether alerts were written.
    """
    with reading(engine) as session:
        silent, over = _silent(session, rules), _over(session)
    alerted = False
    for run in silent:
        alerted |= _tell(engine, run, channels)
    for finding in over:
        alerted |= _resolve(engine, finding, channels)
    return alerted


def _silent(session: Session, rules: Rules) -> list[_Silent]:
    """Runs that are silent for longer than they may be."""
    listening = since(session)
    if listening is None:
        return []
    told = exists().where(
        FindingRow.run_id == Run.id, FindingRow.kind == KIND, FindingRow.state == OPEN
    )
    rows = session.execute(
        select(Run.id, Run.project, Run.key, Run.heard_at, Run.longest_pause_s).where(
            Run.status == RUNNING, Run.heard_at.is_not(None), ~told
        )
    )
    found: list[_Silent] = []
    now = time.time()
    for run_id, project, key, heard_at, longest_s in rows:
        assert heard_at is not None  # as the query says
        silence = Silence(now - max(heard_at, listening), longest_s)
        settings = cast(stalled_run.Thresholds, rules.settings(project, key)[KIND])
        if silence.seconds >= stalled_run.limit_s(silence, settings):
            found.append(_Silent(run_id, heard_at, silence, settings))
    return found


def _tell(engine: Engine, silent: _Silent, channels: Sequence[str]) -> bool:
    with writing(engine) as session:
        # The lock keeps a collector from storing a frame meanwhile.
        run = session.get(Run, silent.id, with_for_update=True)
        if run is None or run.status != RUNNING or run.heard_at != silent.heard_at:
            return False
        # Of several optimizers all are silent; the one that went furthest speaks for them.
        optimizer = session.scalars(
            select(Optimizer)
            .where(Optimizer.run_id == run.id)
            .order_by(Optimizer.last_step.desc(), Optimizer.id)
            .limit(1)
        ).first()
        if optimizer is None:
            return False
        window = Window(
            steps=np.array([optimizer.last_step]),
            layers=(),
            statistics={},
            scalars={},
            silence=silent.silence,
        )
        finding = stalled_run.detect(window, silent.settings)
        if finding is None:
            return False
        return reconcile(
            session,
            run,
            optimizer.name,
            [finding],
            finding.last_step,
            channels,
            kinds=frozenset({KIND}),
        )


def _over(session: Session) -> Sequence[int]:
    """Findings of runs that were heard again, or that have ended."""
    return session.scalars(
        select(FindingRow.id)
        .join(Run, Run.id == FindingRow.run_id)
        .where(
            FindingRow.kind == KIND,
            FindingRow.state == OPEN,
            or_(
                Run.status != RUNNING,
                and_(Run.heard_at.is_not(None), Run.heard_at > FindingRow.opened_at),
            ),
        )
    ).all()


def _resolve(engine: Engine, finding: int, channels: Sequence[str]) -> bool:
    with writing(engine) as session:
        row = session.get(FindingRow, finding, with_for_update=True)
        if row is None or row.state != OPEN:
            return False
        resolve(session, row, channels)
        return True
