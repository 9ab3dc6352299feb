"""What ranks say of a step, put together, is what one process would have said of the whole."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from synthetic_runs import DETAILS, OPTIMIZER, dense, frame, layer

from gradwatch.wire.codec import compress, encode_record
from gradwatch.wire.frame import Frame, LayerInfo
from gradwatch.wire.histogram import BUCKETS, bucket_of
from gradwatch_server.merge import Part, merge_frames, merge_layers
from gradwatch_server.packing import unpack_histograms

COLUMNS = DETAILS
SHAPES = ((40, 12), (7, 5), (64,))


def layers_of(rank: int, ranks: int, sharded: bool = True) -> list[LayerInfo]:
    return [
        LayerInfo(
            name=f"{place}.weight",
            shape=shape,
            dtype="float32",
            module="Linear",
            role="weight",
            depth=place,
            sharding="(Shard(dim=0),)" if sharded else "",
            held=shards(np.empty(shape), ranks)[rank].size if sharded else None,
        )
        for place, shape in enumerate(SHAPES)
    ]


def shards(whole: NDArray[Any], ranks: int) -> list[NDArray[Any]]:
    """Rows by rank as torch deals them out: equal parts, the last ones shorter or empty."""
    size = -(-len(whole) // ranks)
    return [whole[rank * size : (rank + 1) * size] for rank in range(ranks)]


def measured(gradient: NDArray[Any], weight: NDArray[Any]) -> dict[str, float]:
    """The statistics of one tensor, in float64; NaN for one without elements."""
    if not gradient.size:
        return dict.fromkeys(COLUMNS, math.nan)
    with np.errstate(invalid="ignore"):
        return {
            "norm": float(np.sqrt((gradient**2).sum())),
            "mean_abs": float(np.abs(gradient).mean()),
            "absmax": float(np.abs(gradient).max()),
            "std": float(gradient.std()),
            "zero_fraction": float((gradient == 0).mean()),
            "nonfinite": float((~np.isfinite(gradient)).sum()),
            "weight_norm": float(np.sqrt((weight**2).sum())),
        }


def counts(gradient: NDArray[Any]) -> NDArray[np.uint16]:
    buckets = bucket_of(gradient.astype(np.float32)).ravel()
    return np.bincount(buckets, minlength=BUCKETS).astype("<u2")


def job(
    seed: int, ranks: int, columns: tuple[str, ...] = COLUMNS
) -> tuple[list[Part], dict[str, NDArray[Any]], NDArray[Any]]:
    """Parts of all ranks; the statistics of the whole; its histograms."""
    chance = np.random.default_rng(seed)
    gradients = [
        chance.normal(0, 10.0 ** chance.integers(-6, 3), shape) * (chance.random(shape) > 0.2)
        for shape in SHAPES
    ]
    weights = [chance.normal(0, 1, shape) for shape in SHAPES]
    parts: list[Part] = []
    for rank in range(ranks):
        own = [
            measured(shards(gradient, ranks)[rank], shards(weight, ranks)[rank])
            for gradient, weight in zip(gradients, weights, strict=True)
        ]
        sampled = np.stack([counts(shards(gradient, ranks)[rank]) for gradient in gradients])
        sent = frame(
            5,
            [[values[name] for values in own] for name in columns],
            columns,
            {
                "loss": float(rank),
                "total_norm": math.sqrt(np.nansum([row["norm"] ** 2 for row in own])),
            },
            rank=rank,
            histograms=memoryview(compress(sampled.tobytes())),
        )
        parts.append(Part(sent, layers_of(rank, ranks)))
    rows = [measured(*pair) for pair in zip(gradients, weights, strict=True)]
    whole = {name: np.array([row[name] for row in rows]) for name in columns}
    return parts, whole, np.stack([counts(gradient) for gradient in gradients])


def together(parts: list[Part]) -> Frame:
    return merge_frames(parts, merge_layers([part.layers for part in parts]), 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_shards_together_are_the_whole(seed, ranks):
    parts, whole, histograms = job(seed, ranks)
    merged = together(parts)
    for name in set(COLUMNS) - {"std"}:
        assert np.allclose(merged.row(name), whole[name], rtol=3e-7, atol=0), name
    assert np.array_equal(unpack_histograms(merged), histograms)
    assert merged.scalars["total_norm"] == pytest.approx(
        math.sqrt((whole["norm"] ** 2).sum()), rel=1e-6
    )
    assert merged.scalars["loss"] == (ranks - 1) / 2


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_deviation_is_off_by_less_than_the_largest_mean_of_a_shard(ranks):
    parts, whole, _ = job(1, ranks)
    merged = together(parts).row("std")
    assert merged is not None
    for place in range(len(SHAPES)):
        norms = np.array([part.frame.row("norm")[place] for part in parts], np.float64)
        own = np.array([part.frame.row("std")[place] for part in parts], np.float64)
        held = np.array([part.layers[place].held for part in parts])
        mean = np.sqrt(np.nanmax(norms[held > 0] ** 2 / held[held > 0] - own[held > 0] ** 2))
        assert abs(merged[place] ** 2 - whole["std"][place] ** 2) <= mean**2 * (1 + 1e-5)
    one_rank, whole, _ = job(1, 1)
    assert np.allclose(together(one_rank).row("std"), whole["std"], rtol=1e-6)


def test_the_order_of_arrival_changes_nothing():
    parts, _, _ = job(2, 4)
    layers = merge_layers([part.layers for part in parts])
    merged = {
        encode_record(merge_frames(list(order), layers, 1))
        for order in itertools.permutations(parts)
    }
    assert len(merged) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.randoms())
def test_any_job_in_any_order_is_the_whole(seed, ranks, shuffler):
    parts, whole, _ = job(seed, ranks)
    shuffler.shuffle(parts)
    layers = merge_layers([part.layers for part in sorted(parts, key=lambda p: p.frame.rank)])
    merged = merge_frames(parts, layers, 1)
    for name in ("norm", "absmax", "mean_abs"):
        assert np.allclose(merged.row(name), whole[name], rtol=3e-7, atol=0)


def test_of_gradients_that_all_ranks_have_the_lowest_speaks():
    parts = [
        Part(frame(1, [[rank + 1.0, np.nan if rank == 1 else 5.0], [0, 0]], rank=rank), dense(2))
        for rank in (1, 2, 3)
    ]
    merged = together(parts[::-1])
    assert merged.row("norm").tolist() == [2.0, 5.0]
    assert merged.scalars["rank_disagreement"] == pytest.approx(0.5)


def test_ranks_that_agree_have_no_disagreement():
    parts = [Part(frame(1, [[0.5, 0.25], [0, 0]], rank=rank), dense(2)) for rank in range(3)]
    assert together(parts).scalars["rank_disagreement"] == 0.0


def test_a_nan_of_one_shard_is_one_of_the_whole():
    parts, _, _ = job(3, 3)
    broken = np.array(parts[1].frame.matrix())
    broken[[0, 1, 2, 3], 0] = np.nan
    broken[COLUMNS.index("nonfinite"), 0] = 4
    parts[1] = Part(
        msgspec.structs.replace(parts[1].frame, values=memoryview(broken.tobytes())),
        parts[1].layers,
    )
    merged = together(parts)
    assert math.isnan(merged.row("norm")[0])
    assert np.isfinite(merged.row("norm")[1:]).all()
    assert merged.row("nonfinite").tolist() == [4, 0, 0]


def test_a_rank_that_holds_nothing_of_a_layer_takes_nothing_away():
    parts, whole, _ = job(4, 8)
    assert parts[7].layers[1].held == 0
    assert np.allclose(together(parts).row("norm"), whole["norm"], rtol=3e-7)


def test_what_one_shard_did_not_measure_is_not_told_of_the_whole():
    parts, whole, _ = job(5, 2)
    parts[1] = job(5, 2, ("norm", "nonfinite"))[0][1]
    merged = together(parts)
    assert np.allclose(merged.row("norm"), whole["norm"], rtol=3e-7)
    assert np.isnan(merged.row("mean_abs")).all()


def test_shards_that_are_held_twice_are_counted_once():
    once, whole, _ = job(6, 2)
    replicas = [
        Part(msgspec.structs.replace(part.frame, rank=part.frame.rank + 2), part.layers)
        for part in once
    ]
    merged = together([*once, *replicas])
    assert np.allclose(merged.row("norm"), whole["norm"], rtol=3e-7)


def test_stages_of_a_pipeline_stand_one_behind_the_other():
    stages = [[layer("stem", 0), layer("block", 1)], [layer("tail", 0), layer("head", 1)]]
    parts = [
        Part(frame(1, [[1.0 + rank, 10.0], [0, 0]], rank=rank), stages[rank]) for rank in (0, 1)
    ]
    layers = merge_layers(stages)
    assert [(item.name, item.depth) for item in layers] == [
        ("stem", 0),
        ("block", 1),
        ("tail", 2),
        ("head", 3),
    ]
    assert together(parts).row("norm").tolist() == [1, 10, 2, 10]


def test_a_loss_that_one_rank_lost_is_lost():
    parts = [
        Part(frame(1, [[1], [0]], scalars={"loss": loss}, rank=rank), dense(1))
        for rank, loss in enumerate([1.0, math.nan])
    ]
    assert math.isnan(together(parts).scalars["loss"])


def test_a_step_takes_as_long_as_its_slowest_rank():
    parts = [
        Part(frame(1, [[1], [0]], scalars={"step_time_s": took}, rank=rank), dense(1))
        for rank, took in enumerate([0.1, 0.4])
    ]
    assert together(parts).scalars["step_time_s"] == 0.4


def test_frames_of_scalars_alone_merge_too():
    parts = [
        Part(frame(1, np.empty((0, 0)), (), {"loss": float(rank)}, rank=rank), dense(2))
        for rank in (0, 1)
    ]
    merged = together(parts)
    assert (merged.columns, merged.scalars, merged.optimizer) == ((), {"loss": 0.5}, OPTIMIZER)


def test_counts_beyond_sixteen_bits_are_kept():
    sampled = np.full((1, BUCKETS), 60_000, "<u2")
    parts = [
        Part(
            frame(
                1, [[1.0]], ("norm",), rank=rank, histograms=memoryview(compress(sampled.tobytes()))
            ),
            [msgspec.structs.replace(layer("a", 0), held=2048)],
        )
        for rank in (0, 1)
    ]
    found = unpack_histograms(together(parts))
    assert found is not None
    assert (found == 120_000).all()


def test_nothing_cannot_be_merged():
    with pytest.raises(ValueError, match="no frame"):
        merge_frames([], [], 1)


def compared(rank: int, probes: list[float], **rows: list[float]) -> Part:
    """One rank's part in a comparison, of layers that it holds whole."""
    given = {"norm": [1.0] * len(probes), "nonfinite": [0.0] * len(probes)} | rows
    columns = (*given, "weight_probe")
    return Part(frame(1, [*given.values(), probes], columns, rank=rank), dense(len(probes)))


