"""Each resource of the API: what was sent comes back, and what people change stays changed."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from synthetic_runs import OPTIMIZER, dense, detail, frame, healthy, manifest, new_run

from gradwatch.client import CollectorError
from gradwatch.wire.frame import Frame, RunEnd, RunInfo
from gradwatch.wire.histogram import BUCKETS, histogram
from gradwatch_server import alerts
from gradwatch_server.folding import fold_due
from gradwatch_server.packing import pack_histograms

LAYERS = 4
ARROW = "application/vnd.apache.arrow.stream"


def refused(ask: Any, *given: Any, **named: Any) -> CollectorError:
    with pytest.raises(CollectorError) as caught:
        ask(*given, **named)
    return caught.value


def stored(collector: Any, records: list[Any] | None = None, **facts: Any) -> Any:
    collector.store(run := new_run(**facts), [manifest(dense(LAYERS)), *(records or healthy([1]))])
    return run


def counted(item: Frame, values: np.ndarray[Any, Any]) -> Frame:
    """A frame with histograms. values: float32[layers, n]."""
    counts = np.array([histogram(row) for row in values], dtype=np.uint32)
    return msgspec.structs.replace(item, histograms=pack_histograms(counts))


# Runs


def test_runs_are_found_by_what_is_known_of_them(collector):
    ended = stored(collector, [RunEnd(rank=0, time=1.0, status="finished")], name="Baseline")
    failed = stored(collector, [RunEnd(rank=0, time=1.0, status="failed")], tags=["big", "old"])
    sick = stored(collector, [detail(1, [0.01] * LAYERS, broken=1.0)], project="b")
    client = collector.client
    collector.judge()

    def found(**wanted: Any) -> list[str]:
        return [view.info.id for view in client.runs(**wanted).runs]

    assert found() == [sick.id, failed.id, ended.id]
    assert found(status="finished") == [ended.id]
    assert found(status="failed") == [failed.id]
    assert found(name="baseLINE") == [ended.id]
    assert found(tag="big") == [failed.id]
    assert found(tag="bi") == []
    assert found(verdict="critical") == [sick.id]
    assert found(project="b", status="finished") == []
    for view in client.runs().runs:
        assert view.info.id in found(verdict=view.verdict)
        assert view.info.id in found(status=view.status)
    assert refused(client.runs, status="asleep").status == 422


def test_filters_page_over_many_runs_without_losing_one(collector):
    wanted = []
    for number in range(25):
        collector.put(run := new_run(name=f"{'odd' if number % 2 else 'even'} {number}"))
        wanted += [run.id] if number % 2 else []
    seen: list[str] = []
    after = None
    while True:
        page = collector.client.runs(name="odd", limit=5, after=after)
        seen += [view.info.id for view in page.runs]
        if (after := page.next) is None:
            break
    assert seen == wanted[::-1]


def test_what_people_say_of_a_run_stays_though_its_job_introduces_it_again(collector):
    run = stored(collector, tags=["mine"])
    changed = collector.client.change_run(run.id, name="the good one", notes="see the paper")
    assert (changed.info.name, changed.notes, changed.info.tags) == (
        "the good one",
        "see the paper",
        ["mine"],
    )
    collector.put(run)
    collector.client.change_run(run.id, tags=[])
    view = collector.client.run(run.id)
    assert (view.info.name, view.info.tags, view.notes) == ("the good one", [], "see the paper")
    assert [item.info.id for item in collector.client.runs(name="good").runs] == [run.id]


@pytest.mark.parametrize(
    "body", [b'{"name": ""}', b'{"nmae": "x"}', b'{"tags": "x"}', b"[]", b'{"name": 1}', b"{", b""]
)
def test_a_change_that_makes_no_sense_is_refused(collector, body):
    run = stored(collector)
    answer = collector.request("PATCH", f"/api/v1/runs/{run.id}", body)
    assert answer.problem.status in (400, 422)
    assert collector.client.run(run.id).info.name == run.name


def test_a_run_whose_job_died_silently_is_ended_by_hand(collector):
    run = stored(collector)
    view = collector.client.finish_run(run.id, "failed", "the machine was taken away")
    assert (view.status, view.reason) == ("failed", "the machine was taken away")
    # How it ended is not for the next one to say.
    assert collector.client.finish_run(run.id).status == "failed"
    assert refused(collector.client.finish_run, run.id, "paused").status == 422


def test_a_deleted_run_is_gone_and_its_job_may_bring_it_anew(collector):
    run, other = stored(collector, healthy(range(10))), stored(collector)
    collector.client.delete_run(run.id)
    assert refused(collector.client.run, run.id).status == 404
    assert refused(collector.client.delete_run, run.id).status == 404
    assert collector.post(run, healthy([11])).status == 404
    assert collector.client.run(other.id).last_step == 1
    collector.store(run, [manifest(dense(LAYERS)), *healthy([12])])
    assert collector.client.run(run.id).optimizers[0].frames == 1


# What was stored


def test_manifests_come_back_version_by_version(collector):
    versions = [dense(LAYERS), dense(LAYERS + 1)]
    collector.store(
        run := new_run(), [manifest(layers, number) for number, layers in enumerate(versions, 1)]
    )
    views = collector.client.manifests(run.id, OPTIMIZER)
    assert [(item.version, item.layers) for item in views] == [(1, versions[0]), (2, versions[1])]
    assert collector.client.manifests(run.id) == views
    assert refused(collector.client.manifests, run.id, "Adam").status == 404


def test_frames_come_back_number_for_number_page_by_page(collector):
    chance = np.random.default_rng(1)
    sent = [detail(3 * step, chance.lognormal(0, 5, LAYERS)) for step in range(57)]
    sent[7] = frame(
        21,
        [[np.inf, 1, 2, np.nan], [3, 0, 0, 0]],
        scalars={"loss": float("inf"), "lr": 0.5},
        events=("amp_skipped",),
    )
    run = stored(collector, sent)
    page = collector.client.frames(run.id, OPTIMIZER, limit=10)
    assert (len(page.frames), page.next) == (10, "27")
    views = list(collector.client.all_frames(run.id, OPTIMIZER))
    assert [view.step for view in views] == [item.step for item in sent]
    for view, item in zip(views, sent, strict=True):
        assert list(view.statistics) == list(item.columns)
        found = np.array(list(view.statistics.values()), dtype=np.float32)
        expected = item.matrix()
        assert np.array_equal(found, np.where(np.isfinite(expected), expected, np.nan), True)
    assert views[7].scalars == {"loss": None, "lr": 0.5}
    assert views[7].events == ["amp_skipped"]
    some = collector.client.all_frames(run.id, OPTIMIZER, first=30, last=40)
    assert [view.step for view in some] == [30, 33, 36, 39]


def test_a_page_of_frames_of_very_many_layers_is_cut_short(collector, monkeypatch):
    monkeypatch.setattr("gradwatch_server.recorded.MAX_NUMBERS", 3 * 7 * LAYERS - 1)
    run = stored(collector, healthy(range(10), LAYERS))
    assert len(collector.client.frames(run.id, OPTIMIZER).frames) == 3
    assert len(list(collector.client.all_frames(run.id, OPTIMIZER))) == 10


def test_frames_of_ranks_and_of_all_of_them_are_told_apart(collector):
    run = new_run(world_size=2)
    records = [
        item
        for rank in range(2)
        for item in (
            manifest(dense(LAYERS), rank=rank),
            *(frame(step, [[rank + 1] * LAYERS, [0] * LAYERS], rank=rank) for step in range(3)),
        )
    ]
    collector.store(run, records)
    client = collector.client
    assert {view.rank for view in client.all_frames(run.id, OPTIMIZER)} == {-1}
    for rank in range(2):
        views = list(client.all_frames(run.id, OPTIMIZER, rank=rank))
        assert [view.statistics["norm"][0] for view in views] == [rank + 1] * 3


def test_events_come_back_in_order_page_by_page(collector):
    records = [
        frame(step, [[1] * LAYERS, [0] * LAYERS], events=("b", "a", "b") if step % 2 else ("a",))
        for step in range(20)
    ]
    run = stored(collector, records)
    expected = [(s, name) for s in range(20) for name in (("a", "b") if s % 2 else ("a",))]
    seen: list[tuple[int, str]] = []
    after = None
    while True:
        page = collector.client.events(run.id, limit=7, after=after)
        seen += [(view.step, view.name) for view in page.events]
        if (after := page.next) is None:
            break
    assert seen == expected
    some = collector.client.events(run.id, optimizer=OPTIMIZER, first=3, last=4)
    assert [(view.step, view.name) for view in some.events] == [(3, "a"), (3, "b"), (4, "a")]
    for wrong in ("x", "[1]", "[1,2,3,4]", f'[{2**70},1,0,"a"]'):
        assert refused(collector.client.events, run.id, after=wrong).status == 422


def test_histograms_over_steps_add_up_to_those_that_were_sent(collector):
    chance = np.random.default_rng(2)
    values = chance.normal(0, 1, (9, LAYERS, 200)).astype(np.float32)
    values[4, 1, :3] = np.nan
    records = [counted(detail(step, [1.0] * LAYERS), values[step]) for step in range(9)]
    run = stored(collector, [*records, *healthy([9])])
    each = collector.client.histograms(run.id, OPTIMIZER, "1.weight")
    assert each.steps.tolist() == list(range(9))
    expected = np.array([histogram(step[1]) for step in values])
    assert np.array_equal(each.counts, expected)
    assert each.counts[4, -1] == 3
    assert len(each.edges) == BUCKETS - 1
    folded = collector.client.histograms(run.id, OPTIMIZER, "1.weight", columns=3)
    assert folded.steps.tolist() == [0, 3, 6]
    assert np.array_equal(folded.counts, expected.reshape(3, 3, -1).sum(axis=1))
    assert "9.weight" in str(refused(collector.client.histograms, run.id, OPTIMIZER, "9.weight"))


# Queries


def test_a_heatmap_has_means_and_those_of_norms_are_of_squares(collector):
    chance = np.random.default_rng(4)
    rms = chance.lognormal(0, 2, (12, LAYERS))
    run = stored(collector, [detail(step, rms[step]) for step in range(12)])
    frames = [detail(step, rms[step]) for step in range(12)]
    for name, power in (("norm", 2), ("mean_abs", 1), ("weight_norm", 2), ("absmax", 1)):
        rows = np.array([item.row(name) for item in frames], dtype=np.float64)
        expected = (rows.reshape(3, 4, LAYERS) ** power).mean(axis=1) ** (1 / power)
        shown = collector.client.heatmap(run.id, OPTIMIZER, name, columns=3)
        assert np.allclose(shown.mean, expected.T, rtol=1e-6)
        assert np.all(shown.low <= shown.mean * 1.000001)
        assert np.all(shown.mean <= shown.high * 1.000001)


def test_layers_are_chosen_by_a_pattern(collector):
    run = stored(collector)
    ask = collector.client.heatmap
    assert ask(run.id, OPTIMIZER, layers="[12].*").layers == ["1.weight", "2.weight"]
    assert ask(run.id, OPTIMIZER, layers="3.weight").low.shape == (1, 1)
    told = refused(ask, run.id, OPTIMIZER, layers="encoder.*")
    assert told.status == 404
    assert "encoder.*" in str(told)


def arrow(collector: Any, path: str) -> Any:
    answer = collector.get(path, Accept=ARROW)
    assert answer.headers["Content-Type"] == ARROW, answer.body
    return pa.ipc.open_stream(answer.body).read_all()


def test_json_msgpack_and_arrow_say_the_same(collector):
    chance = np.random.default_rng(6)
    values = chance.normal(0, 1, (5, LAYERS, 50)).astype(np.float32)
    records = [counted(detail(step, [step + 1.0] * LAYERS), values[step]) for step in range(5)]
    broken = frame(5, [[np.nan] * LAYERS, [1] * LAYERS], scalars={"loss": float("nan")})
    run = stored(collector, [*records, broken])
    start, client = f"/api/v1/runs/{run.id}", collector.client

    grid = client.heatmap(run.id, OPTIMIZER)
    table = arrow(collector, f"{start}/heatmap?optimizer={OPTIMIZER}")
    plain = json.loads(collector.get(f"{start}/heatmap?optimizer={OPTIMIZER}").body)
    assert np.array_equal(table["high"].to_numpy(), grid.high.ravel(), True)
    assert table["layer"].to_pylist()[:6] == [grid.layers[0]] * 6
    assert plain["steps"] == grid.steps.tolist()
    assert plain["mean"][0][:5] == grid.mean[0][:5].tolist()
    assert [row[5] for row in plain["mean"]] == [None] * LAYERS
    assert [row[5] for row in plain["nonfinite"]] == [True] * LAYERS

    asked = f"{start}/histograms?optimizer={OPTIMIZER}&layer=2.weight"
    counts = client.histograms(run.id, OPTIMIZER, "2.weight").counts
    assert arrow(collector, asked)["count"].to_numpy().tolist() == counts.ravel().tolist()
    assert json.loads(collector.get(asked).body)["counts"] == counts.tolist()

    asked = f"{start}/scalars?optimizer={OPTIMIZER}"
    losses = client.scalars(run.id, OPTIMIZER).series("loss")
    assert np.array_equal(arrow(collector, asked)["loss"].to_numpy(), losses, True)
    told = json.loads(collector.get(asked).body)
    assert told["series"]["loss"][-1] is None
    assert told["broken"]["loss"] == [False] * 5 + [True]


def test_without_pyarrow_arrow_is_refused_with_what_to_install(collector, monkeypatch):
    run = stored(collector)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = f"/api/v1/runs/{run.id}/scalars?optimizer={OPTIMIZER}"
    answer = collector.get(path, Accept=ARROW)
    assert answer.problem.status == 406
    assert "gradwatch[arrow]" in answer.problem.detail


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/findings",
        "/heatmap?optimizer=SGD",
        "/scalars?optimizer=SGD",
        "/frames?optimizer=SGD",
        "/histograms?optimizer=SGD&layer=0.weight",
        "/flow?optimizer=SGD",
        "/manifests",
        "/events",
    ],
)
def test_who_polls_is_told_when_nothing_changed(collector, path):
    run = stored(collector, healthy(range(3)))
    url = f"/api/v1/runs/{run.id}{path}"
    first = collector.get(url)
    assert first.status == 200
    again = collector.get(url, **{"If-None-Match": first.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")
    # The same numbers in another form are another answer.
    packed = collector.get(url, Accept="application/x-msgpack")
    assert packed.headers["ETag"] != first.headers["ETag"]
    collector.store(
        run,
        [
            frame(9, [[1] * LAYERS, [0] * LAYERS], events=("reset",)),
            counted(detail(10, [1.0] * LAYERS), np.ones((LAYERS, 3), np.float32)),
            manifest(dense(5), 2),
        ],
    )
    if path == "/findings":
        return
    fresh = collector.get(url, **{"If-None-Match": first.headers["ETag"]})
    assert fresh.status == 200


def test_who_polls_is_told_exactly_when_an_answer_changed(collector):
    frames = [frame(step, [[0.01 * step] * LAYERS, [0] * LAYERS]) for step in range(1500)]
    run = stored(collector, frames)
    url = f"/api/v1/runs/{run.id}/heatmap?optimizer=SGD&columns=90"

    def poll(tag: str) -> Any:
        return collector.get(url, **{"If-None-Match": tag})

    before = collector.get(url)
    tag = before.headers["ETag"]
    collector.store(run, frames[:2])
    assert poll(tag).status == 304  # a batch that came again changed nothing
    fold_due(collector.engine, budget_s=60.0)
    after = collector.get(url)
    # What was folded may be read in groups of another size; then it is another answer.
    assert after.body != before.body
    assert poll(tag).body == after.body
    assert poll(after.headers["ETag"]).status == 304


def test_a_run_that_was_deleted_and_came_anew_is_not_taken_for_what_it_was(collector):
    def heard(value: float) -> RunInfo:
        collector.store(info, [manifest(dense(LAYERS)), frame(1, [[value] * LAYERS, [0] * LAYERS])])
        return info

    info = new_run()
    url = f"/api/v1/runs/{heard(0.5).id}/heatmap?optimizer=SGD"
    tag = collector.get(url).headers["ETag"]
    collector.client.delete_run(info.id)
    heard(0.25)
    anew = collector.get(url, **{"If-None-Match": tag})
    assert anew.status == 200
    assert json.loads(anew.body)["low"] == [[0.25]] * LAYERS


@pytest.mark.parametrize("form", ["application/json", "application/x-msgpack"])
def test_a_number_of_many_digits_in_a_configuration_spoils_no_list(collector, form):
    seed = 123456789012345678901234567890
    run = new_run(config={"seed": seed, "seeds": [{"first": -seed}, 2**64 - 1], "lr": 0.1})
    assert (
        collector.request(
            "PUT", f"/api/v1/runs/{run.id}", json.dumps(msgspec.to_builtins(run)).encode()
        ).status
        == 200
    )
    for path in ("/api/v1/runs", f"/api/v1/runs/{run.id}", f"/api/v1/comparison?run={run.id}"):
        assert collector.get(path, Accept=form).status == 200, path
    (view,) = [item for item in collector.client.runs().runs if item.info.id == run.id]
    kept = {"seed": str(seed), "seeds": [{"first": str(-seed)}, 2**64 - 1], "lr": 0.1}
    assert view.info.config == kept


def test_runs_are_compared_by_what_differs_and_by_their_losses(collector):
    def losses(values: list[float], step: int) -> list[Any]:
        return [detail(step * at, [0.01] * LAYERS, loss=loss) for at, loss in enumerate(values)]

    one = stored(collector, losses([3, 2, 1], 10), config={"lr": 0.1, "seed": 1}, name="one")
    two = stored(collector, losses([3.0, float("nan")], 15), config={"lr": 0.2, "seed": 1})
    shown = collector.client.compare([one.id, two.id])
    assert [item.config for item in shown.runs] == [{"lr": 0.1}, {"lr": 0.2}]
    assert shown.steps == [0, 10, 15, 20]
    assert shown.series[one.id] == [3, 2, 2, 1]
    assert shown.series[two.id] == [3, 3, None, None]
    assert (shown.runs[0].name, shown.runs[0].steps) == ("one", 20)
    assert "non_finite" in shown.runs[1].findings
    thin = collector.client.compare([one.id, two.id], columns=2)
    assert thin.steps == [0, 20]
    assert collector.client.compare([one.id], scalar="nothing").steps == []
    assert refused(collector.client.compare, []).status == 422
    assert refused(collector.client.compare, ["0" * 32]).status == 404


# Findings


@pytest.fixture
def sick(collector) -> Any:
    """A run with an open critical finding."""
    broken = detail(7, [0.01] * LAYERS, broken=[3, 0, 0, 0])
    return stored(collector, [*healthy(range(7)), broken], project="clinic")


def test_findings_of_all_runs_are_listed_and_filtered(collector, sick):
    stored(collector, [detail(1, [0.01] * LAYERS, broken=1.0)])
    client = collector.client
    page = client.all_findings(limit=1)
    assert len(page.findings) == 1
    rest = client.all_findings(limit=1, after=page.next)
    assert rest.next is None
    assert [item.run for item in rest.findings] == [sick.id]
    assert [item.run for item in client.all_findings(project="clinic").findings] == [sick.id]
    assert len(client.all_findings(kind="non_finite", severity="critical").findings) == 2
    assert client.all_findings(state="resolved").findings == []
    assert client.all_findings(muted=True).findings == []


def test_a_finding_tells_all_that_became_of_it(collector, sick):
    client = collector.client
    finding = collector.findings(sick)["non_finite"]
    client.change_finding(finding.id, acknowledged=True, note="looking into it")
    collector.post(sick, healthy(range(8, 80)))
    collector.judge()
    collector.post(sick, [detail(81, [0.01] * LAYERS, broken=[0, 1, 0, 0])])
    history = client.finding(finding.id)
    assert [item.change for item in history.changes] == [
        "opened",
        "acknowledged",
        "resolved",
        "opened",
    ]
    assert history.changes[1].note == "looking into it"
    assert [item.step for item in history.changes] == [7, 7, 7, 81]
    assert history.finding.acknowledged_at is None  # what came back was not seen
    assert refused(client.finding, 10**9).status == 404


def test_a_muted_finding_counts_for_no_verdict_and_sends_nothing(collector, sick):
    client = collector.client
    assert client.run(sick.id).verdict == "critical"
    assert client.run(sick.id).score == 25
    finding = collector.findings(sick)["non_finite"]
    assert [item.state for item in collector.alerts()] == [alerts.PENDING]
    history = client.change_finding(finding.id, muted=True, note="known")
    assert history.finding.muted
    assert client.run(sick.id).verdict != "critical"
    assert client.runs(verdict="critical").runs == []
    assert b'kind="non_finite"' not in collector.get("/metrics").body
    assert collector.alerts() == []
    collector.post(sick, healthy(range(8, 80)))
    collector.judge()
    collector.post(sick, [detail(81, [0.01] * LAYERS, broken=1.0)])
    assert collector.findings(sick)["non_finite"].state == "open"
    assert collector.alerts() == []
    assert [item.id for item in client.all_findings(muted=True).findings] == [finding.id]
    client.change_finding(finding.id, muted=False)
    assert client.run(sick.id).verdict == "critical"
    assert [item.change for item in client.finding(finding.id).changes][-1] == "unmuted"


def test_saying_the_same_twice_is_written_down_once(collector, sick):
    finding = collector.findings(sick)["non_finite"]
    for _ in range(2):
        history = collector.client.change_finding(finding.id, muted=True)
    assert [item.change for item in history.changes] == ["opened", "muted"]


# Channels and batches


def test_channels_are_shown_without_their_secrets(start_collector, webhook):
    secret = "json://user:hidden@127.0.0.1:9/secret"
    collector = start_collector(notify=f"{webhook.url} {secret}")
    run = stored(collector, [detail(1, [0.01] * LAYERS, broken=1.0)])
    alerts.deliver_due(collector.engine, [webhook.url, secret], "", local=True)
    views = collector.client.channels()
    assert [item.scheme for item in views] == ["json", "json"]
    assert (views[0].sent, views[0].pending) == (1, 0)
    assert (views[1].sent, views[1].pending) == (0, 1)
    assert views[1].last_error
    told = collector.get("/api/v1/channels").body
    assert b"hidden" not in told
    assert run


def test_a_channel_is_tried_by_a_test_message(start_collector, webhook):
    dead = "json://127.0.0.1:9/none"
    collector = start_collector(notify=f"{webhook.url} {dead}", notify_local="allow")
    client = collector.client
    works, fails = (view.channel for view in client.channels())
    client.test_channel(works)
    (message,) = webhook.received
    assert message["title"] == "[test] gradwatch"
    assert refused(client.test_channel, fails).status == 502
    assert refused(client.test_channel, "0" * 32).status == 404
    assert collector.alerts() == []


def test_people_may_send_frames_as_json(collector):
    run = new_run()
    collector.put(run)
    layers = msgspec.to_builtins(dense(2))
    batch = [
        {"type": "manifest", "optimizer": "SGD", "version": 1, "layers": layers},
        {
            "type": "frame",
            "optimizer": "SGD",
            "rank": 0,
            "step": 1,
            "time": 1.0,
            "manifest": 1,
            "statistics": {"norm": [0.5, None], "nonfinite": [0, 2]},
            "scalars": {"loss": None},
        },
    ]
    path = f"/api/v1/runs/{run.id}/records"
    json_type = {"Content-Type": "application/json; charset=utf-8"}
    sent = collector.request("POST", path, json.dumps(batch).encode(), **json_type)
    assert sent.receipt.stored == 1
    (view,) = collector.client.frames(run.id, "SGD").frames
    assert view.statistics == {"norm": [0.5, None], "nonfinite": [0.0, 2.0]}
    # An agent that sends the same frame repeats it.
    same = frame(1, [[0.5, np.nan], [0, 2]], scalars={"loss": float("nan")}, time=1.0)
    assert collector.post(run, [same]).receipt.repeated == 1


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ({"statistics": {"norm": [1, 2], "nonfinite": [0]}}, "statistics"),
        ({"statistics": {"norm": ["x", 1]}}, "statistics"),
        ({"statistics": {"loudness": [1, 2]}}, "loudness"),
        ({"statistics": {"norm": [1, 2]}, "columns": ["norm"]}, "statistics"),
        ({"statistics": {"norm": [1, 2]}, "step": -1}, "step"),
        ({"statistics": {"norm": [1, 2]}, "colour": "red"}, "colour"),
        ({}, "columns"),
    ],
)
def test_a_frame_of_json_that_is_wrong_is_refused_by_its_field(collector, item, named):
    run = stored(collector)
    facts = {"type": "frame", "optimizer": "SGD", "rank": 0, "step": 5, "time": 1.0, "manifest": 1}
    path = f"/api/v1/runs/{run.id}/records"
    body = json.dumps([facts | item]).encode()
    answer = collector.request("POST", path, body, **{"Content-Type": "application/json"})
    assert answer.problem.status == 422
    assert named in answer.problem.detail
    for broken in (b"", b"{}", b"[", b"[" * 100_000, b"\xff"):
        answer = collector.request("POST", path, broken, **{"Content-Type": "application/json"})
        assert answer.problem.status == 400


def test_every_type_in_the_description_has_an_example_that_is_one(collector):
    schema = json.loads(collector.get("/openapi.json").body)
    bodies = [
        content
        for item in schema["paths"].values()
        for operation in item.values()
        for answer in [*operation["responses"].values(), operation.get("requestBody", {})]
        for kind, content in answer.get("content", {}).items()
        if kind.endswith("json") and "$ref" in json.dumps(content.get("schema", {}))
    ]
    assert len(bodies) > 25
    for content in bodies:
        assert content["example"], content
    names = {part.split('"')[0] for part in json.dumps(schema).split("#/components/schemas/")[1:]}
    assert names <= set(schema["components"]["schemas"])


def test_the_examples_of_the_description_are_what_it_says_they_are(collector):
    schema = json.loads(collector.get("/openapi.json").body)
    operations = [item for path in schema["paths"].values() for item in path.values()]
    bodies = [body for item in operations for body in item["responses"].values()]
    bodies += [item["requestBody"] for item in operations if "requestBody" in item]
    shown = [content for body in bodies for content in body.get("content", {}).values()]
    shown = [content for content in shown if "example" in content]
    assert len(shown) > 40
    for content in shown:
        whole = content["schema"] | {"components": schema["components"]}
        jsonschema.validate(content["example"], whole)
    for path in ("tokens", "channels"):
        assert set(schema["paths"][f"/api/v1/{path}"]["post"]["responses"]) == {"201", "default"}


def test_the_examples_of_the_description_work_as_they_stand(start_collector):
    collector = start_collector(server_token="a-long-random-text")
    schema = json.loads(collector.get("/openapi.json").body)
    sick = stored(collector, [detail(1, [0.01] * LAYERS, broken=[1, 0, 0, 0])])
    places = {"finding": str(collector.findings(sick)["non_finite"].id)}
    posted: list[str] = []
    # A run is introduced, and a channel made, before others change it.
    order = {"put": 0, "post": 1, "patch": 2}
    asked = [(method, path) for path, item in schema["paths"].items() for method in item]
    for method, path in sorted(asked, key=lambda each: order.get(each[0], 3)):
        content = schema["paths"][path][method].get("requestBody", {}).get("content", {})
        if "application/json" not in content:
            continue
        example = content["application/json"]["example"]
        if method == "put":
            places["run"] = example["id"]
        where = re.sub(r"\{(\w+)\}", lambda name: places[name[1]], path)
        said = collector.request(
            method.upper(),
            where,
            json.dumps(example).encode(),
            **{"Content-Type": "application/json"},
        )
        assert said.status in (200, 201), (path, said.body)
        if path.endswith("/channels"):
            places["channel"] = json.loads(said.body)["channel"]
        posted.append(path)
    assert len(posted) >= 8
