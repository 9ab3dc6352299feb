"""Which layer is ill, as the API tells it: the layers with their health and their last norm."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from synthetic_runs import OPTIMIZER, dense, frame, healthy, layer, manifest, new_run, vanishing

from gradwatch.client import CollectorError
from gradwatch.health.finding import Severity
from gradwatch.health.score import LAYER_DEFINITION, WEIGHTS
from gradwatch.wire.api import LayersView

LAYERS = 10


def test_the_layers_that_a_finding_names_lose_their_share_and_no_others(collector):
    run = new_run()
    collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(60))])
    collector.judge()
    told = collector.client.layers(run.id, OPTIMIZER)
    (finding,) = collector.findings(run).values()
    expected = 100 * (1 - WEIGHTS[Severity(finding.severity)])
    assert 0 < len(finding.layers) < LAYERS
    for item in told.layers:
        named = item.name in finding.layers
        assert item.score == pytest.approx(expected if named else 100)
        assert item.findings == ([finding.kind] if named else [])
    assert told.definition == LAYER_DEFINITION
    assert collector.client.run(run.id).score == pytest.approx(expected)


def test_layers_stand_in_order_of_depth_with_the_norms_of_the_last_step(collector):
    run = new_run()
    layers = [layer("late", 2), layer("early", 0), layer("middle", 1)]
    frames = [
        frame(step, [[step, np.nan, np.inf], [0, 0, 3]], scalars={"loss": 1.0}) for step in (1, 7)
    ]
    # What holds a loss alone says nothing of norms.
    frames.append(frame(9, np.empty((0, 3)), (), {"loss": 1.0}))
    collector.store(run, [manifest(layers), *frames])
    told = collector.client.layers(run.id, OPTIMIZER)
    assert told.step == 7
    assert [(item.name, item.norm) for item in told.layers] == [
        ("early", None),
        ("middle", None),
        ("late", 7.0),
    ]


def test_nothing_is_said_of_health_before_the_first_judgement(collector):
    run = new_run()
    collector.store(run, [manifest(dense(4)), *healthy(range(60))])
    assert {item.score for item in collector.client.layers(run.id, OPTIMIZER).layers} == {None}
    collector.judge()
    assert {item.score for item in collector.client.layers(run.id, OPTIMIZER).layers} == {100.0}


def test_a_run_without_a_frame_has_layers_already(collector):
    run = new_run()
    collector.store(run, [manifest(dense(2))])
    told = collector.client.layers(run.id, OPTIMIZER)
    assert told.step is None
    assert [item.norm for item in told.layers] == [None, None]


def test_what_is_muted_or_over_no_longer_counts(collector):
    run = new_run()
    collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(60))])
    collector.judge()
    path = f"/api/v1/runs/{run.id}/layers?optimizer={OPTIMIZER}"
    before = collector.get(path)
    (finding,) = collector.findings(run).values()
    collector.client.change_finding(finding.id, muted=True)
    # People change findings while no frame comes, so what a client has kept is not the newest.
    after = collector.get(path, **{"If-None-Match": before.headers["ETag"]})
    assert after.status == 200
    shown = msgspec.json.decode(after.body, type=LayersView)
    assert {item.score for item in shown.layers} == {100.0}
    assert collector.get(path, **{"If-None-Match": after.headers["ETag"]}).status == 304


def test_a_layer_with_nan_is_as_ill_as_its_run(collector):
    run = new_run()
    broken = [frame(step, [[np.nan] * 4, [5] * 4]) for step in range(60, 70)]
    collector.store(run, [manifest(dense(4)), *healthy(range(60)), *broken])
    collector.judge()
    for item in collector.client.layers(run.id, OPTIMIZER).layers:
        assert item.findings == ["non_finite"]
        assert item.score == pytest.approx(100 * (1 - WEIGHTS[Severity.CRITICAL]))


def test_an_optimizer_that_is_not_there_is_not_found(collector):
    run = new_run()
    collector.store(run, [manifest(dense(2))])
    with pytest.raises(CollectorError, match="no optimizer 'Adam'") as caught:
        collector.client.layers(run.id, "Adam")
    assert caught.value.status == 404
