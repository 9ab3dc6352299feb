"""Alerts: an outbox in the database, and its delivery through Apprise.

A finding's change and its alerts are written in one transaction. Celery only says "look now": a
lost message costs one tick of the schedule, a killed worker one lease.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
import time
from collections.abc import Sequence
from typing import Any

import apprise
from apprise.utils.parse import parse_url
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from gradwatch.wire.api import ChannelView, FindingView
from gradwatch.wire.frame import RunInfo
from gradwatch_server.database import writing
from gradwatch_server.models import Alert, FindingRow, Run
from gradwatch_server.views import finding_view, run_info

PENDING, SENT, FAILED = "pending", "sent", "failed"
MAX_ATTEMPTS = 10
FIRST_RETRY_S = 2.0
MAX_RETRY_S = 600.0
# How long a worker may take to send one alert before another one tries.
LEASE_S = 60.0
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 10.0
BATCH = 20

# Services reached over HTTP or mail. Apprise also knows schemes that run programs, write files
# or load Python (exec, file, python, syslog, dbus and others): none of them is in this table.
SCHEMES = """
    discord form forms gchat gotify gotifys json jsons mailto mailtos matrix matrixs mmost mmosts
    ntfy ntfys opsgenie pagerduty pover rocket rockets signal signals slack splunk tgram twilio
    victorops webex workflow workflows xml xmls zulip
"""
ALLOWED_SCHEMES = frozenset(SCHEMES.split())
# Of these, those whose host is an address: the host of others is a secret, or a name of theirs.
ADDRESSED = """
    form forms gotify gotifys json jsons mailto mailtos matrix matrixs mmost mmosts ntfy ntfys
    rocket rockets signal signals workflow workflows xml xmls zulip
"""
ADDRESSED_SCHEMES = frozenset(ADDRESSED.split())
# Parameters that make Apprise open a local file or follow redirects to where it should not go.
REFUSED_PARAMETERS = frozenset({"template", "redirect", "attach", "avatar_url_file", "include"})
LOUDNESS = {
    "info": apprise.NotifyType.INFO,
    "warning": apprise.NotifyType.WARNING,
    "critical": apprise.NotifyType.FAILURE,
}


class ChannelError(ValueError):
    """A channel's URL cannot be used. The message says why and never repeats its secrets."""


def check_channel(url: str) -> None:
    """Raise ChannelError unless alerts may be sent to this Apprise URL."""
    known = f"known are {', '.join(sorted(ALLOWED_SCHEMES))}"
    scheme, separator, _ = url.partition("://")
    scheme = scheme.strip().lower()
    if not separator:
        # Whatever stands there may be a secret.
        raise ChannelError(f"a channel for alerts must begin with a scheme and ://; {known}")
    if scheme not in ALLOWED_SCHEMES:
        raise ChannelError(f"alerts cannot be sent by {scheme!r}; {known}")
    # Read as Apprise reads it: another parser might overlook what Apprise then obeys.
    parsed = parse_url(url, verify_host=False, sanitize=False) or {}
    asked = {name.lower().lstrip("+-:") for name in parsed.get("qsd", {})}
    if asked & REFUSED_PARAMETERS:
        names = ", ".join(sorted(asked & REFUSED_PARAMETERS))
        raise ChannelError(f"a {scheme} channel must not set {names}")
    if _notifier(url) is None:
        raise ChannelError(f"this {scheme} URL is incomplete; see Apprise's page on {scheme}")


