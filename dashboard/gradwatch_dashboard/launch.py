"""The command line that starts the dashboard, and the flag that names its collector."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

DEFAULT_URL = "http://127.0.0.1:8470"
COLLECTOR_FLAG = "--collector="
APP = Path(__file__).with_name("app.py")

LOOPBACK = "127.0.0.1"
OPTIONS: Mapping[str, str] = {
    "server.headless": "true",
    # Nobody edits an installed package; watching its files costs a thread and CPU.
    "server.fileWatcherType": "none",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "viewer",
    # Streamlit prints its own addresses; `gradwatch up` says where to look.
    "logger.level": "warning",
    "theme.baseRadius": "small",
    "theme.headingFontWeights": "[650, 650, 600, 600]",
    "theme.headingFontSizes": '["1.9rem", "1.5rem", "1.3rem", "1.15rem"]',
    "theme.light.primaryColor": "#31688e",
    "theme.dark.primaryColor": "#35b0ab",
}


def command(url: str, port: int, host: str = LOOPBACK) -> list[str]:
    """The argv that serves the dashboard of the collector at `url` on a port, of loopback only
    unless `host` is another address.

    The token, when there is one, is taken from GRADWATCH_TOKEN: an argv is readable by others.
    """
    options = [item for name, value in OPTIONS.items() for item in (f"--{name}", value)]
    return [
        *(sys.executable, "-m", "streamlit", "run", str(APP)),
        *("--server.port", str(port), "--server.address", host),
        *options,
        *("--", f"{COLLECTOR_FLAG}{url}"),
    ]


def collector_url(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """The collector's address: the flag that `command` gives, else GRADWATCH_URL, else local."""
    for argument in argv:
        if argument.startswith(COLLECTOR_FLAG):
            return argument.removeprefix(COLLECTOR_FLAG)
    return environ.get("GRADWATCH_URL") or DEFAULT_URL
