"""Where a NaN began, and the steps before it: told with the finding, whichever comes first."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import msgspec
import numpy as np
import pytest
from synthetic_runs import OPTIMIZER, dense, detail, healthy, manifest, new_run

from gradwatch.wire.frame import Flight, Operand, Origin, Record
from gradwatch_server.alerts import deliver_due

LOST = detail(7, np.full(4, 0.01), broken=[3, 0, 2, 0], loss=float("nan"))


def origin(**given: Any) -> Origin:
    facts: dict[str, Any] = {
        "optimizer": OPTIMIZER,
        "rank": 0,
        "step": 8,
        "kind": "operation",
        "operation": "log",
        "module": "head.2",
        "module_class": "LogSoftmax",
        "source": "train.py:41 in loss_of",
        "operands": (Operand(shape=(64, 10), dtype="float32", low=-0.25, high=0.5),),
        "replayed": True,
    }
    return Origin(**(facts | given))


def flight(**given: Any) -> Flight:
    """Steps 3 to 6 of four layers, of which the third has the largest and a growing norm."""
    columns = ("norm", "absmax")
    values = np.full((4, 2, 4), 0.5, dtype="<f4")
    values[:, 0, 2] = [1.0, 10.0, 100.0, 1000.0]
    facts: dict[str, Any] = {
        "optimizer": OPTIMIZER,
        "rank": 0,
        "manifest": 1,
        "step": 7,
        "steps": (3, 4, 5, 6),
        "columns": columns,
        "values": memoryview(values.tobytes()),
        "scalars": {"loss": (2.0, 2.5, float("nan"), 30.0)},
    }
    return Flight(**(facts | given))


BEGAN = "log in head.2 (LogSoftmax) at train.py:41 in loss_of"


def test_the_finding_names_operation_module_line_and_the_range_of_inputs(collector):
    run = new_run()
    collector.store(run, [manifest(dense(4)), *healthy(range(7)), LOST, origin()])
    finding = collector.findings(run)["non_finite"]
    assert finding.summary.endswith(f" It began in {BEGAN}.")
    assert finding.evidence["began in"] == BEGAN
    assert finding.evidence["its input"] == "-0.25 to 0.5, float32[64, 10]"
    assert finding.evidence["found by tracing step"].startswith("8, computed again")
    assert "began on rank" not in finding.evidence


def test_the_order_of_arrival_changes_nothing(collector):
    found = []
    for order in permutations([[LOST], [origin()], [origin()], [flight()]]):
        run = new_run()
        collector.store(run, [manifest(dense(4)), *healthy(range(7))])
        for records in order:
            assert collector.post(run, records).status == 200
            collector.judge()
        finding = collector.findings(run)["non_finite"]
        found.append((finding.summary, finding.evidence))
    assert all(told == found[0] for told in found)
    assert BEGAN in found[0][0]
    assert found[0][1]["steps recorded before"] == "4, from 3 to 6"


def test_the_finding_shows_what_was_recorded_of_the_steps_before(collector):
    run = new_run()
    collector.store(run, [manifest(dense(4)), *healthy(range(7)), LOST, flight()])
    evidence = collector.findings(run)["non_finite"].evidence
    assert evidence["steps recorded before"] == "4, from 3 to 6"
    assert evidence["loss before"] == "2 at first, 30 at last"
    assert evidence["largest norm just before"] == "1000 in 2.weight, 1 at first"


def test_of_several_ranks_flights_the_earliest_is_shown(collector):
    run = new_run(world_size=2)
    manifests = [manifest(dense(4)), manifest(dense(4), rank=1)]
    later = flight(step=8, rank=1, steps=(4, 5, 6, 7))
    collector.store(run, [*manifests, LOST, later, flight()])
    evidence = collector.findings(run)["non_finite"].evidence
    assert evidence["steps recorded before"] == "4, from 3 to 6"


def test_a_later_judgement_keeps_it(collector):
    run = new_run()
    collector.store(run, [manifest(dense(4)), *healthy(range(7)), LOST, origin()])
    for step in range(8, 12):
        collector.post(run, [detail(step, np.full(4, 0.01), broken=[9, 9, 9, 9])])
        collector.judge()
    assert BEGAN in collector.findings(run)["non_finite"].summary


def test_of_several_ranks_the_one_that_saw_it_arise_is_believed(collector):
    run = new_run(world_size=2)
    manifests = [manifest(dense(4)), manifest(dense(4), rank=1)]
    lost = [LOST, msgspec.structs.replace(LOST, rank=1)]
    nothing = origin(kind="nothing", operation="", operands=(), rank=0)
    collector.store(run, [*manifests, *lost, nothing, origin(rank=1)])
    finding = collector.findings(run)["non_finite"]
    assert finding.evidence["began on rank"] == 1
    assert BEGAN in finding.summary


def test_that_nothing_was_found_is_evidence_but_no_news(collector):
    run = new_run()
    told = origin(kind="nothing", operation="", operands=(), note="the batch, perhaps")
    collector.store(run, [manifest(dense(4)), *healthy(range(7)), LOST, told])
    finding = collector.findings(run)["non_finite"]
    assert finding.evidence["note"] == "the batch, perhaps"
    assert "It began in" not in finding.summary


@pytest.mark.parametrize("told_before", [True, False])
def test_who_was_told_without_it_is_told_again_once(start_collector, webhook, told_before):
    collector = start_collector(notify=webhook.url)
    run = new_run(name="resnet", project="vision")
    collector.store(run, [manifest(dense(4)), *healthy(range(7)), LOST])
    if told_before:
        assert deliver_due(collector.engine, [webhook.url], "", local=True) == 1
    collector.post(run, [origin()])
    collector.post(run, [origin(rank=1, step=9)])
    assert deliver_due(collector.engine, [webhook.url], "", local=True) == 1
    assert deliver_due(collector.engine, [webhook.url], "", local=True) == 0
    assert f"began in: {BEGAN}" in webhook.received[-1]["message"]
    titles = ["[critical] Non-finite values in resnet (vision)"]
    if told_before:
        titles.append("[critical] Non-finite values: its origin in resnet (vision)")
    assert [message["title"] for message in webhook.received] == titles


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (origin(optimizer="Adam"), "optimizer: no manifest"),
        (origin(source="a\x00b"), "source: "),
        (flight(optimizer="Adam"), "optimizer: no manifest"),
        (flight(columns=("norm", "taste")), "'taste' is no statistic"),
        (flight(steps=(3, 5, 4, 6)), "steps: not in ascending order"),
        (flight(values=memoryview(b"12345678")), "8 bytes are not 4 steps"),
        (flight(scalars={"loss": (1.0,)}), "'loss' has no value for each step"),
        (flight(scalars={"l\x00ss": (1.0, 2.0, 3.0, 4.0)}), "scalars: "),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(collector, report: Record, reason: str):
    run = new_run()
    collector.put(run)
    answer = collector.post(run, [manifest(dense(4)), report])
    assert answer.status == 422
    assert reason in answer.problem.rejected[0]["reason"]
