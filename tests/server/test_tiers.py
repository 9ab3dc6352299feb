"""Tiers say of many steps what numpy says of their frames, whoever folds them and when."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sqlalchemy import select, update
from sqlalchemy.orm import Session
from synthetic_runs import DETAILS, NORMS, OPTIMIZER, dense, frame, manifest, new_run

from gradwatch.wire.codec import compress
from gradwatch.wire.frame import Frame
from gradwatch.wire.histogram import BUCKETS
from gradwatch_server import folding, tiers
from gradwatch_server.database import migrate, writing
from gradwatch_server.models import Optimizer, Stretch, StretchDue
from gradwatch_server.queries import find_optimizer

LAYERS = 3
NAMES = {1: [item.name for item in dense(LAYERS)]}
SPAN = tiers.stretch_steps(1)
LONG_S = 60.0


def some_frames(steps: Sequence[int], seed: int = 1, **given: Any) -> list[Frame]:
    """Frames with details, histograms, gaps and non-finite values here and there."""
    chance = np.random.default_rng(seed)
    frames: list[Frame] = []
    for step in steps:
        columns = DETAILS if step % 5 == 0 else NORMS
        values = np.exp(chance.normal(0, 3, (len(columns), LAYERS))).astype(np.float32)
        broken = chance.random(LAYERS) < 0.05
        values[columns.index("nonfinite")] = broken * chance.integers(1, 5, LAYERS)
        values[0, broken] = np.inf
        values[0, chance.random(LAYERS) < 0.05] = np.nan
        counts = chance.integers(0, 1000, (LAYERS, BUCKETS)).astype("<u2")
        scalars = {"lr": 0.1 / (step + 1)}
        if step % 3 == 0:
            scalars["loss"] = np.nan if step % 21 == 0 else float(chance.normal())
        histograms = memoryview(compress(counts.tobytes())) if step % 5 == 0 else None
        frames.append(frame(step, values, columns, scalars, histograms=histograms, **given))
    return frames


def expected(frames: Sequence[Frame], statistic: str) -> tuple[NDArray[Any], ...]:
    """Smallest, mean, largest and number of finite values in numpy. Each [layers]."""
    rows = [row for item in frames if (row := item.row(statistic)) is not None]
    values = np.array(rows, dtype=np.float64).reshape(-1, LAYERS)
    values[~np.isfinite(values)] = np.nan
    finite = (~np.isnan(values)).sum(axis=0)
    with np.errstate(all="ignore"):
        if statistic in ("norm", "weight_norm"):
            mean = np.sqrt(np.nansum(values**2, axis=0) / finite)
        else:
            mean = np.nansum(values, axis=0) / finite
        low, high = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)
    return low, mean, high, finite


def check(columns: tiers.Columns, frames: Sequence[Frame], tier: int) -> None:
    """Columns of one stretch or more against the frames that they were folded from."""
    groups: dict[int, list[Frame]] = {}
    for item in sorted(frames, key=lambda item: item.step):
        groups.setdefault(item.step // tiers.column_steps(tier), []).append(item)
    assert columns.first.tolist() == [group[0].step for group in groups.values()]
    assert columns.last.tolist() == [group[-1].step for group in groups.values()]
    for name in {name for item in frames for name in item.columns}:
        fold = columns.statistics[name]
        mean = fold.mean(tiers.by_squares(name))
        for place, group in enumerate(groups.values()):
            if not any(name in item.columns for item in group):
                assert not fold.finite[place].any()
                continue
            low, middle, high, finite = expected(group, name)
            assert np.array_equal(fold.low[place], low.astype("f4"), equal_nan=True)
            assert np.array_equal(fold.high[place], high.astype("f4"), equal_nan=True)
            assert np.array_equal(fold.finite[place], finite)
            assert np.allclose(mean[place], middle, rtol=1e-6, atol=0, equal_nan=True)
            if name == "nonfinite":
                assert fold.total[place].tolist() == (middle * finite).round().tolist()
    for name in {name for item in frames for name in item.scalars}:
        course = columns.scalars[name]
        for place, group in enumerate(groups.values()):
            told = [item.scalars[name] for item in group if name in item.scalars]
            good = [value for value in told if np.isfinite(value)]
            assert course.logged[place] == len(told)
            assert course.fold.finite[place] == len(good)
            if told:
                assert np.array_equal(course.newest[place], told[-1], equal_nan=True)
            if good:
                assert (course.fold.low[place], course.fold.high[place]) == (min(good), max(good))
                assert course.fold.total[place] == pytest.approx(sum(good), abs=1e-9)


steps_of_any_kind = st.sets(st.integers(0, 3 * SPAN), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(steps_of_any_kind, st.integers(0, 100), st.sampled_from([1, 2]))
def test_a_fold_says_what_numpy_says_of_the_frames(steps, seed, tier):
    frames = some_frames(sorted(steps), seed)
    columns = tiers.fold_frames(frames, NAMES, 1, tier)
    check(columns, frames, tier)
    check(tiers.unpack_columns(tiers.pack_columns(columns)), frames, tier)


@settings(max_examples=40, deadline=None)
@given(steps_of_any_kind, st.integers(0, 100), st.randoms())
def test_folding_in_parts_and_in_any_order_is_folding_at_once(steps, seed, chance):
    frames = some_frames(sorted(steps), seed)
    halves: tuple[list[Frame], list[Frame]] = ([], [])
    for item in frames:
        halves[chance.randrange(2)].append(item)
    parts = [(tiers.fold_frames(half, NAMES, 1), 1) for half in halves if half]
    chance.shuffle(parts)
    check(tiers.fold_columns(parts, NAMES, 1, 2), frames, 2)


def test_layers_are_placed_by_name_when_the_manifest_changed():
    names = {1: ["a", "b"], 2: ["b", "c", "a"]}
    old = frame(1, [[1, 2], [0, 3]])
    new = frame(2, [[20, 30, 10], [0, 0, 1]], manifest=2)
    columns = tiers.fold_frames([old, new], names, 2)
    assert columns.statistics["norm"].low.tolist() == [[2, 30, 1]]
    assert columns.statistics["norm"].finite.tolist() == [[2, 1, 2]]
    assert columns.statistics["nonfinite"].total.tolist() == [[3, 0, 1]]


def test_histograms_add_beyond_what_32_bits_hold():
    many = np.full((LAYERS, BUCKETS), 2**32 - 1, dtype=np.uint64)
    added = tiers.add_counts([(many, 1), (many, 1)], NAMES, 1)
    assert added is not None
    assert np.array_equal(tiers.unpack_counts(tiers.pack_counts(added), LAYERS), 2 * many)


def fold_all(engine: Any) -> None:
    while folding.fold_due(engine, LONG_S):
        pass


def stored(collector: Any, run: Any, tier: int) -> Mapping[int, Stretch]:
    with Session(collector.engine) as session:
        optimizer = find_optimizer(session, run.id, OPTIMIZER)
        rows = session.scalars(
            select(Stretch).where(Stretch.optimizer_id == optimizer.id, Stretch.tier == tier)
        )
        return {row.start: row for row in rows}


def check_stored(collector: Any, run: Any, frames: Sequence[Frame], tier: int) -> None:
    """Every stretch of a tier that is over is there, once, and right."""
    span = tiers.stretch_steps(tier)
    newest = max(item.step for item in frames)
    over = {item.step // span * span for item in frames}
    rows = stored(collector, run, tier)
    assert set(rows) == {start for start in over if start + span <= newest}
    for start, row in rows.items():
        own = [item for item in frames if start <= item.step < start + span]
        check(tiers.unpack_columns(row.body), own, tier)
        told = [tiers.add_histograms([item], NAMES, 1) for item in own]
        sums = [counts for counts in told if counts is not None]
        if sums:
            assert row.histograms is not None
            assert np.array_equal(tiers.unpack_counts(row.histograms, LAYERS), sum(sums))
        else:
            assert row.histograms is None


def test_stretches_that_are_over_are_folded_and_the_newest_is_left(collector):
    run, frames = new_run(), some_frames(range(0, 5000, 3))
    collector.store(run, [manifest(dense(LAYERS))])
    for place in range(0, len(frames), 200):
        collector.store(run, frames[place : place + 200])
    fold_all(collector.engine)
    check_stored(collector, run, frames, 1)
    check_stored(collector, run, frames, 2)
    assert not folding.fold_due(collector.engine, LONG_S)


def test_late_frames_fold_their_stretch_again_and_those_above_it(collector):
    run, frames = new_run(), some_frames(range(0, 4500, 2))
    late = [item for item in frames if 300 < item.step < 340]
    collector.store(run, [manifest(dense(LAYERS)), *(i for i in frames if i not in late)])
    fold_all(collector.engine)
    folded_at = {start: row.folded_at for start, row in stored(collector, run, 1).items()}
    collector.store(run, late)
    fold_all(collector.engine)
    check_stored(collector, run, frames, 1)
    check_stored(collector, run, frames, 2)
    again = {start: row.folded_at for start, row in stored(collector, run, 1).items()}
    assert {start for start in again if again[start] != folded_at[start]} == {256}


def test_frames_that_come_while_their_stretch_is_folded_are_not_lost(collector, monkeypatch):
    run, frames = new_run(), some_frames(range(600))
    collector.store(run, [manifest(dense(LAYERS)), *frames[:100], *frames[101:]])
    real = folding.add_histograms

    def slow(*given: Any) -> Any:
        monkeypatch.setattr(folding, "add_histograms", real)
        collector.store(run, [frames[100]])
        return real(*given)

    monkeypatch.setattr(folding, "add_histograms", slow)
    fold_all(collector.engine)
    check_stored(collector, run, frames, 1)


def test_several_workers_fold_each_stretch_once(collector):
    run, frames = new_run(), some_frames(range(0, 9000, 4))
    collector.store(run, [manifest(dense(LAYERS)), *frames])
    with ThreadPoolExecutor(4) as workers:
        for done in [workers.submit(fold_all, collector.engine) for _ in range(4)]:
            done.result()
    fold_all(collector.engine)
    check_stored(collector, run, frames, 1)
    check_stored(collector, run, frames, 2)


def test_what_a_killed_worker_had_claimed_is_folded_when_its_lease_ends(collector):
    run, frames = new_run(), some_frames(range(300))
    collector.store(run, [manifest(dense(LAYERS)), *frames])
    claim = folding._claim(collector.engine)  # pyright: ignore[reportPrivateUsage]
    assert claim is not None
    fold_all(collector.engine)
    assert not stored(collector, run, 1)
    with writing(collector.engine) as session:
        session.execute(update(StretchDue).values(leased_until=0.0))
    fold_all(collector.engine)
    check_stored(collector, run, frames, 1)


def test_a_stretch_that_cannot_be_folded_does_not_keep_others_waiting(collector, monkeypatch):
    bad, good = new_run(), new_run()
    frames = some_frames(range(300))
    for run in (bad, good):
        collector.store(run, [manifest(dense(LAYERS)), *frames])
    real = folding.layer_names

    def failing(session: Any, optimizer: Optimizer) -> Any:
        if optimizer.run_id == find_optimizer(session, bad.id, OPTIMIZER).run_id:
            raise RuntimeError("no such layers")
        return real(session, optimizer)

    monkeypatch.setattr(folding, "layer_names", failing)
    fold_all(collector.engine)
    assert not stored(collector, bad, 1)
    check_stored(collector, good, frames, 1)


def test_ranks_are_folded_merged(collector):
    run = new_run(world_size=2)
    frames = some_frames(range(300))
    collector.store(run, [manifest(dense(LAYERS)), manifest(dense(LAYERS), rank=1)])
    shuffled = [*frames, *some_frames(range(300), rank=1)]
    random.Random(3).shuffle(shuffled)
    collector.store(run, shuffled)
    fold_all(collector.engine)
    columns = tiers.unpack_columns(stored(collector, run, 1)[0].body)
    fold, (low, _, high, finite) = columns.statistics["norm"], expected(frames[:256], "norm")
    assert np.array_equal(np.fmin.reduce(fold.low), low.astype("f4"))
    assert np.array_equal(np.fmax.reduce(fold.high), high.astype("f4"))
    assert fold.finite.sum(axis=0).tolist() == finite.tolist()


def test_what_was_stored_before_there_were_tiers_is_folded_after_the_upgrade(start_collector):
    collector = start_collector()
    run, frames = new_run(), some_frames(range(0, 1200, 2))
    collector.store(run, [manifest(dense(LAYERS)), *frames])
    fold_all(collector.engine)
    migrate(collector.engine, "0005")
    migrate(collector.engine)
    assert not stored(collector, run, 1)
    fold_all(collector.engine)
    check_stored(collector, run, frames, 1)
