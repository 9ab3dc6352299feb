"""A worker takes runs, and frees them, many at a time; none of them stands in another's way."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session
from synthetic_runs import dense, healthy, manifest, new_run, vanishing

from gradwatch.health.window import Window
from gradwatch.wire.frame import RunInfo
from gradwatch_server import judging
from gradwatch_server.database import writing
from gradwatch_server.models import Optimizer, Run

LAYERS = 10


@pytest.fixture
def runs(collector: Any) -> list[RunInfo]:
    """Three runs that vanish, and one that is healthy."""
    made = [new_run() for _ in range(4)]
    for run, frames in zip(made, [*[vanishing] * 3, healthy], strict=True):
        collector.store(run, [manifest(dense(LAYERS)), *frames(range(60), LAYERS)])
    return made


def told(collector: Any, runs: list[RunInfo]) -> list[bool]:
    return ["vanishing" in collector.findings(run) for run in runs]


def due(collector: Any, runs: list[RunInfo]) -> list[bool]:
    with Session(collector.engine) as session:
        keys = [run.id for run in runs]
        waiting = set(
            session.scalars(select(Run.key).where(Run.key.in_(keys), Run.changed > Run.judged))
        )
    return [key in waiting for key in keys]


@pytest.mark.parametrize("together", [1, 2, 16])
def test_runs_are_told_apart_however_many_are_taken_together(
    collector, runs, together, monkeypatch
):
    monkeypatch.setattr(judging, "TOGETHER", together)
    assert collector.judge()
    assert told(collector, runs) == [True, True, True, False]
    assert due(collector, runs) == [False] * 4
    assert not collector.judge()


def test_a_run_that_cannot_be_judged_is_tried_again_and_no_other_waits_for_it(
    collector, runs, monkeypatch
):
    load = judging.load_window

    def broken(session: Session, optimizer: Optimizer, *given: Any) -> Window:
        if session.get_one(Run, optimizer.run_id).key == runs[1].id:
            # As a database says it: PostgreSQL answers nothing more in that transaction.
            session.execute(update(Run).values(nothing=1))
        return load(session, optimizer, *given)

    with monkeypatch.context() as patched:
        patched.setattr(judging, "load_window", broken)
        assert collector.judge()
    assert told(collector, runs) == [True, False, True, False]
    assert due(collector, runs) == [False, True, False, False]
    assert not collector.judge()  # another worker may be at it
    forget_leases(collector)
    assert collector.judge()
    assert told(collector, runs) == [True, True, True, False]


def test_findings_that_cannot_be_written_spoil_no_others(collector, runs, monkeypatch):
    reconcile = judging.reconcile

    def broken(session: Session, run: Run, *given: Any) -> bool:
        if run.key == runs[1].id:
            session.execute(update(Run).values(status=None))  # which no run may have
        return reconcile(session, run, *given)

    with monkeypatch.context() as patched:
        patched.setattr(judging, "reconcile", broken)
        assert collector.judge()
    assert told(collector, runs) == [True, False, True, False]
    assert due(collector, runs) == [False, True, False, False]
    assert len(collector.alerts()) == 2
    forget_leases(collector)
    assert collector.judge()
    assert told(collector, runs) == [True, True, True, False]
    assert len(collector.alerts()) == 3


def test_a_run_that_another_worker_has_is_left_to_it(collector, runs):
    with writing(collector.engine) as session:
        session.execute(
            update(Run).where(Run.key == runs[0].id).values(leased_until=time.time() + 60)
        )
    assert collector.judge()
    assert told(collector, runs) == [False, True, True, False]


def test_a_run_that_a_collector_writes_to_is_still_due_and_holds_up_no_other(
    collector, runs, database_kind
):
    if database_kind == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    with writing(collector.engine) as session:
        session.scalars(select(Run).where(Run.key == runs[0].id).with_for_update()).one()
        assert collector.judge()
        assert told(collector, runs) == [False, True, True, False]
    assert due(collector, runs) == [True, False, False, False]
    assert collector.judge()
    assert told(collector, runs) == [True, True, True, False]


def test_a_run_that_is_deleted_while_it_is_judged_stays_so(collector, runs, monkeypatch):
    write = judging._write

    def late(*given: Any) -> Any:
        with writing(collector.engine) as session:
            session.execute(delete(Run).where(Run.key == runs[1].id))
        return write(*given)

    monkeypatch.setattr(judging, "_write", late)
    assert collector.judge()
    left = [runs[0], *runs[2:]]
    assert told(collector, left) == [True, True, False]
    assert len(collector.alerts()) == 2


def forget_leases(collector: Any) -> None:
    with writing(collector.engine) as session:
        session.execute(update(Run).values(leased_until=0.0))
