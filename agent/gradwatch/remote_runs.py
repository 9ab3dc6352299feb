"""Runs of a collector, as commands name them: by the beginning of their id."""

from __future__ import annotations

import re

import click

from gradwatch.client import Client
from gradwatch.settings import SettingError, Settings
from gradwatch.wire.api import RunView

TIMEOUT_S = 60.0


def collector(url: str | None, token: str | None) -> Client:
    """The collector of the options, else of the environment. Raises click.UsageError."""
    try:
        settings = Settings.load({"url": url, "token": token})
    except SettingError as error:
        raise click.UsageError(str(error)) from None
    if not settings.url:
        raise click.UsageError("name the collector: --url http://host:8470, or set GRADWATCH_URL")
    return Client(settings.url, settings.token, TIMEOUT_S)


def is_id(run: str) -> bool:
    """Whether this can be a run's id, or the beginning of one."""
    return re.fullmatch("[0-9a-f]{4,32}", run) is not None


def find_run(client: Client, run: str) -> RunView:
    """The one run whose id begins so. Raises click.ClickException or CollectorError."""
    if not is_id(run):
        raise click.UsageError(f"{run!r} is no run's id: 32 hexadecimal digits, or the first of it")
    if len(run) == 32:
        return client.run(run)
    found: list[RunView] = []
    after: str | None = None
    while True:
        page = client.runs(after=after)
        found += [view for view in page.runs if view.info.id.startswith(run)]
        after = page.next
        if len(found) > 1:
            names = ", ".join(view.info.id for view in found[:3])
            raise click.ClickException(f"several runs begin with {run}: {names}; give more digits")
        if after is None:
            break
    if not found:
        raise click.ClickException(f"no run's id begins with {run}")
    return found[0]
