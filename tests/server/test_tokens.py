"""Tokens: who may do what, in which project, and how often."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import select
from sqlalchemy.orm import Session
from synthetic_runs import dense, healthy, manifest, new_run

from gradwatch.client import Client, CollectorError
from gradwatch.wire.frame import RunInfo
from gradwatch_server import tokens
from gradwatch_server.database import writing
from gradwatch_server.models import TokenRow
from gradwatch_server.token_commands import token as token_command

ADMIN = "a-long-random-text"


@pytest.fixture
def guarded(start_collector: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A collector with a token of its own, which its client holds; nothing is remembered."""
    monkeypatch.setattr(tokens, "REMEMBER_S", 0.0)
    return start_collector(server_token=ADMIN)


def holder(collector: Any, *scopes: str, project: str | None = None) -> Client:
    made = collector.client.create_token("a test", scopes, project)
    return Client(collector.url, made.token)


def refused(ask: Any, *given: Any, **named: Any) -> int:
    with pytest.raises(CollectorError) as caught:
        ask(*given, **named)
    return caught.value.status


def run_of(collector: Any, **facts: Any) -> RunInfo:
    collector.store(run := new_run(**facts), [manifest(dense(2)), *healthy([1], 2)])
    return run


def as_bearer(collector: Any, client: Client) -> dict[str, str]:
    return {"Authorization": client._headers["Authorization"]}


def test_a_token_to_read_cannot_change_anything(guarded):
    run = run_of(guarded)
    reader = holder(guarded, "read")
    assert reader.run(run.id).last_step == 1
    assert refused(reader.delete_run, run.id) == 403
    assert refused(reader.finish_run, run.id) == 403
    assert refused(reader.change_run, run.id, notes="x") == 403
    assert refused(reader.tokens) == 403
    assert refused(reader.channels) == 403
    assert guarded.client.run(run.id).notes == ""


def test_a_token_to_ingest_cannot_read(guarded):
    run = run_of(guarded)
    sender = holder(guarded, "ingest")
    assert (
        guarded.request(
            "PUT",
            f"/api/v1/runs/{run.id}",
            json.dumps(
                {"id": run.id, "project": run.project, "name": run.name, "started_at": 1.0}
            ).encode(),
            **as_bearer(guarded, sender),
        ).status
        == 200
    )
    assert refused(sender.runs) == 403
    assert refused(sender.run, run.id) == 403
    assert sender.finish_run(run.id).status == "finished"


def test_a_refusal_names_the_scope_that_is_missing(guarded):
    with pytest.raises(CollectorError, match="needs the scope admin; the token has read"):
        holder(guarded, "read").tokens()


def test_a_token_of_a_project_sees_and_reaches_no_other(guarded):
    mine, other = run_of(guarded, project="mine"), run_of(guarded, project="other")
    client = holder(guarded, "admin", project="mine")
    assert [view.info.id for view in client.runs().runs] == [mine.id]
    assert client.runs(project="other").runs == []
    for ask in (
        client.run,
        client.findings,
        client.manifests,
        client.delete_run,
        client.events,
        client.finish_run,
        lambda run: client.heatmap(run, "SGD"),
        lambda run: client.histograms(run, "SGD", "0.weight"),
        lambda run: client.flow(run, "SGD"),
        lambda run: client.scalars(run, "SGD"),
        lambda run: client.frames(run, "SGD"),
        lambda run: client.compare([mine.id, run]),
        lambda run: client.change_run(run, notes="x"),
    ):
        assert refused(ask, other.id) == 404
    assert client.run(mine.id).info.project == "mine"
    assert guarded.client.run(other.id).last_step == 1


def test_a_token_of_a_project_is_told_nothing_of_all_of_them(guarded):
    run_of(guarded, project="other", name="their secret")
    client = holder(guarded, "admin", project="mine")
    answer = guarded.get("/metrics", **as_bearer(guarded, client))
    assert answer.problem.status == 403
    assert "'mine'" in answer.problem.detail
    assert client.all_findings().findings == []
    assert b"their secret" in guarded.get("/metrics").body


