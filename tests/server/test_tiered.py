"""Whatever tier a range is read from, the answer is numpy's on the frames that were sent."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update
from synthetic_runs import OPTIMIZER, dense, layer, manifest, new_run
from test_retention import AT_ONCE, free, store
from test_tiers import LAYERS, expected, fold_all, some_frames

from gradwatch.client import CollectorError
from gradwatch.wire.frame import Frame, RunInfo
from gradwatch.wire.histogram import BUCKETS
from gradwatch_server import tiered
from gradwatch_server.database import writing
from gradwatch_server.models import StretchDue
from gradwatch_server.packing import unpack_histograms
from gradwatch_server.retention import Keep

# Wide apart, so that some thousand frames reach the third tier.
APART = 61
STEPS = range(0, 150_000, APART)
QUERIES = 7


def within(frames: Sequence[Frame], first: int | None, last: int | None) -> list[Frame]:
    low, high = first if first is not None else 0, last if last is not None else 2**60
    return [item for item in frames if low <= item.step <= high]


def check_heatmap(
    collector: Any, run: RunInfo, frames: Sequence[Frame], statistic: str, span: tiered.Span
) -> None:
    """Every column against numpy on the frames from its first step to the next column's."""
    first, last, columns = span
    shown = collector.client.heatmap(
        run.id, OPTIMIZER, statistic, first=first, last=last, columns=columns
    )
    own = [item for item in within(frames, first, last) if statistic in item.columns]
    assert len(shown.steps) <= columns
    if statistic == "norm":
        assert 2 * len(shown.steps) >= min(columns, len(own))
    steps = [item.step for item in own]
    starts = np.searchsorted(steps, shown.steps).tolist()
    assert starts[:1] == [0] * bool(own)
    for column, (start, end) in enumerate(itertools.pairwise([*starts, len(own)])):
        group = own[start:end]
        if not group:
            # Nothing was measured here, but that something was not finite.
            assert shown.nonfinite[:, column].any()
            assert np.isnan([shown.low[:, column], shown.high[:, column]]).all()
            continue
        if statistic == "norm":
            assert group[0].step == shown.steps[column]
        low, mean, high, _ = expected(group, statistic)
        assert np.array_equal(shown.low[:, column], low.astype("f4"), equal_nan=True)
        assert np.array_equal(shown.high[:, column], high.astype("f4"), equal_nan=True)
        assert np.allclose(shown.mean[:, column], mean, rtol=1e-5, equal_nan=True)
    if statistic == "norm":
        broken = np.array([item.row("nonfinite") for item in own]).reshape(-1, LAYERS) > 0
        told = np.logical_or.reduceat(broken, starts, axis=0) if own else broken
        assert np.array_equal(shown.nonfinite, told.T)


def check_scalars(collector: Any, run: RunInfo, frames: Sequence[Frame], span: tiered.Span) -> None:
    """Real steps in order, the last one among them, with the last value logged until then."""
    first, last, columns = span
    shown = collector.client.scalars(run.id, OPTIMIZER, columns=columns, first=first, last=last)
    own = within(frames, first, last)
    assert min(columns, len(own)) / 2 <= len(shown.steps) <= columns
    steps = [item.step for item in own]
    assert set(shown.steps.tolist()) <= set(steps)
    assert not own or shown.steps[-1] == steps[-1]
    rates = {item.step: item.scalars["lr"] for item in own}
    if own:
        assert shown.series("lr").tolist() == [rates[step] for step in shown.steps.tolist()]


def check_histograms(
    collector: Any, run: RunInfo, frames: Sequence[Frame], span: tiered.Span
) -> None:
    first, last, columns = span
    shown = collector.client.histograms(
        run.id, OPTIMIZER, "1.weight", first=first, last=last, columns=columns
    )
    own = [item for item in within(frames, first, last) if item.histograms is not None]
    assert len(shown.steps) <= columns
    place = np.searchsorted(shown.steps, [item.step for item in own], side="right") - 1
    sums = np.zeros((len(shown.steps), BUCKETS), dtype=np.uint64)
    for item, at in zip(own, place, strict=True):
        counts = unpack_histograms(item)
        assert counts is not None
        sums[max(0, at)] += counts[1]
    assert np.array_equal(shown.counts, sums)


