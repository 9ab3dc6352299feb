"""What a worker remembers of a run's frames never changes what it says of the run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, update
from sqlalchemy.orm import Session
from synthetic_runs import OPTIMIZER, dense, frame, healthy, manifest, new_run, vanishing

from gradwatch.health.judge import judge
from gradwatch.health.window import Window
from gradwatch.windows import WINDOW_FRAMES
from gradwatch.wire.frame import Frame, RunInfo
from gradwatch_server import windows
from gradwatch_server.database import reading, writing
from gradwatch_server.frame_cache import FRAME_BYTES, FrameCache
from gradwatch_server.judging import judge_due
from gradwatch_server.merge import MERGED
from gradwatch_server.models import FrameRow, Optimizer, Run
from gradwatch_server.queries import find_optimizer, find_run
from gradwatch_server.ranks import merge_due
from gradwatch_server.rules import read_rules
from gradwatch_server.windows import load_window

LAYERS = 10


def look(collector: Any, run: RunInfo, cache: FrameCache | None) -> Window:
    with reading(collector.engine) as session:
        return load_window(session, find_optimizer(session, run.id, OPTIMIZER), cache)


def check(collector: Any, run: RunInfo, *caches: FrameCache) -> Window:
    """The window, which has to be the same, number by number, whoever remembers what."""
    cold = look(collector, run, None)
    for cache in caches:
        warm = look(collector, run, cache)
        assert warm.steps.tolist() == cold.steps.tolist()
        assert [layer.name for layer in warm.layers] == [layer.name for layer in cold.layers]
        for told, expected in (
            (warm.statistics, cold.statistics),
            (warm.scalars, cold.scalars),
            (warm.reported, cold.reported),
        ):
            assert told.keys() == expected.keys()
            for name, values in expected.items():
                assert np.array_equal(told[name], values, equal_nan=values.dtype.kind == "f"), name
        assert judge(warm) == judge(cold)
    return cold


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of the frames that were read from rows, in that order."""
    steps: list[int] = []
    unpack = windows.unpack_frame

    def noted(body: bytes, optimizer: str, rank: int, step: int) -> Frame:
        steps.append(step)
        return unpack(body, optimizer, rank, step)

    monkeypatch.setattr(windows, "unpack_frame", noted)
    return steps


def test_a_second_look_reads_what_is_new_and_nothing_else(collector, unpacked):
    run, cache = new_run(), FrameCache()
    collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(40))])
    assert [item.kind for item in judge(look(collector, run, cache))] == ["vanishing"]
    assert sorted(unpacked) == list(range(40))
    unpacked.clear()
    collector.post(run, vanishing(range(40, 43)))
    assert len(look(collector, run, cache).steps) == 43
    assert sorted(unpacked) == [40, 41, 42]


@pytest.mark.parametrize("seed", range(3))
def test_frames_in_any_order_are_judged_the_same(collector, seed):
    run, ordered, caches = new_run(), new_run(), (FrameCache(), FrameCache())
    frames = [*healthy(range(300), LAYERS), *vanishing(range(300, 700))]
    collector.store(ordered, [manifest(dense(LAYERS)), *frames])
    chance = random.Random(seed)
    chance.shuffle(frames)
    collector.store(run, [manifest(dense(LAYERS))])
    while frames:
        some = [frames.pop() for _ in range(min(len(frames), chance.randrange(1, 200)))]
        collector.post(run, [*some, *some[:3]])
        # Now this worker comes by, now that one, now both.
        check(collector, run, *chance.sample(caches, chance.randrange(1, 3)))
    window = check(collector, run, *caches)
    assert len(window.steps) == WINDOW_FRAMES
    assert judge(window) == judge(look(collector, ordered, None)) != []


def test_a_step_that_a_late_rank_amends_is_read_again(collector, unpacked):
    run, cache = new_run(world_size=2), FrameCache()
    collector.store(run, [manifest(dense(2), rank=rank) for rank in (0, 1)])
    frames = [
        [frame(step, [[1.0 + rank, 2.0], [0, 0]], rank=rank) for step in range(5)]
        for rank in (0, 1)
    ]
    collector.post(run, [*frames[0][:3], *frames[1]])
    merge_due(collector.engine, timeout_s=-1)
    window = check(collector, run, cache)
    assert window.statistic("norm")[:, 0].tolist() == [1, 1, 1, 2, 2]
    unpacked.clear()
    collector.post(run, frames[0][3:])
    # Of layers that every rank holds whole the lowest rank speaks.
    assert look(collector, run, cache).statistic("norm")[:, 0].tolist() == [1] * 5
    assert sorted(unpacked) == [3, 4]
    check(collector, run, cache)


def test_a_run_that_turns_out_to_have_ranks_keeps_what_is_known(collector):
    run, cache = new_run(), FrameCache()
    collector.store(run, [manifest(dense(2)), *healthy(range(20), 2)])
    check(collector, run, cache)
    collector.store(run, [manifest(dense(2), rank=1)])
    collector.post(run, [frame(20, [[1, 2], [0, 0]], rank=rank) for rank in (0, 1)])
    assert len(check(collector, run, cache).steps) == 21