def test_a_token_of_a_project_cannot_write_to_another(guarded):
    other = run_of(guarded, project="other")
    sender = as_bearer(guarded, holder(guarded, "ingest", project="mine"))
    body = b'[{"type":"end","rank":0,"time":1.0,"status":"failed"}]'
    path = f"/api/v1/runs/{other.id}/records"
    told = guarded.request("POST", path, body, **sender, **{"Content-Type": "application/json"})
    assert told.problem.status == 404
    assert guarded.client.run(other.id).status != "failed"
    new = new_run(project="other")
    facts = {"id": new.id, "project": "other", "name": "x", "started_at": 1.0}
    told = guarded.request("PUT", f"/api/v1/runs/{new.id}", json.dumps(facts).encode(), **sender)
    assert told.problem.status == 403


def test_a_token_of_a_project_makes_none_for_others_and_sees_none(guarded):
    guarded.client.create_token("of another", ["read"], "other")
    client = holder(guarded, "admin", project="mine")
    assert client.create_token("more", ["read"]).view.project == "mine"
    assert refused(client.create_token, "more", ["admin"], "other") == 403
    assert {view.project for view in client.tokens()} == {"mine"}
    (other,) = [view for view in guarded.client.tokens() if view.project == "other"]
    assert refused(client.revoke_token, other.key) == 404


def test_a_revoked_token_is_worth_nothing(guarded):
    made = guarded.client.create_token("gone soon", ["read"])
    client = Client(guarded.url, made.token)
    assert client.runs().runs == []
    guarded.client.revoke_token(made.view.key)
    assert refused(client.runs) == 401
    (view,) = [view for view in guarded.client.tokens() if view.key == made.view.key]
    assert view.revoked_at


def test_what_is_kept_of_a_token_does_not_let_anybody_in(guarded):
    made = guarded.client.create_token("kept", ["admin"])
    secret = made.token.split("_", 2)[2]
    with Session(guarded.engine) as session:
        row = session.scalars(select(TokenRow)).one()
        kept = [str(value) for value in vars(row).values()]
        assert not [value for value in kept if secret in value]
        forged = f"gw_{row.key}_{row.digest.hex()}"
    assert refused(Client(guarded.url, forged).runs) == 401
    assert secret not in json.dumps(json.loads(guarded.get("/api/v1/tokens").body))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t + "x",
        lambda t: t[:-1],
        lambda t: t.upper(),
        lambda t: "gw__" + t,
        lambda t: t.replace("gw", "wg"),
    ],
)
def test_a_token_that_is_almost_right_is_wrong(guarded, spoil):
    made = guarded.client.create_token("close", ["read"])
    assert refused(Client(guarded.url, spoil(made.token)).runs) == 401


def test_the_last_use_is_written_down(guarded):
    made = guarded.client.create_token("used", ["read"])
    assert made.view.last_used_at is None
    Client(guarded.url, made.token).runs()
    (view,) = guarded.client.tokens()
    assert view.last_used_at
    assert view.last_used_at >= view.created_at


@pytest.mark.parametrize("scopes", [[], ["write"], ["read", "read", "read", "read"]])
def test_scopes_that_do_not_exist_are_refused(guarded, scopes):
    assert refused(guarded.client.create_token, "x", scopes) == 422


def test_on_loopback_nobody_needs_a_token_until_one_was_made(start_collector, monkeypatch):
    monkeypatch.setattr(tokens, "REMEMBER_S", 0.0)
    collector = start_collector()
    run = run_of(collector)
    made = collector.client.create_token("the first", ["admin"])
    assert refused(Client(collector.url).run, run.id) == 401
    client = Client(collector.url, made.token)
    assert client.run(run.id).last_step == 1
    client.revoke_token(made.view.key)
    assert Client(collector.url).run(run.id).last_step == 1


def test_a_token_that_sends_too_often_is_told_to_wait(start_collector):
    collector = start_collector(server_token=ADMIN, requests_a_s=2.0)
    statuses = [collector.get("/api/v1/runs").status for _ in range(12)]
    assert statuses[:2] == [200, 200]
    limited = collector.get("/api/v1/runs")
    assert limited.problem.status == 429
    assert limited.headers["Retry-After"]
    assert "GRADWATCH_REQUESTS_A_S" in limited.problem.detail


