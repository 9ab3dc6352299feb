"""Alerts: an outbox in the database, and its delivery through Apprise.

A finding's change and its alerts are written in one transaction. Celery only says "look now": a
lost message costs one tick of the schedule, a killed worker one lease.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from gradwatch.wire.api import FindingView
from gradwatch.wire.frame import RunInfo
from gradwatch_server.channels import ClosedChannelError, address_of, channel_digest, recipients
from gradwatch_server.database import writing
from gradwatch_server.models import FAILED, PENDING, SENT, Alert, FindingRow, Run
from gradwatch_server.notifier import send
from gradwatch_server.views import finding_view, run_info

MAX_ATTEMPTS = 10
FIRST_RETRY_S = 2.0
MAX_RETRY_S = 600.0
# How long a worker may take to send one alert before another one tries.
LEASE_S = 60.0
BATCH = 20


def enqueue(session: Session, finding: FindingRow, change: str, channels: Sequence[str]) -> None:
    """Write one alert for each channel, to be sent after the commit; none of a muted finding.

    channels: the settings' URLs; those of the database that want the run's alerts come beside.
    """
    if finding.muted_at is not None:
        return
    now = time.time()
    for channel in (*map(channel_digest, channels), *recipients(session, finding.run_id)):
        session.add(
            Alert(
                finding_id=finding.id,
                occurrence=finding.occurrence,
                change=change,
                channel=channel,
                created_at=now,
            )
        )


def deliver_due(
    engine: Engine, channels: Sequence[str], dashboard_url: str, local: bool = False
) -> int:
    """Send the alerts that are due. Returns how many were sent.

    channels: the settings' URLs. local: whether they may go to this machine or its own link.
    """
    sent = 0
    for _ in range(BATCH):
        # One at a time: a slow channel must not outlast the lease of the alerts behind it.
        alert_id = _claim(engine)
        if alert_id is None:
            break
        with Session(engine) as session:
            alert = session.get(Alert, alert_id)
            if alert is None:
                continue
            title, body, severity = _message(session, alert, dashboard_url)
            try:
                url, closed = address_of(session, alert.channel, channels), None
            except ClosedChannelError as reason:
                url, closed = "", str(reason)
        error = closed or send(url, title, body, severity, local)
        sent += error is None
        _note(engine, alert_id, error, final=closed is not None)
    return sent


def _claim(engine: Engine) -> int | None:
    """Take the next due alert for this worker; None when there is none.

    Whoever moves `next_try_at` first has it; the others look for the next one.
    """
    now = time.time()
    with writing(engine) as session:
        due = select(Alert.id).where(Alert.state == PENDING, Alert.next_try_at <= now)
        # Workers that come together step over each other's; SQLite has one writer anyway.
        next_due = due.order_by(Alert.id).limit(1).with_for_update(skip_locked=True)
        alert_id = session.scalar(next_due)
        if alert_id is not None:
            session.execute(
                update(Alert)
                .where(Alert.id == alert_id)
                .values(next_try_at=now + LEASE_S, attempts=Alert.attempts + 1)
            )
        return alert_id


def _note(engine: Engine, alert_id: int, error: str | None, final: bool) -> None:
    now = time.time()
    with writing(engine) as session:
        alert = session.get(Alert, alert_id)
        if alert is None:
            return
        if error is None:
            alert.state, alert.sent_at, alert.last_error = SENT, now, ""
            return
        alert.last_error = error
        alert.next_try_at = now + min(FIRST_RETRY_S * 2 ** (alert.attempts - 1), MAX_RETRY_S)
        if final or alert.attempts >= MAX_ATTEMPTS:
            alert.state = FAILED


def _message(session: Session, alert: Alert, dashboard_url: str) -> tuple[str, str, str]:
    """Title, body and severity of an alert's message."""
    finding = session.get_one(FindingRow, alert.finding_id)
    run = session.get_one(Run, finding.run_id)
    return compose(run_info(run), finding_view(finding, run.key), alert.change, dashboard_url)


def compose(
    run: RunInfo, finding: FindingView, change: str, dashboard_url: str
) -> tuple[str, str, str]:
    """The words of an alert: what, where, since when, the numbers, and what to do."""
    resolved = change == "resolved"
    word = "resolved" if resolved else finding.severity
    found = ": its origin" if change == "located" else ""
    title = f"[{word}] {finding.title}{found} in {run.name} ({run.project})"
    layers = ", ".join(finding.layers[:3])
    more = f" and {len(finding.layers) - 3} more" if len(finding.layers) > 3 else ""
    lines = [
        finding.summary,
        "",
        f"Run: {run.name} ({run.id[:8]}), optimizer {finding.optimizer}",
        *([f"Layer: {layers}{more}"] if layers else []),
        f"Step: first {finding.first_step}, last {finding.last_step}",
        *(f"{label}: {_short(value)}" for label, value in finding.evidence.items()),
    ]
    if not resolved:
        lines += ["", f"What to try: {finding.action}"]
    if dashboard_url:
        lines += ["", f"{dashboard_url}/?run={run.id}"]
    return title, "\n".join(lines), "info" if resolved else finding.severity


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
