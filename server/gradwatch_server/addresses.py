"""Addresses that alerts must not reach: those of this machine, and of its own link.

A name is looked up again when a connection is made, and may lead elsewhere by then. So within
`refusing_near` the look-up that the connection uses refuses by itself.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class NearAddressError(OSError):
    """A connection was to lead to this machine or its own link."""


# What was refused in this thread; None while anything may be reached.
_refused: ContextVar[list[str] | None] = ContextVar("refused", default=None)
_look_up = socket.getaddrinfo


def leads_near(host: str) -> bool:
    """Whether a name or number is of loopback, or link-local, as clouds keep secrets at."""
    try:
        return _any_near(_look_up(host.strip("[]"), None))
    except (OSError, UnicodeError):
        return False  # nobody can be reached there at all


@contextmanager
def refusing_near() -> Generator[list[str]]:
    """Within it, this thread connects to no such address; gives the hosts that were refused."""
    refused: list[str] = []
    token = _refused.set(refused)
    try:
        yield refused
    finally:
        _refused.reset(token)


def _checked_look_up(host: Any, *args: Any, **named: Any) -> list[Any]:
    found = _look_up(host, *args, **named)
    refused = _refused.get()
    if refused is not None and _any_near(found):
        refused.append(str(host))
        raise NearAddressError(f"{host} is this machine or on its own link")
    return found


def _any_near(found: list[Any]) -> bool:
    return any(_is_near(ipaddress.ip_address(str(item[4][0]).partition("%")[0])) for item in found)


def _is_near(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    real = getattr(address, "ipv4_mapped", None) or address
    return real.is_loopback or real.is_link_local or real.is_unspecified or real.is_multicast


# The one place that urllib3, smtplib and all others look names up at.
socket.getaddrinfo = _checked_look_up
