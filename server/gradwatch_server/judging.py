"""Judging: the detectors over the last frames of the runs that have changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Engine, bindparam, select, update
from sqlalchemy.orm import Session

from gradwatch.health.finding import Finding
from gradwatch.health.judge import judge
from gradwatch_server.database import reading, writing
from gradwatch_server.findings import reconcile
from gradwatch_server.frame_cache import FrameCache
from gradwatch_server.models import FindingRow, Optimizer, Run
from gradwatch_server.ranks import merge_due
from gradwatch_server.rules import NO_RULES, Rules
from gradwatch_server.windows import load_window

log = logging.getLogger(__name__)

# How long a worker may take over the runs that it has taken before another one tries.
LEASE_S = 60.0
# Runs that are judged at one call, and those of them that are taken, and freed, together: a
# transaction for each would cost as much as a third of a judgement.
BATCH = 200
TOGETHER = 16

_FREE = (
    update(Run)
    .where(Run.id == bindparam("judged_run"))
    .values(judged=bindparam("judged_state"), leased_until=bindparam("judged_at"))
)


def judge_due(
    engine: Engine,
    channels: Sequence[str],
    rules: Rules = NO_RULES,
    cache: FrameCache | None = None,
) -> bool:
    """Judge every run that changed since it was judged, the one that waits longest first.

    cache: of this process, for the next time. Returns whether alerts were written. Safe to repeat
    at any time, and beside other workers.
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
    for start in range(0, len(due), TOGETHER):
        claimed = _claim(engine, due[start : start + TOGETHER])
        looks = _looks(engine, claimed, rules, cache)
        alerted |= _end(engine, looks, channels)
    return alerted


class _Claimed(NamedTuple):
    """A run that is this worker's."""

    id: int
    changed: int  # the state of it that is to be judged
    project: str
    key: str


class _Judged(NamedTuple):
    """What was said of one optimizer."""

    optimizer: str
    last_step: int
    findings: Sequence[Finding]


class _Look(NamedTuple):
    """A run and what was said of it."""

    run: _Claimed
    judged: Sequence[_Judged]


def _claim(engine: Engine, run_ids: Sequence[int]) -> list[_Claimed]:
    """Take runs for this worker, in this order, but for those that another one has."""
    now = time.time()
    # Who locks several runs must not wait: a collector locks them in another order. A run that it
    # is at now is still due at the next tick.
    free = (
        select(Run.id)
        .where(Run.id.in_(run_ids), Run.leased_until < now)
        .with_for_update(skip_locked=True)
    )
    with engine.execution_options(writes=True).begin() as connection:
        taken = connection.execute(
            update(Run)
            .where(Run.id.in_(free))
            .values(leased_until=now + LEASE_S)
            .returning(Run.id, Run.changed, Run.project, Run.key)
        ).all()
    place = {run_id: number for number, run_id in enumerate(run_ids)}
    return sorted((_Claimed(*row) for row in taken), key=lambda run: place[run.id])


def _looks(
    engine: Engine, runs: Sequence[_Claimed], rules: Rules, cache: FrameCache | None
) -> list[_Look]:
    """Judge runs, without those that cannot be."""
    looks: list[_Look] = []
    with reading(engine) as session:
        wanted = Optimizer.run_id.in_([run.id for run in runs])
        optimizers: dict[int | None, list[Optimizer]] = {run.id: [] for run in runs}
        for optimizer in session.scalars(select(Optimizer).where(wanted)).all():
            optimizers[optimizer.run_id].append(optimizer)
        for run in runs:
            try:
                settings = rules.settings(run.project, run.key)
                judged: list[_Judged] = []
                for optimizer in optimizers[run.id]:
                    window = load_window(session, optimizer, cache)
                    if len(window.steps):
                        found = judge(window, settings)
                        judged.append(_Judged(optimizer.name, int(window.steps[-1]), found))
                looks.append(_Look(run, judged))
            except Exception:
                # It is tried again when its lease ends; the runs after it must not wait for that.
                log.exception("run %d could not be judged", run.id)
                session.rollback()
    return looks


def _end(engine: Engine, looks: Sequence[_Look], channels: Sequence[str]) -> bool:
    """Free runs, and bring their findings in line: together, or one by one to spare the good.

    Returns whether alerts were written.
    """
    ended = frozenset[int]()
    alerted = False
    if len(looks) > 1:
        try:
            ended, alerted = _write(engine, looks, channels)
        except Exception:
            log.info("runs are ended one by one", exc_info=True)
    for look in looks:
        if look.run.id not in ended:
            try:
                alerted |= _write(engine, [look], channels).alerted
            except Exception:
                log.exception("findings of run %d could not be written", look.run.id)
    return alerted


class _Written(NamedTuple):
    runs: frozenset[int]
    alerted: bool


def _write(engine: Engine, looks: Sequence[_Look], channels: Sequence[str]) -> _Written:
    """One transaction: what was said of runs, without those of many that a collector is at."""
    alerted = False
    wanted = [look.run.id for look in looks]
    with writing(engine) as session:
        # The lock of the row keeps a collector from opening the same finding meanwhile.
        locked = select(Run.id).where(Run.id.in_(wanted))
        locked = locked.with_for_update(skip_locked=len(looks) > 1)
        held = frozenset(session.scalars(locked))
        here = [look for look in looks if look.run.id in held]
        if not here:
            return _Written(held, False)
        # They are free from now on, and behind the runs that were judged before them.
        now = time.time()
        session.connection().execute(
            _FREE,
            [
                {"judged_run": run.id, "judged_state": run.changed, "judged_at": now}
                for run, _ in here
            ],
        )
        # A healthy run has no finding, and nothing to bring in line.
        told = set(
            session.scalars(select(FindingRow.run_id).where(FindingRow.run_id.in_(held)).distinct())
        )
        for claimed, judged in here:
            if claimed.id not in told and not any(each.findings for each in judged):
                continue
            run = session.get_one(Run, claimed.id)
            for name, last_step, findings in judged:
                alerted |= reconcile(session, run, name, findings, last_step, channels)
    return _Written(held, alerted)
