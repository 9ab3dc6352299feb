"""When the ranks of a run are merged: once all have come, or after a while; late ones amend."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from synthetic_runs import OPTIMIZER, dense, detail, frame, layer, manifest, new_run

from gradwatch.wire.frame import Frame, LayerInfo, RunInfo
from gradwatch_server import retention
from gradwatch_server.merge import MERGED
from gradwatch_server.models import FrameRow, PartialStep
from gradwatch_server.packing import missing_ranks, unpack_frame
from gradwatch_server.ranks import gaps, merge_due


def shard(rank: int, ranks: int = 2) -> list[LayerInfo]:
    """Two layers of 64 x 64, of which each rank holds its share."""
    held = 64 * 64 // ranks
    return [
        LayerInfo(
            name=name,
            shape=(64, 64),
            dtype="float32",
            module="Linear",
            role="weight",
            depth=depth,
            sharding="(Shard(dim=0),)",
            held=held,
        )
        for depth, name in enumerate("ab")
    ]


def norms(step: int, rank: int, values: Any, **given: Any) -> Frame:
    return frame(step, [values, [0, 0]], rank=rank, **given)


def merged(collector: Any) -> dict[int, tuple[Frame, Any]]:
    """Merged frames by step, with the ranks that they lack."""
    with Session(collector.engine) as session:
        rows = session.scalars(select(FrameRow).where(FrameRow.rank == MERGED))
        return {
            row.step: (
                unpack_frame(row.body, OPTIMIZER, MERGED, row.step),
                missing_ranks(row.body),
            )
            for row in rows
        }


def partial_steps(collector: Any) -> list[int]:
    with Session(collector.engine) as session:
        return list(session.scalars(select(PartialStep.step).order_by(PartialStep.step)))


def introduce(collector: Any, ranks: int = 2) -> RunInfo:
    run = new_run(world_size=ranks)
    collector.store(run, [manifest(shard(rank, ranks), rank=rank) for rank in range(ranks)])
    return run


def test_a_step_is_merged_when_its_last_rank_has_come(collector):
    run = introduce(collector)
    collector.post(run, [norms(1, 0, [3.0, 6.0])])
    assert merged(collector) == {}
    collector.post(run, [norms(1, 1, [4.0, 8.0])])
    ((found, missing),) = merged(collector).values()
    assert found.row("norm").tolist() == [5.0, 10.0]
    assert missing == ()
    assert partial_steps(collector) == []
    shown = collector.client.heatmap(run.id, OPTIMIZER)
    assert shown.layers == ["a", "b"]
    assert shown.high[:, 0].tolist() == [5.0, 10.0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_the_ranks_changes_nothing(collector, order):
    run = introduce(collector, 3)
    for rank in order:
        sent = [norms(step, rank, [1.0 + rank, 2.0]) for step in (1, 2)]
        assert collector.post(run, sent).receipt.stored == 2
        assert collector.post(run, sent).receipt.repeated == 2
    for found, _ in merged(collector).values():
        assert found.row("norm").tolist() == [np.float32(np.sqrt(14)), np.float32(np.sqrt(12))]
    assert sorted(merged(collector)) == [1, 2]


def test_all_ranks_in_one_batch_are_merged_at_once(collector):
    run = introduce(collector)
    batch = [norms(step, rank, [3.0, 4.0]) for rank in (0, 1) for step in range(5)]
    assert collector.post(run, batch).receipt.stored == 10
    assert sorted(merged(collector)) == list(range(5))


def test_a_step_without_one_rank_is_merged_after_a_while_and_says_so(collector):
    run = introduce(collector, 4)
    collector.post(run, [norms(1, 1, [3.0, 6.0]), norms(1, 2, [4.0, 8.0])])
    assert merge_due(collector.engine, timeout_s=60) == 0
    assert merge_due(collector.engine, timeout_s=-1) == 1
    assert merge_due(collector.engine, timeout_s=-1) == 0
    ((found, missing),) = merged(collector).values()
    assert found.row("norm").tolist() == [5.0, 10.0]
    assert missing == ((0, 0), (3, 3))
    assert partial_steps(collector) == [1]


def test_a_late_rank_amends_what_was_merged_without_it(collector):
    run = introduce(collector, 3)
    collector.post(run, [norms(1, 0, [3.0, 0.0])])
    merge_due(collector.engine, timeout_s=-1)
    collector.post(run, [norms(1, 2, [4.0, 0.0])])
    ((found, missing),) = merged(collector).values()
    assert found.row("norm").tolist() == [5.0, 0.0]
    assert missing == ((1, 1),)
    collector.post(run, [norms(1, 1, [12.0, 0.0])])
    ((found, missing),) = merged(collector).values()
    assert found.row("norm").tolist() == [13.0, 0.0]
    assert missing == ()
    assert partial_steps(collector) == []


def test_the_worker_merges_and_then_judges(collector, monkeypatch):
    monkeypatch.setattr("gradwatch_server.ranks.MERGE_TIMEOUT_S", -1.0)
    run = new_run(world_size=2)
    collector.store(run, [manifest(dense(3)), *(detail(s, [0.1] * 3) for s in range(3))])
    collector.judge()
    assert sorted(merged(collector)) == [0, 1, 2]
    assert collector.client.run(run.id).judged


def test_a_run_of_one_rank_keeps_its_frames_once(collector):
    run = new_run()
    collector.store(run, [manifest(dense(2)), norms(1, 0, [1.0, 2.0])])
    assert merged(collector) == {}


def test_a_run_that_turns_out_to_have_more_ranks_keeps_what_it_had(collector):
    run = new_run()
    collector.store(run, [manifest(dense(2)), norms(1, 0, [1.0, 2.0])])
    collector.post(run, [manifest(dense(2), rank=1), norms(2, 1, [5.0, 6.0])])
    collector.post(run, [norms(2, 0, [7.0, 8.0])])
    shown = collector.client.heatmap(run.id, OPTIMIZER)
    assert shown.steps.tolist() == [1, 2]
    assert shown.high.tolist() == [[1.0, 7.0], [2.0, 8.0]]


def test_ranks_of_a_pipeline_show_all_layers(collector):
    run = new_run(world_size=2)
    collector.store(
        run,
        [
            manifest([layer("stem", 0)]),
            manifest([layer("head", 0)], rank=1),
            frame(1, [[1.0], [0]]),
            frame(1, [[2.0], [0]], rank=1),
        ],
    )
    shown = collector.client.heatmap(run.id, OPTIMIZER)
    assert shown.layers == ["stem", "head"]
    assert shown.high[:, 0].tolist() == [1.0, 2.0]


def drop_rank_frames(collector, window_steps: int) -> None:
    keep = retention.Keep(rank_steps=window_steps)
    assert not retention.retain(collector.engine, keep, budget_s=60.0)


def rank_steps(collector, rank: int) -> list[int]:
    with Session(collector.engine) as session:
        chosen = select(FrameRow.step).where(FrameRow.rank == rank).order_by(FrameRow.step)
        return list(session.scalars(chosen))


def test_a_window_of_frames_of_single_ranks_goes_in_pieces(collector, monkeypatch):
    run = introduce(collector)
    for rank in (0, 1):
        collector.post(run, [norms(step, rank, [3.0, 4.0]) for step in range(0, 700, 7)])
    monkeypatch.setattr(retention, "PIECE_LAYERS", 4 * 10)
    left: list[int] = []
    while retention.retain(collector.engine, retention.Keep(rank_steps=70), budget_s=0.0):
        left.append(len(rank_steps(collector, 0)))
    assert left == [90, 80, 70, 60, 50, 40, 30, 20, 11]
    assert rank_steps(collector, 1) == list(range(623, 700, 7))


def test_frames_of_single_ranks_are_kept_for_a_window_and_merged_ones_for_good(
    collector, monkeypatch
):
    run = introduce(collector)
    for rank in (0, 1):
        collector.post(run, [norms(step, rank, [3.0, 4.0]) for step in range(100)])
    drop_rank_frames(collector, window_steps=200)
    assert rank_steps(collector, 0) == rank_steps(collector, 1) == list(range(100))
    # Three steps of two ranks of two layers in one transaction.
    monkeypatch.setattr(retention, "PIECE_LAYERS", 12)
    drop_rank_frames(collector, window_steps=40)
    assert rank_steps(collector, 0) == rank_steps(collector, 1) == list(range(59, 100))
    assert sorted(merged(collector)) == list(range(100))

    # A repeat of what is gone is still a repeat, and spoils nothing.
    again = collector.post(run, [norms(step, 0, [3.0, 4.0]) for step in range(100)]).receipt
    assert (again.stored, again.repeated) == (0, 100)
    assert {float(found.row("norm")[0]) for found, _ in merged(collector).values()} == {
        float(np.float32(np.sqrt(18)))
    }


def test_a_step_that_still_waits_for_a_rank_is_not_dropped(collector):
    run = introduce(collector)
    collector.post(run, [norms(1, 0, [3.0, 4.0])])
    for rank in (0, 1):
        collector.post(run, [norms(step, rank, [1.0, 1.0]) for step in range(50, 150)])
    drop_rank_frames(collector, window_steps=20)
    collector.post(run, [norms(1, 1, [4.0, 3.0])])
    assert merged(collector)[1][0].row("norm").tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    ("ranks", "world", "missing"),
    [
        ([0, 1], 2, ()),
        ([1], 2, ((0, 0),)),
        ([0, 3], 8, ((1, 2), (4, 7))),
        ([5], 1_000_000, ((0, 4), (6, 999_999))),
    ],
)
def test_missing_ranks_are_told_as_ranges(ranks, world, missing):
    assert gaps(ranks, world) == missing
