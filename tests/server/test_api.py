"""The HTTP API as a whole: paging, tokens, errors, its own description."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from synthetic_runs import OPTIMIZER, dense, healthy, manifest, new_run

from gradwatch.client import CollectorError
from gradwatch.wire.frame import RunEnd
from gradwatch_server.__main__ import is_loopback

TOKEN = "a-long-random-text"


def routes(collector: Any) -> list[tuple[str, str]]:
    """Method and path of all that the collector serves."""
    schema = json.loads(collector.get("/openapi.json").body)
    return [(method.upper(), path) for path, item in schema["paths"].items() for method in item]


def test_runs_are_listed_newest_first_page_by_page(collector):
    runs = [new_run(name=f"run {number}") for number in range(5)]
    for run in runs:
        collector.put(run)
    names: list[str] = []
    path = "/api/v1/runs?limit=2"
    while path:
        page = json.loads(collector.get(path).body)
        assert len(page["runs"]) <= 2
        names += [view["info"]["name"] for view in page["runs"]]
        path = page["next"] and f"/api/v1/runs?limit=2&after={page['next']}"
    assert names == [run.name for run in reversed(runs)]


def test_runs_that_come_while_paging_shift_nothing(collector):
    for number in range(4):
        collector.put(new_run(name=str(number)))
    first = json.loads(collector.get("/api/v1/runs?limit=2").body)
    collector.put(new_run(name="late"))
    second = collector.client.runs(after=first["next"])
    assert [view.info.name for view in second.runs] == ["1", "0"]


def test_runs_of_one_project_are_listed_alone(collector):
    collector.put(new_run(project="a"))
    collector.put(new_run(project="b"))
    assert [view.info.project for view in collector.client.runs(project="b").runs] == ["b"]


def test_a_run_that_ended_says_how(collector):
    finished, failed = new_run(), new_run()
    collector.store(finished, [RunEnd(rank=0, time=1.0, status="finished")])
    collector.store(failed, [RunEnd(rank=1, time=1.0, status="failed", reason="KeyError: 'x'")])
    collector.post(failed, [RunEnd(rank=0, time=2.0, status="finished")])
    assert collector.client.run(finished.id).status == "finished"
    assert collector.client.run(failed.id).status == "failed"
    assert collector.client.run(failed.id).reason == "KeyError: 'x'"


def test_a_run_without_a_frame_for_a_while_is_silent(start_collector):
    collector = start_collector(silent_after_s=0.0)
    collector.store(run := new_run(), [manifest(dense(2)), *healthy([1], 2)])
    assert collector.client.run(run.id).status == "silent"


def test_without_the_token_every_route_of_data_is_closed(start_collector):
    collector = start_collector(server_token=TOKEN)
    collector.put(new_run())
    collector.token = ""
    open_to_all: set[str] = set()
    for method, path in routes(collector):
        answer = collector.request(method, path.replace("{run}", new_run().id))
        if answer.status == 401:
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert "GRADWATCH_TOKEN" in answer.problem.detail
        else:
            open_to_all.add(path)
    assert open_to_all == {"/healthz", "/readyz"}


@pytest.mark.parametrize(
    "given", [f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, "Bearer ", "é"]
)
def test_another_token_is_refused(start_collector, given):
    collector = start_collector(server_token=TOKEN)
    header = given.encode().decode("latin-1")
    assert collector.get("/api/v1/runs", Authorization=header).status == 401


def test_the_token_opens_everything(start_collector):
    collector = start_collector(server_token=TOKEN)
    collector.store(run := new_run(), [manifest(dense(2)), *healthy([1], 2)])
    assert collector.client.run(run.id).last_step == 1
    assert collector.get("/metrics").status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("DELETE", "/api/v1/runs", 405),
        ("GET", "/api/v1/runs/xyz", 422),
        ("GET", "/api/v1/runs/" + "0" * 32, 404),
        ("GET", "/api/v1/runs/" + "0" * 32 + "/findings", 404),
        ("GET", "/api/v1/runs/" + "0" * 32 + "/heatmap", 422),
        ("GET", "/api/v1/runs?limit=0", 422),
        ("GET", "/api/v1/runs?limit=101", 422),
        ("GET", f"/api/v1/runs?after={2**70}", 422),
        ("GET", "/api/v1/runs?after=a", 422),
        ("GET", "/api/v1/runs/" + "0" * 32 + f"/heatmap?optimizer=A&first={2**70}", 422),
        ("GET", "/api/v1/runs/" + "0" * 32 + f"/flow?optimizer=A&step={-1}", 422),
        ("GET", "/api/v1/runs/" + "0" * 32 + "/scalars?optimizer=A&columns=2001", 422),
    ],
)
def test_every_error_is_a_problem_that_says_what_is_wrong(collector, method, path, status):
    answer = collector.request(method, path)
    assert answer.status == status
    assert answer.problem.detail
    assert answer.problem.title


def test_names_that_a_database_refuses_are_simply_not_found_or_refused(collector):
    collector.store(run := new_run(), [manifest(dense(2)), *healthy([1], 2)])
    assert collector.get("/api/v1/runs?project=%00").status in (200, 422)
    path = f"/api/v1/runs/{run.id}/heatmap"
    assert collector.get(f"{path}?optimizer=%00").problem.status in (404, 422)
    assert collector.get(f"{path}?optimizer={OPTIMIZER}&statistic=%00").problem.status == 404


def test_a_failure_of_our_own_is_a_problem_too_and_tells_no_secrets(collector, monkeypatch):
    def fail(*_: Any) -> Any:
        raise LookupError("postgresql://user:secret@host")

    monkeypatch.setattr("gradwatch_server.access.find_run", fail)
    answer = collector.get("/api/v1/runs/" + "0" * 32, Connection="close")
    assert answer.problem.status == 500
    assert b"secret" not in answer.body


def test_openapi_describes_every_route(collector):
    described = routes(collector)
    served = {
        (method, route.path)
        for route in collector.app.routes
        for method in getattr(route, "methods", None) or ()
        if getattr(route, "include_in_schema", False) and method != "HEAD"
    }
    assert served <= set(described)
    assert ("POST", "/api/v1/runs/{run}/records") in described
    schema = json.loads(collector.get("/openapi.json").body)
    for item in schema["paths"].values():
        for operation in item.values():
            assert operation["summary"]
            assert operation["responses"]


def test_openapi_says_how_a_token_is_sent(collector):
    schema = json.loads(collector.get("/openapi.json").body)
    (name,) = [name for item in schema["security"] for name in item]
    assert schema["components"]["securitySchemes"][name]["scheme"] == "bearer"


def test_openapi_says_what_an_error_looks_like(collector):
    schema = json.loads(collector.get("/openapi.json").body)
    for path, item in schema["paths"].items():
        for operation in item.values():
            assert "HTTPValidationError" not in json.dumps(operation), path
            content = operation["responses"]["default"]["content"]
            assert "detail" in json.dumps(content["application/problem+json"]), path


def test_the_collector_is_ready_only_while_its_database_answers(
    database_kind, postgres_of, start_collector
):
    collector = start_collector()
    assert collector.get("/healthz").status == 200
    assert collector.get("/readyz").status == 200
    if database_kind == "sqlite":
        return
    postgres_of.drop_connections(collector.settings.database)
    answer = collector.get("/readyz")
    assert answer.problem.status == 503
    assert answer.headers["Retry-After"]
    assert collector.get("/healthz").status == 200
    run = new_run()
    assert collector.put(run).problem.status == 503
    postgres_of.let_in_again(collector.settings.database)
    assert collector.get("/readyz").status == 200
    assert collector.put(run).status == 200


@pytest.fixture
def postgres_of(request, database_kind):
    return request.getfixturevalue("postgres") if database_kind == "postgresql" else None


def test_nobody_who_is_not_there_is_waited_for_long():
    from gradwatch.client import Client

    client = Client("http://127.0.0.1:9", timeout_s=1.0)
    assert not client.ready()
    with pytest.raises(CollectorError, match="no answer"):
        client.runs()


@pytest.mark.parametrize(
    ("host", "safe"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("example.org", False),
    ],
)
def test_loopback_is_where_nobody_else_can_reach(host, safe):
    assert is_loopback(host) is safe


def serve(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradwatch_server", *arguments],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_collector_for_others_without_a_token_refuses_to_start(tmp_path):
    done = serve("--host", "0.0.0.0", GRADWATCH_DATA_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "GRADWATCH_SERVER_TOKEN" in done.stderr


def test_a_collector_with_a_channel_that_runs_code_refuses_to_start(tmp_path):
    done = serve(GRADWATCH_NOTIFY="exec://touch", GRADWATCH_DATA_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "'exec'" in done.stderr


def test_a_setting_that_is_no_number_is_named():
    done = serve(GRADWATCH_JUDGE_EVERY_S="often")
    assert done.returncode == 1
    assert "GRADWATCH_JUDGE_EVERY_S" in done.stderr
    assert "Traceback" not in done.stderr
