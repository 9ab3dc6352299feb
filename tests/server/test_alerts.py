"""An alert arrives, once, with all that one needs to act; and what goes wrong is kept."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update
from synthetic_runs import dense, detail, healthy, manifest, new_run

from gradwatch_server import addresses, alerts, notifier
from gradwatch_server.alerts import deliver_due
from gradwatch_server.channels import channel_digest
from gradwatch_server.database import writing
from gradwatch_server.models import Alert
from gradwatch_server.notifier import ChannelError, check_channel

DASHBOARD = "http://dash.example"


Deliver = Callable[[], int]


@pytest.fixture
def broken_run(start_collector, webhook) -> tuple[Any, Any, Deliver]:
    """A collector with an alert in its outbox, the run, and what sends it."""
    collector = start_collector(notify=webhook.url)
    run = new_run(name="resnet", project="vision")
    lost = detail(7, np.full(4, 0.01), broken=[3, 0, 2, 0], loss=float("nan"))
    collector.store(run, [manifest(dense(4)), *healthy(range(7)), lost])
    return (
        collector,
        run,
        lambda: deliver_due(collector.engine, [webhook.url], DASHBOARD, local=True),
    )


def due_now(collector: Any) -> None:
    """Let the time until the next attempt pass."""
    with writing(collector.engine) as session:
        session.execute(update(Alert).values(next_try_at=0.0))


def test_the_message_says_run_layer_step_evidence_and_action(broken_run, webhook):
    _, run, deliver = broken_run
    assert deliver() == 1
    (message,) = webhook.received
    assert message["title"] == "[critical] Non-finite values in resnet (vision)"
    assert message["type"] == "failure"
    for part in (
        "resnet",
        run.id[:8],
        "2.weight",
        "first 7",
        "non-finite elements: 5",
        "What to try: ",
        f"{DASHBOARD}/?run={run.id}",
    ):
        assert part in message["message"], message["message"]


def test_what_resolved_is_told_as_resolved_without_advice(broken_run, webhook):
    collector, run, deliver = broken_run
    collector.post(run, healthy(range(8, 100)))
    collector.judge()
    assert deliver() == 2
    opened, resolved = webhook.received
    assert opened["title"].startswith("[critical]")
    assert resolved["title"].startswith("[resolved]")
    assert resolved["type"] == "info"
    assert "What to try" not in resolved["message"]


def test_it_is_sent_once_though_delivery_runs_twice(broken_run, webhook):
    collector, _, deliver = broken_run
    assert [deliver(), deliver()] == [1, 0]
    assert len(webhook.received) == 1
    (alert,) = collector.alerts()
    assert (alert.state, alert.attempts, alert.last_error) == ("sent", 1, "")
    assert alert.sent_at is not None


def test_it_is_sent_once_though_four_workers_deliver_at_once(broken_run, webhook):
    _, _, deliver = broken_run
    webhook.hold = threading.Event()
    threading.Timer(0.3, webhook.hold.set).start()
    with ThreadPoolExecutor(4) as pool:
        sent = list(pool.map(lambda _: deliver(), range(4)))
    assert sorted(sent) == [0, 0, 0, 1]
    assert len(webhook.received) == 1


def test_a_slow_channel_does_not_hold_the_lease_of_the_alerts_behind_it(broken_run, webhook):
    collector, run, deliver = broken_run
    collector.post(run, healthy(range(8, 100)))
    collector.judge()
    webhook.hold = threading.Event()
    worker = threading.Thread(target=deliver)
    worker.start()
    while not webhook.received:
        pass
    held, behind = collector.alerts()
    webhook.hold.set()
    worker.join()
    assert held.next_try_at > 0
    assert behind.next_try_at == 0


def test_a_failed_delivery_is_tried_again_later(broken_run, webhook):
    collector, _, deliver = broken_run
    webhook.statuses = [500, 200]
    assert deliver() == 0
    (alert,) = collector.alerts()
    assert (alert.state, alert.attempts) == ("pending", 1)
    assert alert.last_error
    assert deliver() == 0  # too early
    assert len(webhook.received) == 1
    due_now(collector)
    assert deliver() == 1
    (alert,) = collector.alerts()
    assert (alert.state, alert.attempts, alert.last_error) == ("sent", 2, "")


def test_each_failure_waits_longer_until_it_gives_up_and_keeps_the_error(broken_run, webhook):
    collector, _, deliver = broken_run
    webhook.statuses = [500] * 100
    waits: list[float] = []
    for attempt in range(1, alerts.MAX_ATTEMPTS + 1):
        due_now(collector)
        before = alerts.time.time()
        assert deliver() == 0
        (alert,) = collector.alerts()
        assert alert.attempts == attempt
        waits.append(alert.next_try_at - before)
    assert waits[0] == pytest.approx(alerts.FIRST_RETRY_S, abs=1)
    assert waits == sorted(waits)
    assert max(waits) <= alerts.MAX_RETRY_S + 1
    assert alert.state == "failed"
    assert alert.last_error
    due_now(collector)
    assert deliver() == 0
    assert len(webhook.received) == alerts.MAX_ATTEMPTS


def test_a_worker_killed_while_sending_is_replaced_when_its_lease_ends(broken_run, webhook):
    collector, _, deliver = broken_run
    alerts._claim(collector.engine)
    assert deliver() == 0
    due_now(collector)
    assert deliver() == 1
    assert collector.alerts()[0].attempts == 2


def test_a_channel_that_is_gone_from_the_settings_fails_with_that_reason(broken_run):
    collector, _, _ = broken_run
    assert deliver_due(collector.engine, [], DASHBOARD, local=True) == 0
    (alert,) = collector.alerts()
    assert alert.state == "failed"
    assert "no longer configured" in alert.last_error


def test_one_dead_channel_does_not_keep_another_waiting(start_collector, webhook):
    dead = "json://127.0.0.1:9/alerts"
    collector = start_collector(notify=f"{dead} {webhook.url}")
    lost = detail(0, [0.1] * 4, broken=1)
    collector.store(new_run(), [manifest(dense(4)), lost])
    assert deliver_due(collector.engine, [dead, webhook.url], DASHBOARD, local=True) == 1
    states = {alert.channel: alert.state for alert in collector.alerts()}
    assert states == {channel_digest(dead): "pending", channel_digest(webhook.url): "sent"}


def test_a_redirect_is_not_followed(broken_run, webhook):
    collector, _, deliver = broken_run
    webhook.statuses = [302] * 4
    webhook.location = f"http://127.0.0.1:{webhook.port}/elsewhere"
    deliver()
    assert "/elsewhere" not in webhook.paths
    assert collector.alerts()[0].state == "pending"


def test_the_database_keeps_no_channel_url(broken_run):
    collector, _, _ = broken_run
    assert collector.alerts()[0].channel == channel_digest(collector.settings.notify)
    assert "://" not in collector.alerts()[0].channel


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        f"exec://{SECRET}",
        f"file:///tmp/{SECRET}",
        f"python://{SECRET}",
        f"syslog://{SECRET}",
        f"dbus://{SECRET}",
        f"json://user:{SECRET}@host/?template=/etc/passwd",
        f"json://user:{SECRET}@host/?Template=/etc/passwd",
        f"json://user:{SECRET}@host/?a=1&redirect=yes",
        f"json://user:{SECRET}@host/?%72edirect=yes",
        f"json://user:{SECRET}@host?redirect=yes",
        f"json://user:{SECRET}@host/#a?redirect=yes",
        f"EXEC://{SECRET}",
        f" exec://{SECRET}",
        f"hooks.example/{SECRET}",
        SECRET,
        "json://",
        f"slack://{SECRET}",
        f"json://[{SECRET}",
        "",
    ],
)
def test_a_channel_that_runs_code_reads_files_or_cannot_work_is_refused(url):
    with pytest.raises(ChannelError) as caught:
        check_channel(url)
    assert str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "json://host/path",
        "jsons://user:password@host:8443/path?+X-Header=1",
        "ntfy://topic",
        "mailto://user:password@example.org",
        "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#general",
        "discord://4174216298/JHMHI8qBe7bk2ZwO5U711o3dV_js",
    ],
)
def test_a_channel_over_http_or_mail_is_accepted(url):
    check_channel(url)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "169.254.169.254", "[fe80::1]"],
)
def test_alerts_go_to_no_address_of_this_machine_or_its_link_unless_allowed(
    start_collector, webhook, host
):
    url = f"json://{host}:{webhook.port}/alerts"
    collector = start_collector(notify=url)
    lost = detail(1, np.full(4, 0.01), broken=1.0)
    collector.store(new_run(), [manifest(dense(4)), lost])
    assert deliver_due(collector.engine, [url], "") == 0
    assert webhook.paths == []
    (alert,) = collector.alerts()
    assert "GRADWATCH_NOTIFY_LOCAL" in alert.last_error


def test_a_mail_server_on_this_machine_is_asked_for_too():
    url = "mailto://me:secret@example.org?smtp=127.0.0.1&to=you@example.org"
    assert notifier.send(url, "t", "b", "info", local=False) == notifier.TOO_NEAR


def test_a_token_in_the_place_of_a_host_is_looked_up_nowhere(monkeypatch):
    looked_up: list[str] = []
    monkeypatch.setattr(notifier, "leads_near", looked_up.append)
    monkeypatch.setattr(notifier, "_taken", lambda *_: None)
    url = "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#general"
    assert notifier.send(url, "t", "b", "info", local=False) is None
    assert looked_up == []


def test_a_name_that_leads_elsewhere_once_it_was_checked_is_not_followed(monkeypatch, webhook):
    far = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 80))]
    answers = [far]
    real = addresses._look_up  # pyright: ignore[reportPrivateUsage]

    def look_up(host: str, *given: Any, **named: Any) -> Any:
        return answers.pop() if answers else real("127.0.0.1", *given, **named)

    monkeypatch.setattr(addresses, "_look_up", look_up)
    url = f"json://rebound.example:{webhook.port}/alerts"
    assert notifier.send(url, "t", "b", "info", local=False) == notifier.TOO_NEAR
    assert answers == []
    assert webhook.paths == []
    assert notifier.send(url, "t", "b", "info", local=True) is None
    assert webhook.paths == ["/alerts"]


def test_what_a_plugin_raises_is_told_without_the_secrets_in_it(monkeypatch):
    class Failing:
        host = "hooks.example"

        def notify(self, **_: Any) -> bool:
            raise RuntimeError(f"could not reach json://hooks.example/{SECRET}")

    monkeypatch.setattr(notifier, "_notifier", lambda _: Failing())
    told = notifier.send(f"json://hooks.example/{SECRET}", "t", "b", "info", local=True)
    assert told is not None
    assert "RuntimeError" in told
    assert SECRET not in told