def test_ranks_that_hold_the_same_weights_are_no_distance_apart():
    merged = together([compared(rank, [0.25, 3.0]) for rank in range(3)])
    assert merged.row("weight_drift").tolist() == [0.0, 0.0]
    assert merged.row("norm_spread").tolist() == [0.0, 0.0]
    assert "weight_probe" not in merged.columns
    assert "rank_apart" not in merged.scalars


def test_the_rank_that_stands_apart_is_named_when_the_others_agree():
    parts = [compared(0, [0.25, 3.0]), compared(1, [0.75, 3.0]), compared(2, [0.25, 3.0])]
    merged = together(parts)
    assert merged.row("weight_drift").tolist() == [0.5, 0.0]
    assert merged.scalars["rank_apart"] == 1
    two = together(parts[:2])
    assert two.row("weight_drift").tolist() == [0.5, 0.0]
    assert "rank_apart" not in two.scalars
    scattered = together([compared(rank, [0.25 * rank, 3.0]) for rank in range(3)])
    assert "rank_apart" not in scattered.scalars


def test_the_only_rank_that_moves_a_layer_is_named_and_the_only_one_that_does_not():
    moving = together(
        [
            compared(0, [0.5, 3], update_ratio=[1e-3, 1e-3]),
            compared(1, [0.25, 3], update_ratio=[0, 1e-3]),
        ]
    )
    assert (moving.scalars["rank_moving"], moving.scalars["rank_still"]) == (0, 1)