def test_frames_that_are_gone_are_forgotten(collector):
    run, cache = new_run(), FrameCache()
    collector.store(run, [manifest(dense(2)), *healthy(range(100), 2)])
    check(collector, run, cache)
    held = cache.size_bytes
    with writing(collector.engine) as session:
        session.execute(delete(FrameRow).where(FrameRow.step.between(40, 59)))
    assert len(check(collector, run, cache).steps) == 80
    assert cache.size_bytes == held * 80 // 100


def test_another_run_in_the_place_of_a_deleted_one_is_seen_as_it_is(collector):
    cache = FrameCache()
    for layers, value in ((2, 1.0), (3, 5.0)):
        run = new_run()
        frames = [frame(step, [[value] * layers, [0] * layers]) for step in range(20)]
        collector.store(run, [manifest(dense(layers)), *frames])
        window = check(collector, run, cache)
        assert (window.statistic("norm") == value).all()
        # SQLite gives the number of what was deleted to the next one.
        with writing(collector.engine) as session:
            session.execute(delete(Run))
            session.execute(delete(Optimizer))


def test_layers_that_change_are_those_of_the_newest_manifest(collector):
    run, cache = new_run(), FrameCache()
    collector.store(run, [manifest(dense(2)), *healthy(range(20), 2)])
    check(collector, run, cache)
    grown = [frame(step, [[1, 2, 3], [0, 0, 0]], manifest=2) for step in range(20, 25)]
    collector.store(run, [manifest(dense(3), version=2), *grown])
    window = check(collector, run, cache)
    assert np.isnan(window.statistic("norm")[:20, 2]).all()


def test_frames_without_a_digest_are_read_every_time(collector, unpacked):
    run, cache = new_run(world_size=2), FrameCache()
    collector.store(run, [manifest(dense(2), rank=rank) for rank in (0, 1)])
    collector.post(
        run, [frame(step, [[1, 2], [0, 0]], rank=rank) for rank in (0, 1) for step in range(5)]
    )
    with writing(collector.engine) as session:
        # As merged frames were stored before.
        session.execute(update(FrameRow).where(FrameRow.rank == MERGED).values(digest=b""))
    for _ in range(2):
        unpacked.clear()
        check(collector, run, cache)
        assert sorted(unpacked) == sorted([*range(5), *range(5)])


def test_other_thresholds_count_at_the_next_look(collector):
    run, cache = new_run(), FrameCache()
    collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(60))])
    lenient = read_rules("[vanishing]\nratio = 1e-30")
    judge_due(collector.engine, (), lenient, cache)
    assert "vanishing" not in collector.findings(run)
    collector.post(run, vanishing(range(60, 61)))
    judge_due(collector.engine, (), cache=cache)
    assert "vanishing" in collector.findings(run)


def test_what_is_kept_stays_within_its_limit(collector):
    limit = 3 * 20 * (FRAME_BYTES + 7 * LAYERS * 4)
    runs, cache = [new_run() for _ in range(5)], FrameCache(limit)
    for run in runs:
        collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(20))])
    for _ in range(3):
        for run in runs:
            check(collector, run, cache)
            assert cache.size_bytes <= limit
    # Going round, some are always known: those that came first.
    assert cache.size_bytes == limit
    assert [bool(known(collector, run, cache)) for run in runs] == [True] * 3 + [False] * 2


def known(collector: Any, run: RunInfo, cache: FrameCache) -> Sequence[Any]:
    with Session(collector.engine) as session:
        return list(cache.frames(find_optimizer(session, run.id, OPTIMIZER).id))


def test_a_run_that_nobody_looks_at_makes_room(collector):
    ended, run, cache = new_run(), new_run(), FrameCache(idle_s=-1.0)
    for each in (ended, run):
        collector.store(each, [manifest(dense(2)), *healthy(range(20), 2)])
        look(collector, each, cache)
    assert not known(collector, ended, cache)
    assert known(collector, run, cache)


def test_of_many_runs_the_one_that_waits_longest_comes_first(collector, monkeypatch):
    runs = [new_run() for _ in range(4)]
    for run in runs:
        collector.store(run, [manifest(dense(2)), *healthy(range(20), 2)])
    monkeypatch.setattr("gradwatch_server.judging.BATCH", 2)
    seen: list[str] = []

    def noted(session: Session, optimizer: Optimizer, *given: Any) -> Window:
        seen.append(session.get_one(Run, optimizer.run_id).key)
        return load_window(session, optimizer, *given)

    monkeypatch.setattr("gradwatch_server.judging.load_window", noted)
    for number in range(4):
        for run in runs:
            collector.post(run, healthy(range(20 + number, 21 + number), 2))
        collector.judge()
    assert sorted(seen[:4]) == sorted(run.id for run in runs)
    assert seen[4:] == seen[:4]
    with Session(collector.engine) as session:
        assert find_run(session, runs[0].id).judged