def check_anything(collector: Any, run: RunInfo, frames: Sequence[Frame], seed: int) -> None:
    chance = random.Random(seed)
    spans = [tiered.Span(None, None, columns) for columns in (1, 300)]
    for _ in range(QUERIES):
        low, high = sorted(chance.choices(range(-100, STEPS.stop + 1000), k=2))
        first = chance.choice([None, max(0, low), max(0, low) // 256 * 256])
        last = chance.choice([None, max(0, high), max(0, high) // 4096 * 4096 + 4095])
        if first is None or last is None or first <= last:
            spans.append(tiered.Span(first, last, chance.choice([1, 3, 10, 30, 100])))
    for number, span in enumerate(spans):
        check_heatmap(collector, run, frames, "norm", span)
        if number % 4 == 0:
            check_heatmap(collector, run, frames, "std", span)
            check_scalars(collector, run, frames, span)
            check_histograms(collector, run, frames, span._replace(columns=span.columns // 4 + 1))


@pytest.fixture
def tiers_read(monkeypatch) -> set[int]:
    """The tiers that were chosen."""
    chosen: set[int] = set()
    real = tiered._tier_of  # pyright: ignore[reportPrivateUsage]

    def noting(*given: Any) -> int:
        chosen.add(real(*given))
        return real(*given)

    monkeypatch.setattr(tiered, "_tier_of", noting)
    return chosen


@pytest.mark.slow
def test_any_range_is_that_of_the_frames_before_while_and_after_they_are_folded(
    collector, tiers_read
):
    run, frames = new_run(), some_frames(STEPS)
    late = [item for item in frames if item.step % 1000 < 2 * APART]
    store(collector, run, [item for item in frames if item not in late])
    check_anything(collector, run, [item for item in frames if item not in late], 1)
    assert tiers_read == {0}
    fold_all(collector.engine)
    check_anything(collector, run, [item for item in frames if item not in late], 2)
    assert tiers_read == {0, 1, 2, 3}, tiers_read
    # Frames that have come and are not folded in yet.
    store(collector, run, late)
    check_anything(collector, run, frames, 3)
    # Some are, and their parents are not.
    with writing(collector.engine) as session:
        session.execute(
            update(StretchDue).where(StretchDue.start > 50_000).values(leased_until=9e9)
        )
    fold_all(collector.engine)
    check_anything(collector, run, frames, 4)


def test_what_was_folded_answers_for_frames_that_are_gone(collector):
    run, frames = new_run(), some_frames(range(5000))
    store(collector, run, frames)
    fold_all(collector.engine)
    free(collector, Keep(frames_days=AT_ONCE))
    for span in (
        tiered.Span(None, None, 10),
        tiered.Span(None, None, 300),
        tiered.Span(None, None, 20),
        tiered.Span(512, None, 100),
        tiered.Span(1600, 3199, 50),
        tiered.Span(160, 319, 10),
        tiered.Span(480, 639, 10),
    ):
        check_heatmap(collector, run, frames, "norm", span)
    # Steps of which only a column is left: the column that holds them.
    shown = collector.client.heatmap(run.id, OPTIMIZER, first=1605, last=1606, columns=100)
    assert shown.steps.tolist() == [1600]
    low, _, high, _ = expected(frames[1600:1616], "norm")
    assert np.array_equal(shown.low[:, 0], low.astype("f4"))
    assert np.array_equal(shown.high[:, 0], high.astype("f4"))
    check_histograms(collector, run, frames, tiered.Span(None, None, 5))
    with pytest.raises(CollectorError, match="not kept"):
        collector.client.flow(run.id, OPTIMIZER, step=1000)


def test_histograms_that_are_gone_are_answered_from_their_sums(collector):
    run, frames = new_run(), some_frames(range(3000))
    store(collector, run, frames)
    fold_all(collector.engine)
    free(collector, Keep(histograms_days=AT_ONCE))
    check_histograms(collector, run, frames, tiered.Span(None, None, 400))
    check_histograms(collector, run, frames, tiered.Span(256, 1279, 3))
    check_heatmap(collector, run, frames, "norm", tiered.Span(None, None, 2000))


def test_folded_layers_are_placed_by_name_in_the_newest_manifest(collector):
    run = new_run()
    old = some_frames(range(600))
    changed = [layer("2.weight", 0), layer("new", 1), layer("0.weight", 2)]
    new = some_frames(range(600, 1200), seed=2, manifest=2)
    store(collector, run, old)
    collector.store(run, [manifest(changed, version=2), *new])
    fold_all(collector.engine)
    shown = collector.client.heatmap(run.id, OPTIMIZER, columns=10)
    assert shown.layers == ["2.weight", "new", "0.weight"]
    names = {1: [item.name for item in dense(LAYERS)], 2: shown.layers}
    for row, name in enumerate(shown.layers):
        values: list[float] = []
        for item in [*old, *new]:
            norms = item.row("norm")
            assert norms is not None
            if name in names[item.manifest]:
                values.append(norms[names[item.manifest].index(name)])
        finite = np.array(values)[np.isfinite(values)]
        assert np.nanmin(shown.low[row]) == finite.min()
        assert np.nanmax(shown.high[row]) == finite.max()