def test_a_rank_without_a_gradient_disagrees_wholly():
    merged = together([compared(0, [1.0]), compared(1, [1.0], norm=[np.nan])])
    assert merged.row("norm_spread").tolist() == [1.0]
    apart = together([compared(0, [1.0], norm=[2.0]), compared(1, [1.0], norm=[1.5])])
    assert apart.row("norm_spread").tolist() == [0.25]


def test_shards_and_layers_of_one_name_and_other_sizes_are_not_compared():
    parts, _, _ = job(5, 2)
    sharded = [
        Part(
            msgspec.structs.replace(
                part.frame,
                columns=(*part.frame.columns, "weight_probe"),
                values=memoryview(
                    np.vstack([part.frame.matrix(), [[float(rank)] * len(SHAPES)]])
                    .astype("<f4")
                    .tobytes()
                ),
            ),
            part.layers,
        )
        for rank, part in enumerate(parts)
    ]
    assert np.isnan(together(sharded).row("weight_drift")).all()
    small = Part(compared(1, [2.0]).frame, [msgspec.structs.replace(dense(1)[0], shape=(8, 64))])
    assert np.isnan(together([compared(0, [1.0]), small]).row("weight_drift")).all()


def test_the_slowest_rank_is_told_beside_what_the_others_need_and_wait():
    times = {0: (0.1, 0.4), 1: (0.5, 0.0), 2: (0.2, 0.3)}
    parts = [
        Part(
            frame(1, [[1.0], [0.0]], rank=rank, scalars={"own_time_s": own, "wait_time_s": wait}),
            dense(1),
        )
        for rank, (own, wait) in times.items()
    ]
    told = together(parts).scalars
    assert (told["rank_slowest"], told["rank_slowest_s"]) == (1, 0.5)
    assert told["rank_others_s"] == pytest.approx(0.15)
    assert told["rank_others_wait_s"] == pytest.approx(0.35)
    assert "rank_slowest" not in together(parts[:1]).scalars
