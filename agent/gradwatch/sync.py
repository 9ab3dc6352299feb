"""`gradwatch sync`: send runs that were kept on local disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import msgspec

from gradwatch.notice import told
from gradwatch.settings import SettingError, Settings
from gradwatch.spool import Spool, spooled
from gradwatch.transport import Outcome, Transport, Verdict

ATTEMPTS = 5
PAUSE_S = 1.0


@click.command()
@click.option("--url", help="The collector, as http://127.0.0.1:8470 [GRADWATCH_URL].")
@click.option("--token", help="Its token, with scope ingest [GRADWATCH_TOKEN].")
@click.option("--spool", help="Folder of the spool [GRADWATCH_SPOOL].")
def sync(url: str | None, token: str | None, spool: str | None) -> None:
    """Send runs that were kept on local disk to a collector.

    Safe to interrupt and to repeat: a batch leaves the disk once the collector has it, and the
    collector stores each frame once. Runs that are still being recorded are left alone.
    """
    try:
        settings = Settings.load({"url": url, "token": token, "spool": spool})
    except SettingError as error:
        raise click.UsageError(str(error)) from None
    if not settings.url:
        raise click.UsageError("name the collector: --url http://host:8470, or set GRADWATCH_URL")
    folders = list(spooled(settings.spool_dir))
    if not folders:
        click.echo(f"Nothing to send in {settings.spool_dir}.")
        return
    transport = Transport(settings.url, settings.token)
    for folder in folders:
        _send(folder, transport)


def _send(folder: Path, transport: Transport) -> None:
    try:
        spool = Spool.open(folder)
        run = spool.run if spool else None
    except (OSError, ValueError, msgspec.DecodeError) as error:
        click.echo(f"{folder.name}: cannot be read ({told(error)}), left alone", err=True)
        return
    if spool is None or run is None:
        click.echo(f"{folder.name}: still being recorded, left alone")
        return
    label = f"{run.name} ({run.id[:8]})"
    try:
        introduced = _insist(transport.introduce, run)
        if introduced.verdict is Verdict.REFUSED:
            click.echo(f"{label}: refused ({introduced.reason}), left on disk", err=True)
            return
        refused = 0
        with click.progressbar(length=spool.size_bytes, label=label) as bar:
            for segment in spool.segments:
                body = segment.read_bytes()
                outcome = _insist(transport.deliver, run.id, body)
                refused += outcome.rejected
                spool.remove(segment)
                bar.update(len(body))
        if refused:
            click.echo(f"{label}: the collector refused {refused} records", err=True)
    finally:
        spool.close()


def _insist(send: Any, *arguments: Any) -> Outcome:
    """Try a few times, unless the collector says no, then tell why not."""
    outcome = Outcome(Verdict.RETRY)
    for attempt in range(ATTEMPTS):
        outcome = send(*arguments)
        if outcome.verdict in (Verdict.STORED, Verdict.REFUSED):
            return outcome
        if outcome.verdict is Verdict.DENIED:
            break
        if attempt < ATTEMPTS - 1:
            time.sleep(outcome.retry_after_s or PAUSE_S)
    raise click.ClickException(f"{outcome.reason}; what is left stays on disk")