def test_whoever_keeps_asking_still_gets_his_rate(monkeypatch, start_collector):
    now = [100.0]
    monkeypatch.setattr(tokens, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    engine = start_collector().engine
    ring = tokens.Keyring(engine, ADMIN, guarded=True, requests_a_s=10.0)
    granted = 0
    for _ in range(1000):
        now[0] += 0.02
        try:
            ring.admit(f"Bearer {ADMIN}")
        except tokens.TooManyRequestsError:
            continue
        granted += 1
    assert granted == pytest.approx(20 * 10 + 20, abs=3)


def test_the_scheme_of_a_token_is_written_in_any_case(start_collector):
    collector = start_collector(server_token=ADMIN)
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert collector.get("/api/v1/runs", Authorization=f"{scheme} {ADMIN}").status == 200
    for given in (ADMIN, f"Basic {ADMIN}", "Bearer", "Bearer  "):
        assert collector.get("/api/v1/runs", Authorization=given).status == 401


def test_other_sites_are_not_let_in(start_collector):
    collector = start_collector()
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "DELETE"}
    answer = collector.request("OPTIONS", "/api/v1/runs", **asked)
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    run = run_of(collector)
    path = f"/api/v1/runs/{run.id}/finish"
    simple = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    assert collector.request("POST", path, b"{}", **simple).problem.status == 403
    assert collector.client.run(run.id).status != "finished"
    own = {"Origin": collector.url}
    assert collector.request("POST", path, b"{}", **own).status == 200


def command(database_url: str, *arguments: str) -> Any:
    environ = {"GRADWATCH_DATABASE_URL": database_url}
    return CliRunner().invoke(token_command, arguments, env=environ)


def test_the_command_makes_lists_and_revokes(start_collector, monkeypatch):
    monkeypatch.setattr(tokens, "REMEMBER_S", 0.0)
    collector = start_collector()
    url = collector.settings.database
    made = command(url, "create", "--scope", "read", "--project", "vision", "a team")
    assert made.exit_code == 0, made.output
    text = made.stdout.strip()
    assert "not shown again" in made.stderr
    assert Client(collector.url, text).runs().runs == []
    key = text.split("_")[1]
    listed = command(url, "list").output
    assert key in listed
    assert "a team" in listed
    assert "vision" in listed
    assert "good" in listed
    assert text.split("_", 2)[2] not in listed
    assert command(url, "revoke", key).exit_code == 0
    assert "revoked" in command(url, "list").output
    wrong = command(url, "revoke", "0" * 12)
    assert wrong.exit_code == 1
    assert "gradwatch token list" in wrong.output


def test_a_database_that_is_not_there_is_named_without_its_password():
    told = command("postgresql://me:hidden@127.0.0.1:9/none", "list")
    assert told.exit_code == 1
    assert "127.0.0.1:9" in told.output
    assert "hidden" not in told.output


def test_beyond_loopback_a_collector_starts_once_a_token_was_made(
    start_collector, free_port, wait_until
):
    url = start_collector().settings.database
    environ = os.environ | {"GRADWATCH_DATABASE_URL": url}
    serve = [sys.executable, "-m", "gradwatch_server", "--host", "0.0.0.0", "--port"]
    refusal = subprocess.run([*serve, "0"], env=environ, capture_output=True, text=True, timeout=60)
    assert refusal.returncode == 1
    assert "gradwatch token create --scope admin" in refusal.stderr
    text = command(url, "create", "--scope", "admin", "me").stdout.strip()
    port = free_port()
    process = subprocess.Popen([*serve, str(port)], env=environ, stderr=subprocess.DEVNULL)
    try:
        client = Client(f"http://127.0.0.1:{port}", text)
        wait_until(client.ready, "its start")
        (view,) = client.tokens()
        assert refused(Client(client.url).runs) == 401
        client.revoke_token(view.key)
        # The last token is gone, and still nobody is let in without one.
        assert refused(Client(client.url).runs) == 401
    finally:
        process.terminate()
        process.wait(20)


def test_a_scope_that_does_not_exist_is_named(start_collector):
    engine = start_collector().engine
    with writing(engine) as session, pytest.raises(tokens.TokenError, match="'write'"):
        tokens.issue(session, "x", ["write"], None)
