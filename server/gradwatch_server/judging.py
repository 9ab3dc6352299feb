"""Judging: the detectors over the last frames of the runs that have changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Engine, bindparam, select, update
from sqlalchemy.orm import Session

from gradwatch.health.judge import judge
from gradwatch_server.database import reading, writing
from gradwatch_server.findings import reconcile
from gradwatch_server.frame_cache import FrameCache
from gradwatch_server.models import FindingRow, Optimizer, Run
from gradwatch_server.ranks import merge_due
from gradwatch_server.rules import NO_RULES, Rules
from gradwatch_server.windows import load_window

log = logging.getLogger(__name__)

# How long a worker may take over one run before another one tries.
LEASE_S = 60.0
BATCH = 200

_FREE = (
    update(Run)
    .where(Run.id == bindparam("judged_run"))
    .values(judged=bindparam("judged_state"), leased_until=bindparam("judged_at"))
)
# Any finding of a run: a healthy one has none, and nothing to bring in line.
_TOLD = select(FindingRow.id).where(FindingRow.run_id == bindparam("judged_run")).limit(1)


def judge_due(
    engine: Engine,
    channels: Sequence[str],
    rules: Rules = NO_RULES,
    cache: FrameCache | None = None,
) -> bool:
    """Judge every run that changed since it was judged, the one that waits longest first.

    cache: of this process, for the next time. Returns whether alerts were written.
    """
    merge_due(engine)
    with Session(engine) as session:
        due = session.scalars(
            select(Run.id)
            .where(Run.changed > Run.judged, Run.leased_until < time.time())
            .order_by(Run.leased_until)
            .limit(BATCH)
        ).all()
    alerted = False
    for run_id in due:
        try:
            alerted |= judge_run(engine, run_id, channels, rules, cache)
        except Exception:
            # It is tried again when its lease ends; the runs after it must not wait for that.
            log.exception("run %d could not be judged", run_id)
    return alerted


def judge_run(
    engine: Engine,
    run_id: int,
    channels: Sequence[str],
    rules: Rules = NO_RULES,
    cache: FrameCache | None = None,
) -> bool:
    """Judge one run, unless another worker is at it. Safe to repeat at any time."""
    claimed = _claim(engine, run_id)
    if claimed is None:
        return False
    alerted = False
    settings = rules.settings(claimed.project, claimed.key)
    with reading(engine) as session:
        optimizers = session.scalars(select(Optimizer).where(Optimizer.run_id == run_id)).all()
        windows = [
            (optimizer.name, load_window(session, optimizer, cache)) for optimizer in optimizers
        ]
    judged = [
        (name, window, judge(window, settings)) for name, window in windows if len(window.steps)
    ]
    with writing(engine) as session:
        # The lock of the row keeps a collector from opening the same finding meanwhile. The run is
        # free from now on, and behind the runs that were judged before it.
        freed: Any = session.connection().execute(
            _FREE,
            {"judged_run": run_id, "judged_state": claimed.changed, "judged_at": time.time()},
        )
        if not freed.rowcount:
            return False
        found = any(findings for _, _, findings in judged)
        if not found and session.scalar(_TOLD, {"judged_run": run_id}) is None:
            return False
        run = session.get_one(Run, run_id)
        for name, window, findings in judged:
            last_step = int(window.steps[-1])
            alerted |= reconcile(session, run, name, findings, last_step, channels)
    return alerted


class _Claimed(NamedTuple):
    """A run that is this worker's."""

    changed: int  # the state of it that is to be judged
    project: str
    key: str


def _claim(engine: Engine, run_id: int) -> _Claimed | None:
    """Take a run for this worker; None when another one has it."""
    now = time.time()
    with engine.execution_options(writes=True).begin() as connection:
        taken = connection.execute(
            update(Run)
            .where(Run.id == run_id, Run.leased_until < now)
            .values(leased_until=now + LEASE_S)
            .returning(Run.changed, Run.project, Run.key)
        ).first()
    return None if taken is None else _Claimed(*taken)
