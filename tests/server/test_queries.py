"""What pages are told equals numpy on the frames that were sent."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic_runs import DETAILS, OPTIMIZER, dense, detail, frame, layer, manifest, new_run

from gradwatch.client import CollectorError
from gradwatch.wire.api import ScalarsJson

LAYERS = 6


@pytest.fixture
def norms() -> NDArray[np.float32]:
    """float32[steps, layers], with zeros, subnormal and non-finite values, and gaps."""
    chance = np.random.default_rng(5)
    values = np.exp(chance.normal(0, 6, (103, LAYERS))).astype(np.float32)
    values[7, 2] = np.inf
    values[8, :] = np.nan
    values[9, 0] = 0.0
    values[10, 1] = np.float32(1e-44)
    return values


@pytest.fixture
def run(collector, norms):
    info = new_run()
    broken = ~np.isfinite(norms)
    frames = [
        frame(step * 3, [norms[step], broken[step]], scalars={"loss": 1.0 / (step + 1)})
        for step in range(len(norms))
    ]
    collector.store(info, [manifest(dense(LAYERS)), *frames])
    return info


def folded(values: NDArray[np.float32], columns: int) -> list[NDArray[np.float32]]:
    edges = [index * len(values) // columns for index in range(columns)] + [len(values)]
    return [values[low:high] for low, high in itertools.pairwise(edges)]


def test_a_heatmap_with_a_column_for_each_step_is_the_frames_themselves(collector, run, norms):
    shown = collector.client.heatmap(run.id, OPTIMIZER, columns=200)
    finite = np.where(np.isfinite(norms), norms, np.nan)
    assert np.array_equal(shown.low, finite.T, equal_nan=True)
    assert np.array_equal(shown.high, finite.T, equal_nan=True)
    assert np.array_equal(shown.nonfinite, ~np.isfinite(norms).T)
    assert shown.steps.tolist() == [3 * step for step in range(len(norms))]
    assert shown.layers == [item.name for item in dense(LAYERS)]


@pytest.mark.parametrize("columns", [1, 2, 10, 102, 103])
def test_a_folded_heatmap_keeps_the_smallest_and_the_largest_of_its_steps(
    collector, run, norms, columns
):
    shown = collector.client.heatmap(run.id, OPTIMIZER, columns=columns)
    finite = np.where(np.isfinite(norms), norms, np.nan)
    with np.errstate(all="ignore"):
        low = [np.fmin.reduce(part, axis=0) for part in folded(finite, columns)]
        high = [np.fmax.reduce(part, axis=0) for part in folded(finite, columns)]
    assert np.array_equal(shown.low, np.array(low).T, equal_nan=True)
    assert np.array_equal(shown.high, np.array(high).T, equal_nan=True)
    assert shown.nonfinite.any(axis=1).tolist() == (~np.isfinite(norms)).any(axis=0).tolist()


def test_a_heatmap_of_a_range_holds_that_range_alone(collector, run):
    shown = collector.client.heatmap(run.id, OPTIMIZER, first=30, last=60)
    assert shown.steps.tolist() == list(range(30, 61, 3))


def test_a_heatmap_of_steps_that_nobody_sent_is_empty(collector, run):
    shown = collector.client.heatmap(run.id, OPTIMIZER, first=10_000)
    assert shown.steps.tolist() == []
    assert shown.low.shape == (LAYERS, 0)


@pytest.mark.parametrize("columns", [1, 3, 200])
def test_a_gradient_that_broke_at_a_step_without_the_statistic_is_told(collector, columns):
    info = new_run()
    broken = np.zeros(LAYERS)
    broken[2] = 1
    frames = [
        frame(step, [np.ones(LAYERS), broken if step == 7 else 0 * broken])
        for step in range(20)
        if step % 5
    ]
    details = [detail(step, [0.5] * LAYERS) for step in range(0, 20, 5)]
    collector.store(info, [manifest(dense(LAYERS)), *frames, *details])
    shown = collector.client.heatmap(info.id, OPTIMIZER, "mean_abs", columns=columns)
    told, where = np.nonzero(shown.nonfinite)
    assert told.tolist() == [2]
    first = shown.steps[where[0]]
    assert first <= 7
    assert not np.any((shown.steps > first) & (shown.steps <= 7))
    quiet = collector.client.heatmap(info.id, OPTIMIZER, "mean_abs", layers="0.*", columns=200)
    assert quiet.steps.tolist() == [0, 5, 10, 15]


def test_layers_are_shown_in_the_order_of_the_forward_pass(collector):
    run = new_run()
    layers = [layer("head", 2), layer("stem", 0), layer("body", 1)]
    collector.store(run, [manifest(layers), frame(1, [[3, 1, 2], [0, 0, 0]])])
    shown = collector.client.heatmap(run.id, OPTIMIZER)
    assert shown.layers == ["stem", "body", "head"]
    assert shown.low[:, 0].tolist() == [1, 2, 3]


def test_frames_of_an_older_manifest_are_placed_by_the_names_of_their_layers(collector):
    run = new_run()
    old, new = [layer("a", 0), layer("b", 1)], [layer("b", 0), layer("c", 1), layer("a", 2)]
    collector.store(
        run,
        [
            manifest(old),
            frame(1, [[1, 2], [0, 0]]),
            manifest(new, version=2),
            frame(2, [[20, 30, 10], [0, 0, 0]], manifest=2),
        ],
    )
    shown = collector.client.heatmap(run.id, OPTIMIZER)
    assert shown.layers == ["b", "c", "a"]
    assert np.array_equal(shown.low, [[2, 20], [np.nan, 30], [1, 10]], equal_nan=True)


def test_a_manifest_without_layers_makes_an_empty_picture(collector):
    run = new_run()
    empty = frame(1, np.empty((2, 0)))
    collector.store(run, [manifest([]), empty])
    shown = collector.client.heatmap(run.id, OPTIMIZER)
    assert shown.low.shape == (0, 1)
    assert collector.judge() is False


def test_gradient_flow_is_the_last_detail_frame_up_to_the_step(collector):
    run = new_run()
    rms = {step: np.random.default_rng(step).random(LAYERS) for step in (10, 20)}
    frames = [detail(step, values) for step, values in rms.items()]
    frames.append(frame(30, np.ones((2, LAYERS))))
    collector.store(run, [manifest(dense(LAYERS)), *frames])
    newest = collector.client.flow(run.id, OPTIMIZER)
    assert newest.step == 20
    assert collector.client.flow(run.id, OPTIMIZER, step=19).step == 10
    for row, name in enumerate(DETAILS):
        assert np.array_equal(
            np.array(newest.statistics[name], np.float32), frames[1].matrix()[row]
        )


def test_gradient_flow_tells_a_value_that_is_not_finite_as_null(collector):
    run = new_run()
    collector.store(run, [manifest(dense(2)), detail(1, [np.inf, 0.5], broken=[4, 0])])
    shown = collector.client.flow(run.id, OPTIMIZER)
    assert shown.statistics["norm"] == [None, 32.0]
    assert shown.statistics["nonfinite"] == [4.0, 0.0]


def test_gradient_flow_before_any_detail_frame_is_not_found(collector, run):
    with pytest.raises(CollectorError, match="no detail frame") as caught:
        collector.client.flow(run.id, OPTIMIZER)
    assert caught.value.status == 404


def test_scalars_are_those_of_the_frames_with_gaps_where_none_came(collector):
    run = new_run()
    sent: list[dict[str, float]] = [{"loss": 1.0}, {"lr": 0.1}, {"loss": float("inf")}]
    frames = [
        frame(step, np.empty((0, 0)), (), values) for step, values in enumerate(sent, start=5)
    ]
    collector.store(run, [manifest(dense(2)), *frames])
    shown = collector.client.scalars(run.id, OPTIMIZER)
    assert shown.steps.tolist() == [5, 6, 7]
    assert np.array_equal(shown.series("loss"), [1.0, np.nan, np.inf], equal_nan=True)
    assert np.array_equal(shown.series("lr"), [np.nan, 0.1, np.nan], equal_nan=True)


def test_a_loss_that_is_not_finite_is_told_from_one_that_was_not_logged(collector):
    run = new_run()
    sent: list[dict[str, float]] = [{"loss": 1.0}, {"lr": 0.1}, {"loss": float("nan")}]
    frames = [frame(step, np.empty((0, 0)), (), values) for step, values in enumerate(sent)]
    collector.store(run, [manifest(dense(2)), *frames[:2]])
    shown = collector.client.run(run.id)
    assert (shown.loss, shown.loss_nonfinite) == (1.0, False)

    collector.store(run, [frames[2]])
    shown = collector.client.run(run.id)
    assert (shown.loss, shown.loss_nonfinite) == (None, True)
    scalars = collector.client.scalars(run.id, OPTIMIZER)
    assert scalars.broken("loss").tolist() == [False, False, True]
    assert not scalars.broken("lr").any()


@pytest.mark.parametrize("columns", [1, 7, 102, 103])
def test_folded_scalars_keep_the_last_and_what_lies_between_lowest_and_highest(collector, columns):
    run, size = new_run(), 103
    losses = np.random.default_rng(6).normal(1, 0.3, size)
    losses[[3, 50, 51]] = np.nan, np.inf, np.nan
    frames = [
        frame(step * 3, np.empty((0, 0)), (), {"loss": loss})
        for step, loss in enumerate(losses.tolist())
    ]
    collector.store(run, [manifest(dense(2)), *frames])
    shown = collector.client.scalars(run.id, OPTIMIZER, columns=columns)
    edges = [place * size // columns for place in range(columns)] + [size]
    groups = [losses[low:high] for low, high in itertools.pairwise(edges)]
    finite = [group[np.isfinite(group)] for group in groups]
    assert shown.steps.tolist() == [3 * (edge - 1) for edge in edges[1:]]
    assert np.array_equal(shown.series("loss"), [group[-1] for group in groups], equal_nan=True)
    assert shown.broken("loss").tolist() == [
        len(left) < len(group) for left, group in zip(finite, groups, strict=True)
    ]
    for told, of in ((shown.low, np.min), (shown.mean, np.mean), (shown.high, np.max)):
        known = [of(left) if len(left) else np.nan for left in finite]
        assert np.allclose(told("loss"), known, rtol=1e-12, atol=0, equal_nan=True)
    with pytest.raises(KeyError):
        shown.mean("lr")


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda client, run: client.heatmap(run, "Adam"), "'Adam'"),
        (lambda client, run: client.heatmap(run, OPTIMIZER, "loudness"), "'loudness'"),
        (lambda client, run: client.scalars("0" * 32, OPTIMIZER), "0" * 32),
    ],
)
def test_what_does_not_exist_is_named(collector, run, ask, named):
    with pytest.raises(CollectorError, match=named) as caught:
        ask(collector.client, run.id)
    assert caught.value.status == 404


def test_people_read_the_same_as_json(collector, run):
    path = f"/api/v1/runs/{run.id}/scalars?optimizer={OPTIMIZER}"
    answer = collector.get(path)
    assert answer.headers["Content-Type"] == "application/json"
    told = msgspec.json.decode(answer.body, type=ScalarsJson)
    read = collector.client.scalars(run.id, OPTIMIZER)
    assert told.steps == read.steps.tolist()
    assert told.series == {name: read.series(name).tolist() for name in read.series_bytes}
    assert told.high == {name: read.high(name).tolist() for name in read.series_bytes}
