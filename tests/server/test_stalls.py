"""Runs that fall silent are told by the clock, once, and resolved when they are heard again."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session
from synthetic_runs import dense, detail, healthy, manifest, new_run

from gradwatch.wire.frame import RunEnd
from gradwatch_server import listening
from gradwatch_server.database import writing
from gradwatch_server.models import Listening, Run
from gradwatch_server.rules import read_rules
from gradwatch_server.stalls import judge_silence

AGO_S = 1000.0  # beyond the default of 600


def stepping(steps: range, until: float | None = None, every_s: float = 1.0) -> list[Any]:
    """Healthy frames, the last of which was taken now."""
    last = time.time() if until is None else until
    return [
        detail(frame.step, [0.01] * 4, time=last - every_s * (steps[-1] - frame.step))
        for frame in healthy(steps)
    ]


def heard(collector: Any, run: Any, ago_s: float, listening_for_s: float = 1e5) -> None:
    """As if the run had been heard of so long ago, and the collector been there for so long."""
    now = time.time()
    listening.note(collector.engine)
    with writing(collector.engine) as session:
        session.execute(update(Run).where(Run.key == run.id).values(heard_at=now - ago_s))
        session.execute(update(Listening).values(since=now - listening_for_s))


def started(collector: Any, every_s: float = 1.0) -> Any:
    run = new_run()
    collector.store(run, [manifest(dense(4)), *stepping(range(1, 21), every_s=every_s)])
    return run


def judge(collector: Any, rules: str = "") -> bool:
    return judge_silence(collector.engine, collector.settings.channels, read_rules(rules))


def changes(collector: Any) -> list[str]:
    return [alert.change for alert in collector.alerts()]


def test_a_run_that_goes_on_is_not_told(collector):
    run = started(collector)
    heard(collector, run, 500)
    assert not judge(collector)
    assert collector.findings(run) == {}


def test_a_run_that_is_silent_for_too_long_is_told_once_with_an_alert(collector):
    run = started(collector)
    heard(collector, run, AGO_S)
    assert judge(collector)
    assert not judge(collector)
    finding = collector.findings(run)["stalled_run"]
    assert (finding.state, finding.severity, finding.first_step) == ("open", "critical", 20)
    assert finding.summary.startswith("No step for 17 minutes after step 20")
    assert changes(collector) == ["opened"]
    assert collector.client.run(run.id).verdict == "critical"


def test_judging_its_frames_again_does_not_resolve_it(collector):
    run = started(collector)
    heard(collector, run, AGO_S)
    judge(collector)
    collector.judge()
    assert collector.findings(run)["stalled_run"].state == "open"


def test_it_resolves_when_a_step_is_heard_of_again_and_can_come_back(collector):
    run = started(collector)
    heard(collector, run, AGO_S)
    judge(collector)
    collector.post(run, stepping(range(21, 22)))
    assert judge(collector)
    assert collector.findings(run)["stalled_run"].state == "resolved"
    heard(collector, run, 1e5)  # it has paused for a quarter of an hour before
    assert judge(collector)
    assert collector.findings(run)["stalled_run"].first_step == 21
    assert changes(collector) == ["opened", "resolved", "opened"]


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_it_resolves_when_the_run_ends(collector, status):
    run = started(collector)
    heard(collector, run, AGO_S)
    judge(collector)
    collector.post(run, [RunEnd(rank=0, time=time.time(), status=status)])
    assert judge(collector)
    assert collector.findings(run)["stalled_run"].state == "resolved"


def test_a_run_that_has_ended_is_never_told(collector):
    run = started(collector)
    collector.post(run, [RunEnd(rank=0, time=time.time(), status="finished")])
    heard(collector, run, AGO_S)
    assert not judge(collector)


def test_silence_begins_anew_when_the_collector_was_away(collector):
    """A restart makes no old run stalled at once; what was told already stays told."""
    told, quiet = started(collector), started(collector)
    heard(collector, told, AGO_S)
    judge(collector)
    heard(collector, quiet, AGO_S, listening_for_s=60)
    assert not judge(collector)
    assert collector.findings(quiet) == {}
    assert collector.findings(told)["stalled_run"].state == "open"
    heard(collector, quiet, AGO_S, listening_for_s=700)
    assert judge(collector)
    assert collector.findings(quiet)["stalled_run"].summary.startswith("No step for 12 minutes")


def test_while_no_collector_listens_nothing_is_told(collector, monkeypatch):
    run = started(collector)
    heard(collector, run, AGO_S)
    monkeypatch.setattr(listening, "GAP_S", -1.0)
    assert not judge(collector)


def test_a_gap_in_listening_begins_it_anew(collector):
    listening.note(collector.engine)
    long_ago = time.time() - 1e4
    with writing(collector.engine) as session:
        session.execute(update(Listening).values(since=long_ago, until=long_ago))
    listening.note(collector.engine)
    listening.note(collector.engine)
    with Session(collector.engine) as session:
        assert time.time() - session.scalars(select(Listening.since)).one() < 5000


def test_the_limit_follows_the_longest_pause_that_the_run_came_back_from(collector):
    run = started(collector, every_s=400.0)
    with Session(collector.engine) as session:
        row = session.scalars(select(Run).where(Run.key == run.id)).one()
        assert row.longest_pause_s == pytest.approx(400, abs=0.1)
    heard(collector, run, AGO_S)
    assert not judge(collector)
    heard(collector, run, 1300)
    assert judge(collector)


def test_frames_that_come_late_or_out_of_order_are_no_pause(collector):
    run = new_run()
    now = time.time()
    collector.store(run, [manifest(dense(4)), *stepping(range(1, 11), until=now - 50)])
    collector.post(run, stepping(range(40, 51), until=now, every_s=1.0))
    collector.post(run, stepping(range(11, 40), until=now - 11, every_s=1.0))
    with Session(collector.engine) as session:
        row = session.scalars(select(Run).where(Run.key == run.id)).one()
        assert row.longest_pause_s == pytest.approx(40, abs=0.1)
        assert row.last_frame_at == pytest.approx(now, abs=0.1)


def test_a_run_that_was_kept_on_disk_and_sent_later_is_not_judged_by_the_clock(collector):
    run = new_run()
    old = stepping(range(1, 21), until=time.time() - 1e5)
    collector.store(run, [manifest(dense(4)), *old])
    listening.note(collector.engine)
    with writing(collector.engine) as session:
        session.execute(update(Listening).values(since=time.time() - 1e6))
        assert session.scalars(select(Run.heard_at).where(Run.key == run.id)).one() is None
    assert not judge(collector)


def test_thresholds_of_a_run_are_its_own(collector):
    short, long = started(collector), started(collector)
    for run in (short, long):
        heard(collector, run, 100)
    assert judge(collector, f"[run.{short.id}.stalled_run]\nafter_s = 60\npauses = 3")
    assert "stalled_run" in collector.findings(short)
    assert "stalled_run" not in collector.findings(long)


def test_a_collector_says_that_it_listens(collector):
    with Session(collector.engine) as session:
        assert listening.since(session) is not None
