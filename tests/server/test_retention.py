"""What is not kept any more is freed, in pieces; what is kept says the same as before."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session
from synthetic_runs import OPTIMIZER, dense, frame, healthy, manifest, new_run
from test_tiers import LAYERS, check, expected, fold_all, some_frames, stored

from gradwatch.wire.api import FramePage
from gradwatch.wire.frame import RunEnd
from gradwatch_server import retention, tasks, tiers
from gradwatch_server.database import migrate, writing
from gradwatch_server.models import (
    BARE,
    GONE,
    WHOLE,
    Event,
    FrameRow,
    ManifestRow,
    Optimizer,
    PartialStep,
    Run,
    Stretch,
    StretchDue,
)
from gradwatch_server.packing import unpack_frame
from gradwatch_server.queries import find_optimizer
from gradwatch_server.retention import DAY_S, Keep, retain
from gradwatch_server.windows import WINDOW_FRAMES

LONG_S = 60.0
AT_ONCE = 1e-9  # days
EVERYTHING = Keep()
STEPS = 1500
# Whole stretches between what the next judgement looks at: the run's beginning and its present.
FREED = range(256, (STEPS - WINDOW_FRAMES) // 256 * 256)
KEPT = [step for step in range(STEPS) if step not in FREED]


def free(collector: Any, keep: Keep = EVERYTHING) -> None:
    while retain(collector.engine, keep, LONG_S):
        pass


def count(collector: Any, model: type[Any]) -> int:
    with Session(collector.engine) as session:
        return session.scalar(select(func.count()).select_from(model)) or 0


def steps_of(collector: Any, run: Any) -> list[int]:
    with Session(collector.engine) as session:
        optimizer = find_optimizer(session, run.id, OPTIMIZER)
        chosen = select(FrameRow.step).where(FrameRow.optimizer_id == optimizer.id)
        return list(session.scalars(chosen.order_by(FrameRow.step)))


def store(collector: Any, run: Any, frames: Any) -> None:
    collector.store(run, [manifest(dense(LAYERS))])
    for place in range(0, len(frames), 500):
        collector.store(run, frames[place : place + 500])


@pytest.fixture
def empty(collector):
    """The collector without what earlier tests left behind."""
    free(collector)
    return collector


def test_nothing_is_freed_unless_somebody_said_so(empty):
    run = new_run()
    store(empty, run, some_frames(range(1200)))
    fold_all(empty.engine)
    with writing(empty.engine) as session:
        session.execute(update(Stretch).values(folded_at=0.0))
        session.execute(update(Run).values(created_at=0.0, last_frame_at=0.0))
    free(empty)
    assert steps_of(empty, run) == list(range(1200))
    assert stored(empty, run, 1)[0].frames == WHOLE


def test_old_frames_go_and_what_they_folded_into_stays(empty):
    run, frames = new_run(), some_frames(range(STEPS))
    store(empty, run, frames)
    fold_all(empty.engine)
    free(empty, Keep(frames_days=AT_ONCE))
    assert steps_of(empty, run) == KEPT
    for start, row in stored(empty, run, 1).items():
        assert row.frames == (GONE if start in FREED else WHOLE)
        check(tiers.unpack_columns(row.body), frames[start : start + 256], 1)


def test_a_page_that_polls_is_told_when_frames_that_it_shows_are_gone(empty):
    run = new_run()
    store(empty, run, some_frames(range(STEPS)))
    fold_all(empty.engine)
    path = f"/api/v1/runs/{run.id}/frames?optimizer={OPTIMIZER}&first=256&last=300"
    tag = {"If-None-Match": empty.get(path).headers["ETag"]}
    assert empty.get(path, **tag).status == 304
    free(empty)
    assert empty.get(path, **tag).status == 304
    free(empty, Keep(frames_days=AT_ONCE))
    after = empty.get(path, **tag)
    assert after.status == 200
    assert msgspec.json.decode(after.body, type=FramePage).frames == []


def test_a_stretch_that_is_to_be_folded_again_keeps_its_frames(empty):
    run, frames = new_run(), some_frames(range(STEPS))
    store(empty, run, frames[:256] + frames[257:])
    fold_all(empty.engine)
    empty.store(run, frames[256:257])
    free(empty, Keep(frames_days=AT_ONCE))
    assert steps_of(empty, run)[:512] == list(range(512))


def test_frames_that_come_after_their_stretch_is_gone_are_folded_in_once(empty):
    run, frames = new_run(), some_frames(range(STEPS))
    late = frames[300:310]
    store(empty, run, frames[:300] + frames[310:])
    fold_all(empty.engine)
    free(empty, Keep(frames_days=AT_ONCE))
    # Some that are new and some that are not: nothing but the stretch knows by now.
    for _ in range(2):
        empty.store(run, frames[290:310])
        fold_all(empty.engine)
    row = stored(empty, run, 1)[256]
    assert row.frames == GONE
    check(tiers.unpack_columns(row.body), frames[256:512], 1)
    told = [tiers.add_histograms([item], {1: [""] * LAYERS}, 1) for item in frames[256:512]]
    sums = sum(counts for counts in told if counts is not None)
    assert row.histograms is not None
    assert np.array_equal(tiers.unpack_counts(row.histograms, LAYERS), sums)
    assert len(late) == 10
    assert steps_of(empty, run) == KEPT
    assert empty.client.run(run.id).optimizers[0].frames == 1500


def test_old_histograms_go_and_their_sums_stay(empty):
    run, frames = new_run(), some_frames(range(STEPS))
    store(empty, run, frames[:300] + frames[301:])
    fold_all(empty.engine)
    before = stored(empty, run, 1)[256].histograms
    free(empty, Keep(histograms_days=AT_ONCE))
    assert stored(empty, run, 1)[256].frames == BARE
    assert steps_of(empty, run) == [step for step in range(STEPS) if step != 300]
    with Session(empty.engine) as session:
        for row in session.scalars(select(FrameRow).order_by(FrameRow.step)):
            item = unpack_frame(row.body, OPTIMIZER, 0, row.step)
            assert (item.histograms is None) == (row.step in FREED or row.step % 5 != 0)
            assert bytes(item.values) == bytes(frames[row.step].values)
    assert stored(empty, run, 1)[256].histograms == before
    # A late frame adds its own to the sums that were kept.
    empty.store(run, [frames[300]])
    fold_all(empty.engine)
    row = stored(empty, run, 1)[256]
    own = tiers.add_histograms([frames[300]], {1: [""] * LAYERS}, 1)
    assert before is not None
    assert row.histograms is not None
    added = tiers.unpack_counts(row.histograms, LAYERS) - tiers.unpack_counts(before, LAYERS)
    assert np.array_equal(added, own)
    low, *_ = expected(frames[256:512], "norm")
    fold = tiers.unpack_columns(row.body).statistics["norm"]
    assert np.array_equal(np.fmin.reduce(fold.low), low.astype("f4"))


def test_a_run_goes_so_long_after_its_last_frame(empty):
    old, new = new_run(), new_run()
    now = time.time()
    for run, days in ((old, 31), (new, 29)):
        at = now - days * DAY_S
        frames = [frame(step, [[1.0] * LAYERS, [0.0] * LAYERS], time=at) for step in range(10)]
        empty.store(run, [manifest(dense(LAYERS)), *frames])
        empty.store(run, [RunEnd(rank=0, time=at, status="finished")])
    with writing(empty.engine) as session:
        session.execute(update(Run).values(created_at=now - 40 * DAY_S))
    free(empty, Keep(runs_days=30.0))
    assert [run.info.id for run in empty.client.runs().runs] == [new.id]
    assert count(empty, FrameRow) == 10


def test_a_run_whose_clock_stands_still_is_not_taken_for_an_old_one(empty):
    run = new_run()
    frames = [frame(step, [[1.0] * LAYERS, [0.0] * LAYERS], time=1.0) for step in range(600)]
    store(empty, run, frames)
    with writing(empty.engine) as session:
        session.execute(update(Run).values(created_at=1.0))
    fold_all(empty.engine)
    free(empty, Keep(runs_days=30.0))
    assert [shown.info.id for shown in empty.client.runs().runs] == [run.id]


def test_a_deleted_run_is_gone_at_once_and_all_its_rows_are_freed(empty, monkeypatch):
    kept, gone = new_run(), new_run(world_size=2)
    store(empty, kept, some_frames(range(600)))
    layers = [manifest(dense(LAYERS)), manifest(dense(LAYERS), rank=1)]
    for rank in (0, 1):
        events = ("amp_skipped",) if rank else ()
        frames = some_frames(range(600 - 5 * rank), rank=rank, events=events)
        empty.store(gone, [*layers, *frames])
    empty.judge()
    fold_all(empty.engine)
    tables = (FrameRow, Stretch, StretchDue, Event, PartialStep, ManifestRow, Optimizer)
    assert all(count(empty, model) for model in tables)
    assert empty.request("DELETE", f"/api/v1/runs/{gone.id}").status == 204
    assert empty.get(f"/api/v1/runs/{gone.id}").status == 404
    fold_all(empty.engine)
    empty.judge()
    monkeypatch.setattr(retention, "PIECE_LAYERS", 100 * LAYERS)
    free(empty)
    assert count(empty, Optimizer) == 1
    assert count(empty, FrameRow) == 600
    assert count(empty, Event) == count(empty, PartialStep) == 0
    assert len(stored(empty, kept, 1)) == count(empty, Stretch)
    assert count(empty, ManifestRow) == 1


def test_a_job_that_goes_on_after_its_run_was_deleted_begins_anew(empty):
    run = new_run()
    store(empty, run, some_frames(range(300)))
    empty.request("DELETE", f"/api/v1/runs/{run.id}")
    store(empty, run, some_frames(range(300, 320)))
    free(empty)
    assert steps_of(empty, run) == list(range(300, 320))


def test_runs_are_stored_while_rows_are_freed(empty, monkeypatch):
    gone = new_run()
    store(empty, gone, some_frames(range(3000)))
    empty.request("DELETE", f"/api/v1/runs/{gone.id}")
    monkeypatch.setattr(retention, "PIECE_LAYERS", 20 * LAYERS)
    freeing = threading.Thread(target=free, args=[empty])
    freeing.start()
    run, between = new_run(), 0
    empty.store(run, [manifest(dense(LAYERS))])
    for item in healthy(range(20), LAYERS):
        empty.store(run, [item])
        between += freeing.is_alive()
    freeing.join()
    assert between > 0
    assert count(empty, FrameRow) == 20


def test_several_workers_free_what_one_would(empty):
    run = new_run()
    store(empty, run, some_frames(range(STEPS)))
    fold_all(empty.engine)
    gone = new_run()
    store(empty, gone, some_frames(range(900)))
    empty.request("DELETE", f"/api/v1/runs/{gone.id}")
    workers = [
        threading.Thread(target=free, args=[empty, Keep(frames_days=AT_ONCE)]) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert steps_of(empty, run) == KEPT
    assert count(empty, Optimizer) == 1


def test_sqlite_gives_the_room_back(start_collector, database_kind, monkeypatch):
    if database_kind != "sqlite":
        pytest.skip("PostgreSQL's autovacuum sees to it")
    collector = start_collector()
    run = new_run()
    store(collector, run, some_frames(range(3000)))

    def pages() -> int:
        with collector.engine.connect() as connection:
            return connection.scalar(text("PRAGMA page_count")) or 0

    full = pages()
    monkeypatch.setattr(retention, "PIECE_PAGES", 16)
    collector.request("DELETE", f"/api/v1/runs/{run.id}")
    free(collector)
    assert pages() < full / 2


def test_a_budget_ends_in_time_and_says_that_there_is_more(empty, monkeypatch):
    gone = new_run()
    store(empty, gone, some_frames(range(300)))
    empty.request("DELETE", f"/api/v1/runs/{gone.id}")
    monkeypatch.setattr(retention, "PIECE_LAYERS", LAYERS)
    assert retain(empty.engine, Keep(), 0.0)
    assert 0 < count(empty, FrameRow) < 300
    assert not retain(empty.engine, Keep(), math.inf)
    assert count(empty, FrameRow) == 0


def test_what_beat_sends_is_folded_and_freed_by_the_settings(empty, monkeypatch):
    run = new_run()
    store(empty, run, some_frames(range(STEPS)))
    settings = replace(empty.settings, keep_frames_days=AT_ONCE)
    monkeypatch.setattr(tasks, "BUDGET_S", LONG_S)
    monkeypatch.setattr(tasks, "_engine", lambda: empty.engine)
    monkeypatch.setattr(tasks, "_settings", lambda: settings)
    schedule: dict[str, Any] = tasks.celery_app.conf.beat_schedule
    for entry in ("fold", "retain"):
        # Outside of a worker, as it would be called there.
        tasks.celery_app.tasks[schedule[entry]["task"]].run()
    assert steps_of(empty, run) == KEPT


def test_taking_the_tables_back_frees_what_deleted_runs_left(start_collector):
    collector = start_collector()
    kept, gone = new_run(), new_run()
    for run in (kept, gone):
        store(collector, run, some_frames(range(300)))
    fold_all(collector.engine)
    collector.request("DELETE", f"/api/v1/runs/{gone.id}")
    migrate(collector.engine, "0005")
    migrate(collector.engine)
    assert (count(collector, Optimizer), count(collector, FrameRow)) == (1, 300)
    assert count(collector, ManifestRow) == 1
