"""The service observed: request ids, logs, its own metrics, and a readiness that never hangs."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from synthetic_runs import dense, frame, healthy, manifest, new_run

from gradwatch_server import logs
from gradwatch_server.app import create_app
from gradwatch_server.database import migrate, open_database
from gradwatch_server.task_counts import NAMES, TaskCounts

TOKEN = "a-long-secret"


def values(collector: Any) -> dict[tuple[str, ...], float]:
    """Samples by name and the values of their labels."""
    body = collector.get("/metrics").body.decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Generator[Any]:
    """What has been logged, as JSON lines would have it."""
    caplog.handler.setFormatter(logs.JsonLines())
    with caplog.at_level(logging.DEBUG, "gradwatch_server"):
        yield lambda: [json.loads(line) for line in caplog.text.splitlines()]


def test_a_request_gets_an_id_that_its_answer_and_its_log_carry(collector, said):
    answer = collector.get("/api/v1/runs")
    request_id = answer.headers["X-Request-ID"]
    assert len(request_id) == 32
    assert collector.get("/api/v1/runs").headers["X-Request-ID"] != request_id
    (line,) = [line for line in said() if line.get("request_id") == request_id]
    assert line["message"] == "GET /api/v1/runs: 200"
    assert line["level"] == "debug"
    assert line["seconds"] > 0


def test_an_id_that_a_proxy_gave_is_kept_unless_it_could_forge_a_log(collector):
    for given, kept in (("proxy-1.a", True), ("a b", False), ("x" * 65, False), ('"}', False)):
        answer = collector.get("/healthz", **{"X-Request-ID": given})
        assert (answer.headers["X-Request-ID"] == given) == kept


def test_what_was_refused_is_logged_without_query_header_or_body(start_collector, said):
    collector = start_collector(server_token=TOKEN)
    collector.token = "wrong-secret"
    collector.request("POST", f"/api/v1/runs/{'a' * 32}/records?q=hidden", b"body-secret")
    collector.get("/healthz")  # a request is logged after its answer, and before the next one
    lines = [line for line in said() if line["level"] == "warning"]
    assert [line["message"] for line in lines] == [f"POST /api/v1/runs/{'a' * 32}/records: 401"]
    told = json.dumps(said())
    assert not [word for word in (TOKEN, "wrong-secret", "hidden", "body-secret") if word in told]


def test_a_failure_is_answered_without_its_words_and_logged_with_them(start_collector, said):
    collector = start_collector()

    @collector.app.get("/broken")
    def broken() -> None:
        raise RuntimeError("the words of the failure")

    answer = collector.get("/broken")
    assert answer.status == 500
    assert "words" not in answer.problem.detail
    collector.get("/healthz")
    failed, finished = [line for line in said() if line["level"] == "error"]
    assert "the words of the failure" in failed["error"]
    assert failed["request_id"] == finished["request_id"] == answer.headers["X-Request-ID"]
    assert values(collector)["gradwatch_requests_refused_total", "failure"] == 1


def test_what_is_committed_is_counted(start_collector):
    collector, run = start_collector(), new_run()
    collector.store(run, [manifest(dense(4)), *healthy(range(10))])
    collector.post(run, healthy(range(5, 15)))
    found = values(collector)
    assert found["gradwatch_ingested_frames_total", "stored"] == 15
    assert found["gradwatch_ingested_frames_total", "repeated"] == 5
    assert found["gradwatch_commit_batches_count",] == 2
    assert found["gradwatch_commit_duration_seconds_count",] == 2
    assert found["gradwatch_commit_duration_seconds_sum",] > 0
    assert found["gradwatch_received_bytes_total",] > 100
    route = "/api/v1/runs/{run}/records"
    assert found["gradwatch_http_request_duration_seconds_count", "POST", route, "200"] == 2


def test_what_is_refused_is_counted_by_reason(start_collector):
    collector, run = start_collector(), new_run()
    collector.store(run, [manifest(dense(4)), *healthy([1])])
    other, unknown = frame(1, [[9.0] * 4, [0.0] * 4]), frame(2, [[1.0] * 4, [0.0] * 4], manifest=7)
    narrow = frame(3, [[1.0], [0.0]])
    for record in (other, unknown, narrow):
        collector.post(run, [record])
    collector.post_bytes(run, b"no batch")
    collector.post(new_run(), [])
    collector.get("/nowhere")
    found = values(collector)
    assert found["gradwatch_records_refused_total", "conflict"] == 1
    assert found["gradwatch_records_refused_total", "manifest"] == 1
    assert found["gradwatch_records_refused_total", "values"] == 1
    refused = {
        key[1]: value
        for key, value in found.items()
        if key[0] == "gradwatch_requests_refused_total"
    }
    assert refused == {"conflict": 1, "invalid": 2, "malformed": 1, "unknown": 2}


def test_paths_and_methods_of_strangers_make_no_series(start_collector):
    collector = start_collector()
    before = len(values(collector))
    for number in range(20):
        collector.get(f"/guess/{number}")
        collector.request(f"GUESS{number}", "/healthz")
    assert len(values(collector)) <= before + 60
    routes = {
        key[2] for key in values(collector) if key[0].endswith("request_duration_seconds_sum")
    }
    assert not [route for route in routes if "guess" in route]


def test_without_a_database_the_metrics_say_so_and_readiness_fails(start_collector, postgres):
    collector = start_collector()
    if collector.engine.dialect.name != "postgresql":
        pytest.skip("a file does not go away")
    url = collector.settings.database
    assert values(collector)["gradwatch_database_up",] == 1
    postgres.drop_connections(url)
    try:
        answer = collector.get("/readyz")
        assert answer.status == 503
        assert "cannot be reached" in answer.problem.detail
        found = values(collector)
        assert found["gradwatch_database_up",] == 0
        assert found["gradwatch_requests_refused_total", "database"] == 1
    finally:
        postgres.let_in_again(url)
    assert collector.get("/readyz").status == 200


def test_readiness_fails_in_time_while_the_database_hangs(start_collector, monkeypatch):
    monkeypatch.setattr("gradwatch_server.readiness.DEADLINE_S", 0.3)
    collector = start_collector()
    if collector.engine.dialect.name != "postgresql":
        pytest.skip("a file does not hang")
    assert collector.get("/readyz").status == 200
    with collector.engine.connect() as connection:
        mine = connection.scalar(text("SELECT pg_backend_pid()"))
        others = (
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> :me"
        )
        backends = connection.scalars(text(others), {"me": mine}).all()
    assert backends
    for pid in backends:
        os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            began = time.monotonic()
            answer = collector.get("/readyz")
            assert answer.status == 503
            assert "has not answered" in answer.problem.detail
            assert time.monotonic() - began < 5
    finally:
        for pid in backends:
            os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + 20
    while collector.get("/readyz").status != 200:
        assert time.monotonic() < deadline


def test_workers_add_up_what_they_did_of_each_task(start_collector):
    collector = start_collector()
    for _ in range(2):
        worker = TaskCounts()
        worker.add("gradwatch.judge", 0.02, failed=False)
        worker.add("gradwatch.judge", 700.0, failed=True)
        worker.write(collector.engine)  # too early
        assert ("gradwatch_task_failures_total", "gradwatch.judge") not in values(collector) or _
        worker.write(collector.engine, at_once=True)
        worker.write(collector.engine, at_once=True)  # nothing twice
    found = values(collector)
    buckets = {
        key[1]: value
        for key, value in found.items()
        if key[0] == "gradwatch_task_duration_seconds_bucket"
    }
    assert list(buckets) == list(NAMES)
    assert (buckets["0.01"], buckets["0.05"], buckets["120.0"], buckets["+Inf"]) == (0, 2, 2, 4)
    assert found["gradwatch_task_duration_seconds_sum", "gradwatch.judge"] == pytest.approx(1400.04)
    assert found["gradwatch_task_failures_total", "gradwatch.judge"] == 2


def test_a_line_for_people_ends_with_what_it_belongs_to():
    record = logging.LogRecord("x", logging.INFO, "", 0, "sent %d", (3,), None)
    record.seconds = 0.5
    token = logs.AT.set({"task_id": "gradwatch.judge/7"})
    try:
        assert (
            logs.TextLines()
            .format(record)
            .endswith("sent 3  [task_id=gradwatch.judge/7 seconds=0.5]")
        )
        line = json.loads(logs.JsonLines().format(record))
    finally:
        logs.AT.reset(token)
    assert (line["message"], line["task_id"], line["seconds"]) == (
        "sent 3",
        "gradwatch.judge/7",
        0.5,
    )


@pytest.mark.slow
def test_the_command_logs_json_where_it_is_asked_to(tmp_path, free_port, wait_until):
    import urllib3

    port = free_port()
    environ = os.environ | {
        "GRADWATCH_DATA_DIR": str(tmp_path),
        "GRADWATCH_LOG_FORMAT": "json",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "gradwatch_server", "--port", str(port)],
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
    )

    def status(path: str) -> int:
        try:
            return urllib3.request("GET", f"http://127.0.0.1:{port}{path}", retries=False).status
        except urllib3.exceptions.HTTPError:
            return 0

    wait_until(lambda: status("/healthz") == 200, "its start")
    assert status("/nowhere") == 404
    process.terminate()
    _, written = process.communicate(timeout=20)
    lines = [json.loads(line) for line in written.splitlines()]
    (refused,) = [line for line in lines if line["message"] == "GET /nowhere: 404"]
    assert refused["request_id"]
    assert [line for line in lines if line["logger"].startswith("uvicorn")]


def test_an_application_in_use_twice_counts_apart(database_url):
    engine = open_database(database_url)
    migrate(engine)
    engine.dispose()
    from gradwatch_server.settings import Settings

    apps = [create_app(Settings(database_url=database_url)) for _ in range(2)]
    assert apps[0].state.telemetry is not apps[1].state.telemetry
