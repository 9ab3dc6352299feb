"""Channels made over the API: whose alerts they get, and that nobody is told their secrets."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text
from synthetic_runs import dense, detail, manifest, new_run

from gradwatch.client import Client, CollectorError
from gradwatch_server import channels
from gradwatch_server.alerts import deliver_due

SECRET = "s3cr3t-token"
MASTER = "a-test-token"


def refused(ask: Any, *given: Any, **named: Any) -> CollectorError:
    with pytest.raises(CollectorError) as caught:
        ask(*given, **named)
    assert SECRET not in str(caught.value)
    return caught.value


def break_a_run(collector: Any, project: str) -> None:
    """Store a run with a finding that is worth an alert."""
    broken = detail(1, [0.01] * 4, broken=1.0)
    collector.store(new_run(project=project), [manifest(dense(4)), broken])


def deliver(collector: Any) -> int:
    return deliver_due(collector.engine, collector.settings.channels, "", local=True)


def own_url(webhook: Any, path: str = "alerts") -> str:
    return f"json://user:{SECRET}@127.0.0.1:{webhook.port}/{path}"


@pytest.fixture
def open_collector(start_collector):
    return start_collector(notify_local="allow")


@pytest.fixture
def guarded(start_collector):
    """A collector with a channel in its settings, and a client of scope admin of one project."""
    url = f"json://user:{SECRET}@127.0.0.1:9/none"
    collector = start_collector(server_token=MASTER, notify=url, notify_local="allow")
    made = collector.client.create_token("vision team", ["admin"], project="vision")
    return collector, Client(collector.url, made.token)


def test_a_channel_gets_the_alerts_of_its_project_alone(open_collector, webhook):
    client = open_collector.client
    of_one = client.create_channel("vision", own_url(webhook, "vision"), project="vision")
    of_all = client.create_channel("everything", own_url(webhook, "all"))
    break_a_run(open_collector, "speech")
    assert deliver(open_collector) == 1
    assert webhook.paths == ["/all"]
    break_a_run(open_collector, "vision")
    assert deliver(open_collector) == 2
    assert sorted(webhook.paths) == ["/all", "/all", "/vision"]
    assert [(view.channel, view.sent) for view in client.channels()] == [
        (of_one.channel, 1),
        (of_all.channel, 2),
    ]


def test_it_stands_beside_those_of_the_settings(start_collector, webhook):
    collector = start_collector(notify=webhook.url)
    made = collector.client.create_channel("ours", own_url(webhook, "ours"))
    break_a_run(collector, "vision")
    assert deliver(collector) == 2
    assert sorted(webhook.paths) == ["/alerts", "/ours"]
    fixed, own = collector.client.channels()
    assert (fixed.name, fixed.created_at) == ("GRADWATCH_NOTIFY", None)
    assert own.channel == made.channel
    for change in (
        lambda: collector.client.change_channel(fixed.channel, paused=True),
        lambda: collector.client.delete_channel(fixed.channel),
    ):
        assert refused(change).status == 409


def test_a_paused_channel_gets_nothing_and_a_changed_one_what_waits(open_collector, webhook):
    client = open_collector.client
    made = client.create_channel("ours", "json://127.0.0.1:9/none")
    break_a_run(open_collector, "vision")
    client.change_channel(made.channel, url=own_url(webhook), name="theirs")
    assert deliver(open_collector) == 1
    view = client.change_channel(made.channel, paused=True)
    assert (view.name, view.paused, view.sent) == ("theirs", True, 1)
    break_a_run(open_collector, "vision")
    assert len(open_collector.alerts()) == 1
    client.change_channel(made.channel, paused=False)
    break_a_run(open_collector, "vision")
    client.change_channel(made.channel, paused=True)
    assert deliver(open_collector) == 0
    assert client.channels()[0].last_error == "this channel is paused"


def test_a_deleted_channel_is_gone_and_what_waited_for_it_is_told_so(open_collector, webhook):
    client = open_collector.client
    made = client.create_channel("ours", own_url(webhook))
    break_a_run(open_collector, "vision")
    client.delete_channel(made.channel)
    assert client.channels() == []
    assert deliver(open_collector) == 0
    (alert,) = open_collector.alerts()
    assert (alert.state, alert.last_error) == ("failed", "this channel is no longer configured")
    for ask in (client.delete_channel, client.test_channel, client.change_channel):
        assert refused(ask, made.channel).status == 404


def test_it_is_tried_by_a_test_message(open_collector, webhook):
    client = open_collector.client
    made = client.create_channel("ours", own_url(webhook))
    client.test_channel(made.channel)
    assert [message["title"] for message in webhook.received] == ["[test] gradwatch"]


def test_its_address_is_checked_when_a_message_is_sent(start_collector, webhook):
    collector = start_collector()
    made = collector.client.create_channel("ours", own_url(webhook))
    error = refused(collector.client.test_channel, made.channel)
    assert error.status == 502
    assert "GRADWATCH_NOTIFY_LOCAL" in str(error)
    assert webhook.paths == []


@pytest.mark.parametrize(
    "url",
    [
        f"exec://{SECRET}",
        f"json://user:{SECRET}@host/?template=/etc/passwd",
        f"slack://{SECRET}",
        SECRET,
    ],
)
def test_an_address_that_the_settings_would_not_take_is_refused(open_collector, url, webhook):
    client = open_collector.client
    assert refused(client.create_channel, "bad", url).status == 422
    made = client.create_channel("good", own_url(webhook))
    assert refused(client.change_channel, made.channel, url=url).status == 422
    client.test_channel(made.channel)


def test_no_answer_and_no_log_tells_its_secrets(open_collector, webhook, caplog, capfd):
    client = open_collector.client
    dead = f"json://user:{SECRET}@127.0.0.1:9/{SECRET}"
    made = client.create_channel("dead", dead)
    client.change_channel(made.channel, name="still dead", url=dead)
    assert refused(client.test_channel, made.channel).status == 502
    break_a_run(open_collector, "vision")
    assert deliver(open_collector) == 0
    shown = open_collector.get("/api/v1/channels").body.decode()
    assert "json://****" in shown
    assert SECRET not in shown
    assert SECRET not in caplog.text + "".join(capfd.readouterr())


def test_a_token_of_a_project_has_its_channels_and_no_others(guarded, webhook):
    collector, member = guarded
    all_of_them = collector.client.create_channel("all", own_url(webhook))
    mine = member.create_channel("mine", own_url(webhook))
    assert mine.project == "vision"
    assert [view.channel for view in member.channels()] == [mine.channel]
    assert len(collector.client.channels()) == 3
    assert refused(member.create_channel, "x", own_url(webhook), project="speech").status == 403
    fixed = collector.client.channels()[0]
    for other in (all_of_them, fixed):
        for ask in (member.delete_channel, member.test_channel, member.change_channel):
            assert refused(ask, other.channel).status == 404
    member.test_channel(mine.channel)
    member.delete_channel(mine.channel)
    assert member.channels() == []


def test_only_so_many_are_made(open_collector, webhook, monkeypatch):
    monkeypatch.setattr(channels, "MAX_CHANNELS", 2)
    client = open_collector.client
    for project in ("vision", "vision", None):
        client.create_channel("ours", own_url(webhook), project=project)
    assert refused(client.create_channel, "x", own_url(webhook), project="vision").status == 422
    client.create_channel("ours", own_url(webhook))


def test_the_outbox_keeps_no_address(open_collector, webhook):
    open_collector.client.create_channel("ours", own_url(webhook))
    break_a_run(open_collector, "vision")
    with open_collector.engine.connect() as connection:
        (row,) = connection.execute(text("SELECT * FROM alerts")).all()
    assert SECRET not in str(row)
