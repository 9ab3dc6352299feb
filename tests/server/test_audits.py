"""Audits over the API: stored once, told at once, and the same verdict in any order."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from synthetic_runs import OPTIMIZER, dense, healthy, manifest, new_run

from gradwatch.client import Client, CollectorError
from gradwatch.wire.api import FindingView
from gradwatch.wire.audit import MAX_AUDITED, Audit, AuditedLayer, AuditView
from gradwatch_server.models import AuditedLayerRow, AuditRow

RIGHT, WRONG = 1e-7, 0.98


def audit(step: int, **errors: float | None) -> Audit:
    """An audit in float32 of layers by name, with these relative errors."""
    layers = [
        AuditedLayer(layer=f"{name}.weight", module="Linear", relative_error=error)
        for name, error in errors.items()
    ]
    return Audit(optimizer=OPTIMIZER, step=step, method="reference", dtype="float32", layers=layers)


def by(given: Audit, **changed: Any) -> Audit:
    return msgspec.structs.replace(given, **changed)


@pytest.fixture
def run(collector):
    info = new_run()
    collector.store(info, [manifest(dense(4)), *healthy(range(10))])
    return info


def send(collector: Any, run: Any, *audits: Audit) -> None:
    for each in audits:
        collector.client.send_audit(run.id, each)


def post(collector: Any, run: Any, body: Any) -> Any:
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return collector.request("POST", f"/api/v1/runs/{run.id}/audits", content)


def view_of(answer: Any) -> AuditView:
    return msgspec.json.decode(answer.body, type=AuditView)


def mismatch(collector: Any, run: Any) -> Any:
    return collector.findings(run).get("reference_mismatch")


def test_an_audit_comes_back_as_it_was_sent_with_its_verdict(collector, run):
    given = audit(7, a=RIGHT, b=WRONG)
    view = collector.client.send_audit(run.id, given)
    assert [(item.layer, item.passed) for item in view.layers] == [
        ("a.weight", True),
        ("b.weight", False),
    ]
    assert (view.step, view.rank, view.method, view.passed) == (7, 0, "reference", False)
    assert [item.relative_error for item in view.layers] == [RIGHT, WRONG]
    assert {item.tolerance for item in view.layers} == {1e-2}
    assert collector.client.audits(run.id).audits == [view]


def test_the_tolerance_follows_the_type_and_the_method_unless_it_is_given(collector, run):
    layer = AuditedLayer(layer="a", relative_error=5e-3)
    given = Audit(optimizer=OPTIMIZER, step=1, method="reference", dtype="float32", layers=[layer])
    strict = msgspec.structs.replace(layer, tolerance=1e-3)
    sent = [
        given,
        by(given, step=2, dtype="float64"),
        by(given, step=3, dtype="bfloat16"),
        by(given, step=4, dtype="float8_e4m3fn"),
        by(given, step=5, method="finite_difference"),
        by(given, step=6, layers=[strict]),
    ]
    found = [collector.client.send_audit(run.id, each) for each in sent]
    assert [view.layers[0].tolerance for view in found] == [1e-2, 1e-5, 1e-1, 1e-1, 1e-3, 1e-3]
    assert [view.passed for view in found] == [True, False, True, True, False, False]


def test_thresholds_of_a_project_hold_for_its_audits(start_collector, tmp_path):
    rules = tmp_path / "thresholds.toml"
    rules.write_text("[project.exact.reference_mismatch]\nfloat32 = 1e-6\n")
    collector = start_collector(thresholds=str(rules))
    for project, passed in (("exact", False), ("tests", True)):
        info = new_run(project=project)
        assert collector.put(info).status == 200
        view = collector.client.send_audit(info.id, audit(1, a=1e-5))
        assert view.passed == passed


def test_the_same_audit_again_changes_nothing_and_another_of_its_key_is_refused(collector, run):
    first = post(collector, run, audit(7, a=WRONG))
    again = post(collector, run, audit(7, a=WRONG))
    assert (first.status, again.status) == (201, 200)
    assert again.body == first.body
    other = post(collector, run, audit(7, a=RIGHT))
    assert other.status == 409
    assert "step: another audit" in other.problem.detail
    assert collector.client.audits(run.id).audits == [view_of(first)]
    assert collector.client.run(run.id).conflicts == 1
    assert mismatch(collector, run).state == "open"
    assert [alert.change for alert in collector.alerts()] == ["opened"]
    # Whatever else differs makes a key of its own.
    for changed in ({"rank": 1}, {"step": 8}, {"method": "finite_difference"}, {"optimizer": "x"}):
        assert post(collector, run, by(audit(7, a=RIGHT), **changed)).status == 201


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, ""),
        (b"{}", 422, "missing required field"),
        (b'{"step": NaN}', 400, ""),
        ({"method": "guessed"}, 422, "method"),
        ({"layers": []}, 422, "layers"),
        ({"layers": [{"layer": "a", "relative_error": -1}]}, 422, "relative_error"),
        ({"layers": [{"layer": "a"}]}, 422, "relative_error"),
        ({"layers": [{"layer": "a", "relative_error": 0, "tolerance": 2}]}, 422, "tolerance"),
        ({"layers": [{"layer": "a", "relative_error": 0}] * 2}, 422, "'a' is named twice"),
        ({"layers": [{"layer": "", "relative_error": 0}]}, 422, "layer"),
        ({"layers": [{"layer": "a\0", "relative_error": 0}]}, 422, "layers.layer: 'a"),
        ({"layers": [{"layer": "x" * 501, "relative_error": 0}]}, 422, "layer"),
        ({"dtype": "x" * 51}, 422, "dtype"),
        ({"step": -1}, 422, "step"),
        ({"step": 2**60}, 422, "step"),
        ({"more": 1}, 422, "more"),
    ],
)
def test_what_is_no_audit_is_refused_by_the_field_that_is_wrong(collector, run, body, status, said):
    if isinstance(body, dict):
        body = json.dumps(msgspec.to_builtins(audit(1, a=RIGHT)) | body).encode()
    answer = post(collector, run, body)
    assert answer.status == status, answer.body
    assert said in answer.problem.detail
    assert collector.client.audits(run.id).audits == []


def test_an_audit_has_at_most_so_many_layers(collector, run):
    most = {f"l{place}": RIGHT for place in range(MAX_AUDITED)}
    assert post(collector, run, audit(1, **most)).status == 201
    assert post(collector, run, audit(2, **most, one_more=RIGHT)).status == 422


def test_a_number_that_is_not_finite_comes_back_as_null_and_fails(collector, run):
    layers = [
        AuditedLayer(layer="unknown", relative_error=None),
        AuditedLayer(layer="broken", relative_error=RIGHT, nonfinite=3),
        AuditedLayer(layer="both", relative_error=RIGHT, nonfinite=3, reference_nonfinite=3),
    ]
    view = collector.client.send_audit(run.id, by(audit(1, a=RIGHT), layers=layers))
    assert [(item.relative_error, item.passed) for item in view.layers] == [
        (None, False),
        (RIGHT, False),
        (RIGHT, True),
    ]
    finding = mismatch(collector, run)
    assert finding.layers == ["broken", "unknown"]
    assert finding.evidence["broken"] == (
        "3 elements are not finite, of the reference 0, at step 1"
    )
    assert finding.evidence["unknown"].startswith("relative error NaN, ")


def test_a_gradient_beyond_its_tolerance_is_told_as_it_arrives(collector, run):
    send(collector, run, audit(7, a=RIGHT, b=WRONG, c=0.5))
    finding = mismatch(collector, run)
    assert (finding.severity, finding.state, finding.first_step) == ("critical", "open", 7)
    assert finding.layers == ["b.weight", "c.weight"]
    assert finding.summary == (
        "The gradient of b.weight and 1 more layer is not what the reference engine in float64 "
        "says: relative error 0.98, 0.01 is allowed, at step 7, since step 7."
    )
    assert finding.evidence["worst relative error"] == WRONG
    assert finding.evidence["its tolerance"] == 1e-2
    assert finding.evidence["c.weight"] == "relative error 0.50, 0.01 is allowed, at step 7"
    assert collector.client.run(run.id).verdict == "critical"
    assert [alert.change for alert in collector.alerts()] == ["opened"]
    assert len(collector.wakes) == 1, "the worker is woken, not left to its schedule"


def test_audits_that_pass_tell_nothing(collector, run):
    send(collector, run, audit(7, a=RIGHT), audit(8, a=RIGHT))
    assert collector.findings(run) == {}
    assert collector.wakes == []


def test_it_resolves_when_a_later_audit_of_its_layers_passes(collector, run):
    send(collector, run, audit(7, a=WRONG, b=WRONG), audit(9, a=RIGHT))
    assert mismatch(collector, run).layers == ["b.weight"]
    send(collector, run, audit(8, b=RIGHT), audit(10, c=RIGHT))
    assert mismatch(collector, run).state == "resolved"
    send(collector, run, audit(11, a=WRONG))
    finding = mismatch(collector, run)
    assert (finding.state, finding.layers, finding.first_step) == ("open", ["a.weight"], 11)
    assert [alert.change for alert in collector.alerts()] == ["opened", "resolved", "opened"]


def test_another_rank_or_method_that_passes_says_nothing_of_the_one_that_failed(collector, run):
    failed = audit(7, a=WRONG)
    passed = audit(9, a=RIGHT)
    send(
        collector,
        run,
        by(failed, rank=3),
        passed,
        by(passed, rank=3, method="finite_difference"),
    )
    finding = mismatch(collector, run)
    assert finding.state == "open"
    assert "on rank 3" in finding.evidence["a.weight"]
    send(collector, run, by(passed, rank=3))
    assert mismatch(collector, run).state == "resolved"


def test_frames_do_not_end_it(collector, run):
    send(collector, run, audit(7, a=WRONG))
    collector.post(run, healthy(range(10, 200)))
    collector.judge()
    assert mismatch(collector, run).state == "open"


def test_the_verdict_is_the_same_in_whatever_order_audits_come(collector):
    audits = [
        audit(5, a=WRONG, b=RIGHT),
        audit(10, a=RIGHT, b=WRONG),
        audit(20, b=0.5),
        audit(15, a=WRONG, c=None),
        by(audit(20, c=RIGHT), rank=1),
    ]
    told = set()
    for order in itertools.permutations(audits):
        info = new_run()
        assert collector.put(info).status == 200
        send(collector, info, *order)
        found = mismatch(collector, info)
        told.add(
            msgspec.json.encode(
                msgspec.structs.replace(found, id=0, run="", opened_at=0.0, meaning="")
            )
        )
    assert len(told) == 1
    found = msgspec.json.decode(told.pop(), type=FindingView)
    assert (found.state, found.first_step, found.last_step) == ("open", 10, 20)
    assert found.layers == ["b.weight", "c.weight", "a.weight"]


def test_a_failure_that_comes_late_after_its_repair_leaves_nothing_open(collector):
    for order in itertools.permutations([audit(5, a=WRONG), audit(6, a=WRONG), audit(7, a=RIGHT)]):
        info = new_run()
        assert collector.put(info).status == 200
        send(collector, info, *order)
        found = mismatch(collector, info)
        assert found is None or found.state == "resolved"


def test_audits_are_listed_by_pages_and_by_what_is_asked_for(collector, run):
    send(collector, run, *(audit(step, a=RIGHT) for step in range(5)))
    send(collector, run, audit(5, a=WRONG, b=RIGHT), by(audit(6, b=WRONG), optimizer="other"))
    client = collector.client

    def steps(**asked: Any) -> list[int]:
        return [view.step for view in client.audits(run.id, **asked).audits]

    assert steps() == [6, 5, 4, 3, 2, 1, 0]
    assert steps(optimizer="other") == [6]
    assert steps(layer="b.weight") == [6, 5]
    assert steps(passed=False) == [6, 5]
    assert steps(passed=True) == [4, 3, 2, 1, 0]
    assert steps(layer="b.weight", passed=True) == [5]
    assert steps(layer="nobody") == []
    pages, after = [], None
    while True:
        page = client.audits(run.id, after=after, limit=3)
        pages.append([view.step for view in page.audits])
        if (after := page.next) is None:
            break
    assert pages == [[6, 5, 4], [3, 2, 1], [0]]


def test_a_list_that_did_not_change_is_not_sent_again(collector, run):
    send(collector, run, audit(1, a=RIGHT))
    path = f"/api/v1/runs/{run.id}/audits"
    tag = collector.get(path).headers["ETag"]
    assert collector.get(path, **{"If-None-Match": tag}).status == 304
    send(collector, run, audit(2, a=RIGHT))
    assert collector.get(path, **{"If-None-Match": tag}).status == 200


def test_a_run_that_is_deleted_takes_its_audits_along(collector, run):
    send(collector, run, audit(7, a=WRONG))
    collector.client.delete_run(run.id)
    with Session(collector.engine) as session:
        for table in (AuditRow, AuditedLayerRow):
            assert session.scalar(select(func.count()).select_from(table)) == 0


def test_runs_that_are_not_there_or_another_projects_are_not_found(start_collector):
    collector = start_collector(server_token="a-test-token")
    info = new_run(project="vision")
    assert collector.put(info).status == 200
    made = collector.client.create_token("theirs", ["ingest", "read"], project="speech")
    reader = collector.client.create_token("reader", ["read"])
    theirs = Client(collector.url, made.token)
    for ask in (
        lambda: theirs.send_audit(info.id, audit(1, a=RIGHT)),
        lambda: theirs.audits(info.id),
        lambda: collector.client.send_audit("0" * 32, audit(1, a=RIGHT)),
        lambda: collector.client.audits("0" * 32),
    ):
        with pytest.raises(CollectorError) as caught:
            ask()
        assert caught.value.status == 404
    for client, status in (
        (Client(collector.url), 401),
        (Client(collector.url, reader.token), 403),
    ):
        with pytest.raises(CollectorError) as caught:
            client.send_audit(info.id, audit(1, a=RIGHT))
        assert caught.value.status == status
    assert Client(collector.url, reader.token).audits(info.id).audits == []


def test_audits_are_counted_for_prometheus(collector, run):
    send(collector, run, audit(1, a=RIGHT), audit(2, a=WRONG), audit(3, a=RIGHT))
    text = collector.get("/metrics").body.decode()
    labels = f'{{optimizer="{OPTIMIZER}",run="{run.id}"}}'
    assert f"gradwatch_run_audits_total{labels} 3.0" in text
    assert f"gradwatch_run_failed_audits_total{labels} 1.0" in text
