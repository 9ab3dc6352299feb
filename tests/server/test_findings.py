"""Findings open, keep up to date and resolve by the frames alone, whatever their order."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
from synthetic_runs import dense, detail, healthy, manifest, new_run, vanishing

from gradwatch_server import judging
from gradwatch_server.findings import RESOLVE_AFTER_STEPS
from gradwatch_server.windows import WINDOW_FRAMES

LAYERS = 10


def broken_from(first: int, steps: range, layers: int = 4) -> list[Any]:
    """Healthy until a NaN comes from layer 2 and stays in all layers before it."""
    return [
        detail(step, np.full(layers, 0.01), broken=[5, 5, 5, 0] if step >= first else 0.0)
        for step in steps
    ]


def exploding(steps: range) -> list[Any]:
    return [detail(step, 10.0 ** np.arange(LAYERS)[::-1]) for step in steps]


def summary_of(collector: Any, run: Any) -> dict[str, Any]:
    """What a finding says, without when it was said."""
    return {
        kind: (
            item.state,
            item.severity,
            item.layers,
            item.first_step,
            item.last_step,
            item.summary,
            item.evidence,
        )
        for kind, item in collector.findings(run).items()
    }


def test_a_non_finite_gradient_opens_a_finding_before_any_judgement(collector):
    run = new_run()
    collector.store(run, [manifest(dense(4)), *broken_from(7, range(10))])
    finding = collector.findings(run)["non_finite"]
    assert (finding.state, finding.severity) == ("open", "critical")
    assert finding.first_step == 7
    assert finding.layers[0] == "2.weight"


def test_a_loss_that_is_nan_opens_a_finding_before_any_judgement(collector):
    run = new_run()
    lost = detail(3, np.full(4, 0.01), loss=float("nan"))
    collector.store(run, [manifest(dense(4)), *healthy(range(3)), lost])
    assert collector.findings(run)["non_finite"].first_step == 3


def test_it_opens_once_and_raises_one_alert_and_one_wake_up(collector):
    run = new_run()
    collector.store(run, [manifest(dense(4))])
    for frame in broken_from(2, range(10)):
        collector.post(run, [frame])
    collector.judge()
    assert [(alert.change, alert.state) for alert in collector.alerts()] == [("opened", "pending")]
    assert len(collector.wakes) == 1


def test_every_channel_gets_its_own_alert(start_collector):
    collector = start_collector(notify="json://127.0.0.1:9/a json://127.0.0.1:9/b")
    collector.store(run := new_run(), [manifest(dense(4)), *broken_from(2, range(4))])
    collector.judge()
    assert len({alert.channel for alert in collector.alerts()}) == 2
    assert len(collector.alerts()) == 2
    assert collector.findings(run)["non_finite"].state == "open"


@pytest.mark.parametrize(("make", "kind"), [(vanishing, "vanishing"), (exploding, "exploding")])
def test_a_judgement_opens_what_its_detectors_see(collector, make, kind):
    run = new_run()
    collector.store(run, [manifest(dense(LAYERS)), *make(range(60))])
    assert collector.findings(run) == {}
    assert collector.judge()
    assert collector.findings(run)[kind].state == "open"
    assert collector.findings(run)[kind].first_step == 0
    assert collector.client.run(run.id).verdict in ("warning", "critical")


def test_a_healthy_run_is_called_so_once_it_is_judged(collector):
    run = new_run()
    collector.store(run, [manifest(dense(4)), *healthy(range(60))])
    assert (collector.client.run(run.id).verdict, collector.client.run(run.id).judged) == (
        "waiting",
        False,
    )
    assert not collector.judge()
    assert (collector.client.run(run.id).verdict, collector.client.run(run.id).judged) == (
        "healthy",
        True,
    )
    assert collector.findings(run) == {}


def test_only_runs_that_changed_are_judged_again(collector, monkeypatch):
    collector.store(new_run(), [manifest(dense(4)), *healthy(range(20))])
    collector.judge()
    monkeypatch.setattr(judging, "judge", lambda *_: pytest.fail("judged again"))
    collector.judge()


def test_a_finding_resolves_after_clean_steps_and_says_so_once(collector):
    run = new_run()
    collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(60))])
    collector.judge()
    collector.post(run, healthy(range(60, 80), LAYERS))
    collector.judge()
    assert collector.findings(run)["vanishing"].state == "open"
    collector.post(run, healthy(range(80, 80 + 2 * RESOLVE_AFTER_STEPS), LAYERS))
    for _ in range(2):
        collector.judge()
    finding = collector.findings(run)["vanishing"]
    assert finding.state == "resolved"
    assert finding.resolved_at is not None
    assert [alert.change for alert in collector.alerts()] == ["opened", "resolved"]
    assert collector.client.run(run.id).verdict == "healthy"
    assert collector.client.run(run.id).score == 100


def test_one_nan_is_over_after_clean_steps_though_the_window_still_holds_it(collector):
    run = new_run()
    collector.store(run, [manifest(dense(4)), *broken_from(9, range(10))])
    collector.judge()
    collector.post(run, healthy(range(10, 10 + RESOLVE_AFTER_STEPS)))
    assert RESOLVE_AFTER_STEPS + 10 < WINDOW_FRAMES
    for _ in range(2):
        collector.judge()
    assert collector.findings(run)["non_finite"].state == "resolved"
    assert [alert.change for alert in collector.alerts()] == ["opened", "resolved"]


def test_nothing_heals_while_gradients_are_non_finite(collector):
    run = new_run()
    collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(60))])
    collector.judge()
    lost = [detail(step, np.full(LAYERS, np.nan), broken=1.0) for step in range(60, 300)]
    collector.post(run, lost)
    collector.judge()
    states = {kind: item.state for kind, item in collector.findings(run).items()}
    assert states == {"vanishing": "open", "non_finite": "open"}


def test_a_relapse_opens_it_again_with_an_alert_of_its_own(collector):
    run = new_run()
    steps = 2 * RESOLVE_AFTER_STEPS
    collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(60))])
    collector.judge()
    collector.post(run, healthy(range(60, 60 + steps), LAYERS))
    collector.judge()
    collector.post(run, vanishing(range(60 + steps, 60 + 2 * steps)))
    collector.judge()
    assert collector.findings(run)["vanishing"].state == "open"
    assert collector.findings(run)["vanishing"].first_step >= 60 + steps - RESOLVE_AFTER_STEPS
    changes = [(alert.change, alert.occurrence) for alert in collector.alerts()]
    assert changes == [("opened", 1), ("resolved", 1), ("opened", 2)]


def test_the_same_steps_seen_again_are_no_relapse(collector):
    run = new_run()
    batch = [manifest(dense(4)), *broken_from(9, range(10))]
    collector.store(run, batch)
    collector.judge()
    collector.post(run, healthy(range(10, 100)))
    collector.judge()
    collector.post(run, batch)
    collector.judge()
    assert collector.findings(run)["non_finite"].state == "resolved"
    assert len(collector.alerts()) == 2


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_arrival_once_or_twice_gives_the_same_findings(collector, seed):
    def frames() -> list[Any]:
        lost = [detail(step, np.full(LAYERS, np.nan), broken=1.0) for step in range(90, 100)]
        return [*vanishing(range(90)), *lost]

    straight, shuffled = new_run(), new_run()
    collector.store(straight, [manifest(dense(LAYERS)), *frames()])
    collector.judge()

    chance = random.Random(seed)
    arriving = frames() * 2
    chance.shuffle(arriving)
    collector.store(shuffled, [manifest(dense(LAYERS))])
    while arriving:
        size = chance.randint(1, 30)
        collector.post(shuffled, arriving[:size])
        arriving = arriving[size:]
    collector.judge()
    assert summary_of(collector, shuffled) == summary_of(collector, straight)
    assert set(summary_of(collector, straight)) == {"vanishing", "non_finite"}


def test_a_judgement_between_batches_out_of_order_changes_nothing_in_the_end(collector):
    frames = broken_from(30, range(60))
    straight, mixed = new_run(), new_run()
    collector.store(straight, [manifest(dense(4)), *frames])
    collector.judge()
    collector.store(mixed, [manifest(dense(4)), *frames[40:]])
    collector.judge()
    collector.post(mixed, frames[:40])
    collector.judge()
    assert summary_of(collector, mixed) == summary_of(collector, straight)


def test_a_run_that_cannot_be_judged_does_not_keep_others_waiting(collector, monkeypatch):
    runs = [new_run(name=name) for name in ("first", "second")]
    for run in runs:
        collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(60))])
    judge, judged = judging.judge, []

    def fail_once(window: Any, settings: Any) -> Any:
        judged.append(window)
        if len(judged) == 1:
            raise ArithmeticError("a detector's bug")
        return judge(window, settings)

    monkeypatch.setattr(judging, "judge", fail_once)
    assert collector.judge()
    assert sum(bool(collector.findings(run)) for run in runs) == 1


def test_a_worker_that_died_at_a_run_is_replaced_when_its_lease_ends(collector, monkeypatch):
    run = new_run()
    collector.store(run, [manifest(dense(LAYERS)), *vanishing(range(60))])
    monkeypatch.setattr(judging, "LEASE_S", 0.3)
    with monkeypatch.context() as dying:
        dying.setattr(judging, "judge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            collector.judge()
    assert not collector.judge()  # leased
    assert collector.findings(run) == {}
    judging.time.sleep(0.4)
    assert collector.judge()
    assert "vanishing" in collector.findings(run)


def test_ranks_beyond_the_first_are_watched_for_non_finite_values(collector):
    run = new_run(world_size=2)
    lost = msgspec.structs.replace(broken_from(0, range(1))[0], rank=1)
    collector.store(run, [manifest(dense(4)), manifest(dense(4), rank=1), lost])
    assert "non_finite" in collector.findings(run)
