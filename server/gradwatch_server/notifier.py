"""One message to one channel, through Apprise: which of its URLs are allowed, and the sending."""

from __future__ import annotations

from typing import Any

import apprise
from apprise.utils.parse import parse_url

from gradwatch_server.addresses import leads_near, refusing_near

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 10.0
TOO_NEAR = (
    "the channel's host is this machine or on its own link: "
    "set GRADWATCH_NOTIFY_LOCAL=allow if that is meant"
)

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


def send(url: str, title: str, body: str, severity: str, local: bool) -> str | None:
    """Send one message; the reason when it did not go out, without the URL's secrets.

    local: whether it may go to this machine or its own link.
    """
    notifier = _notifier(url)
    if not notifier:
        return "the channel's URL cannot be used"
    named = url.partition("://")[0].lower() in ADDRESSED_SCHEMES
    if local or not named:
        return _taken(notifier, title, body, severity)
    if _is_local(notifier):
        return TOO_NEAR
    with refusing_near() as refused:
        trouble = _taken(notifier, title, body, severity)
    return TOO_NEAR if refused else trouble


def send_test(url: str, local: bool) -> str | None:
    """Send a message that says so to one channel; the reason when it did not go out."""
    body = "Alerts of this collector arrive here."
    return send(url, "[test] gradwatch", body, "info", local)


def _taken(notifier: Any, title: str, body: str, severity: str) -> str | None:
    try:
        taken = notifier.notify(title=title, body=body, notify_type=LOUDNESS[severity])
    except Exception as error:  # a service's plugin may raise anything, its URL included
        return f"the service's plugin failed: {type(error).__name__}"
    return None if taken else "the service did not take the message"


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


def _is_local(notifier: Any) -> bool:
    """Whether the host that a channel names is this machine, or on its own link."""
    return leads_near(getattr(notifier, "smtp_host", None) or notifier.host or "")