def channel_digest(url: str) -> str:
    """Names a channel without telling its secrets."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def enqueue(session: Session, finding: FindingRow, change: str, channels: Sequence[str]) -> None:
    """Write one alert for each channel, to be sent after the commit; none of a muted finding."""
    if finding.muted_at is not None:
        return
    now = time.time()
    for url in channels:
        session.add(
            Alert(
                finding_id=finding.id,
                occurrence=finding.occurrence,
                change=change,
                channel=channel_digest(url),
                created_at=now,
            )
        )


def channel_views(session: Session, channels: Sequence[str]) -> list[ChannelView]:
    """Channels as they may be shown, with what became of their messages."""
    counted = session.execute(
        select(Alert.channel, Alert.state, func.count()).group_by(Alert.channel, Alert.state)
    )
    counts = {(channel, state): count for channel, state, count in counted}
    views: list[ChannelView] = []
    for url in channels:
        digest = channel_digest(url)
        last_error = session.scalar(
            select(Alert.last_error)
            .where(Alert.channel == digest, Alert.last_error != "")
            .order_by(Alert.id.desc())
            .limit(1)
        )
        views.append(
            ChannelView(
                channel=digest,
                scheme=url.partition("://")[0],
                pending=counts.get((digest, PENDING), 0),
                sent=counts.get((digest, SENT), 0),
                failed=counts.get((digest, FAILED), 0),
                last_error=last_error or "",
            )
        )
    return views


def deliver_due(
    engine: Engine, channels: Sequence[str], dashboard_url: str, local: bool = False
) -> int:
    """Send the alerts that are due. Returns how many were sent.

    local: whether they may go to this machine or its own link.
    """
    urls = {channel_digest(url): url for url in channels}
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
            title, body, kind = _message(session, alert, dashboard_url)
            url = urls.get(alert.channel)
        error = (
            "this channel is no longer configured"
            if url is None
            else _send(url, title, body, kind, local)
        )
        sent += error is None
        _note(engine, alert_id, error, final=url is None)
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
    layers = ", ".join(finding.layers[:3]) or "the loss"
    more = f" and {len(finding.layers) - 3} more" if len(finding.layers) > 3 else ""
    lines = [
        finding.summary,
        "",
        f"Run: {run.name} ({run.id[:8]}), optimizer {finding.optimizer}",
        f"Layer: {layers}{more}",
        f"Step: first {finding.first_step}, last {finding.last_step}",
        *(f"{label}: {_short(value)}" for label, value in finding.evidence.items()),
    ]
    if not resolved:
        lines += ["", f"What to try: {finding.action}"]
    if dashboard_url:
        lines += ["", f"{dashboard_url}/?run={run.id}"]
    return title, "\n".join(lines), "info" if resolved else finding.severity


def send_test(url: str, local: bool) -> str | None:
    """Send a message that says so to one channel; the reason when it did not go out."""
    body = "Alerts of this collector arrive here."
    return _send(url, "[test] gradwatch", body, "info", local)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _notifier(url: str) -> Any:
    asset = apprise.AppriseAsset(
        app_id="gradwatch",
        app_desc="gradwatch",
        app_url="",
        # A redirect would carry an alert to an address that nobody configured.
        http_redirects=False,
    )
    joint = "&" if "?" in url else "?"
    timed = f"{url}{joint}cto={CONNECT_TIMEOUT_S}&rto={READ_TIMEOUT_S}"
    return apprise.Apprise.instantiate(timed, asset=asset)


def _is_local(notifier: Any, scheme: str) -> bool:
    """Whether a channel leads to loopback, or to a link-local address as clouds keep secrets at."""
    if scheme not in ADDRESSED_SCHEMES:
        return False
    host = getattr(notifier, "smtp_host", None) or notifier.host or ""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None)
    except (OSError, UnicodeError):
        return False  # nobody can be reached there at all
    return any(_is_near(ipaddress.ip_address(str(item[4][0]).partition("%")[0])) for item in found)


def _is_near(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    real = getattr(address, "ipv4_mapped", None) or address
    return real.is_loopback or real.is_link_local or real.is_unspecified or real.is_multicast


def _send(url: str, title: str, body: str, severity: str, local: bool) -> str | None:
    """Send one message; the reason when it did not go out."""
    notifier = _notifier(url)
    if not notifier:
        return "the channel's URL cannot be used"
    if not local and _is_local(notifier, url.partition("://")[0].lower()):
        return (
            "the channel's host is this machine or on its own link: "
            "set GRADWATCH_NOTIFY_LOCAL=allow if that is meant"
        )
    try:
        taken = notifier.notify(title=title, body=body, notify_type=LOUDNESS[severity])
    except Exception as error:  # a service's plugin may raise anything
        return f"{type(error).__name__}: {error}"
    return None if taken else "the service did not take the message"
