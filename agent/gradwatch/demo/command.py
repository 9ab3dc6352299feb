"""`gradwatch demo`: train healthy and faulty networks, and look at the verdicts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, cast

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import gradwatch
from gradwatch.client import Client
from gradwatch.demo.scenarios import SCENARIOS, Scenario, Watch
from gradwatch.settings import default_spool
from gradwatch.wire.api import FindingView, RunView

START_DEADLINE_S = 90.0
JUDGE_DEADLINE_S = 30.0
DETAIL_EVERY = 10
PROJECT = "demo"


class Outcome(NamedTuple):
    """What one scenario was found to be."""

    scenario: Scenario
    run: RunView

    @property
    def found(self) -> frozenset[str]:
        """Kinds of the findings that still stand at the end."""
        return frozenset(finding.kind for finding in self.open_findings)

    @property
    def open_findings(self) -> list[FindingView]:
        return [finding for finding in self.run.findings if finding.state == "open"]

    @property
    def as_expected(self) -> bool:
        return self.run.judged and self.found == self.scenario.expected


@click.command()
@click.option("--once", is_flag=True, help="Stop everything after the table.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(SCENARIOS)),
    help="Train this network alone; may be repeated.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of every network.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Folder of the demo's database [{default_spool().parent / 'demo'}].",
)
def demo(once: bool, only: tuple[str, ...], seed: int, data: Path | None) -> None:
    """Train healthy and faulty networks, and look at the verdicts.

    Starts the whole service on this machine, trains two healthy networks and one for each of four
    faults on real data, prints what gradwatch found, and leaves the dashboard up until Ctrl-C.
    With --once the exit status is 0 only when every verdict is as expected.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console()
    folder = (data or default_spool().parent / "demo").absolute()
    chosen = [SCENARIOS[name] for name in only] or list(SCENARIOS.values())
    # These networks are small: a second thread would wait for the first, and the service needs it.
    torch.set_num_threads(1)
    with _service(folder, console) as (addresses, process):
        outcomes = _train_all(chosen, seed, addresses["collector"], folder, console)
        console.print(_table(outcomes))
        good = all(outcome.as_expected for outcome in outcomes)
        console.print(
            "[green]Every verdict is as expected.[/]"
            if good
            else "[red]Not every verdict is as expected.[/]"
        )
        if once:
            sys.exit(0 if good else 1)
        console.print(f"\nLook at them: [bold]{addresses['dashboard']}[/]   (Ctrl-C stops it)")
        try:
            process.wait()
        except KeyboardInterrupt:
            console.print("Stopping.")


@contextmanager
def _service(
    folder: Path, console: Console
) -> Generator[tuple[dict[str, str], subprocess.Popen[str]]]:
    """`gradwatch up` in a process of its own, until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    ready = folder / "addresses.json"
    ready.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "gradwatch", "up", "--data", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the demo, which stops the service in order
    )
    try:
        with console.status("Starting collector, worker and dashboard ..."):
            deadline = time.monotonic() + START_DEADLINE_S
            while not ready.exists():
                if process.poll() is not None:
                    told = process.stderr.read() if process.stderr else ""
                    raise click.ClickException(told.removeprefix("Error: ").strip())
                if time.monotonic() > deadline:
                    raise click.ClickException(f"the service did not start; see {folder}/logs")
                time.sleep(0.1)
        yield json.loads(ready.read_text()), process
    finally:
        process.terminate()
        process.wait()


def _train_all(
    chosen: list[Scenario], seed: int, url: str, folder: Path, console: Console
) -> list[Outcome]:
    client = Client(url)
    outcomes: list[Outcome] = []
    columns = (
        TextColumn("{task.description:40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for scenario in chosen:
            task = progress.add_task(scenario.title, total=scenario.steps)
            monitors: list[gradwatch.Monitor] = []
            watch = _watcher(url, monitors)
            scenario.train(watch, partial(progress.advance, task), seed)
            progress.update(task, description=f"{scenario.title}, waiting for the verdict")
            run = _judged(client, monitors[0].run_id)
            progress.update(task, description=f"{scenario.title}: {run.verdict}")
            outcomes.append(Outcome(scenario, run))
    return outcomes


def _watcher(url: str, monitors: list[gradwatch.Monitor]) -> Watch:
    """gradwatch.watch for the demo's collector, at full rate: these networks step in 1 ms."""

    def watch(*arguments: Any, **keywords: Any) -> gradwatch.Monitor:
        keywords |= {"url": url, "project": PROJECT, "overhead_budget": 0.0}
        monitor = gradwatch.watch(*arguments, **keywords, detail_every=DETAIL_EVERY)
        monitors.append(monitor)
        return monitor

    return cast("Watch", watch)


def _judged(client: Client, run_id: str) -> RunView:
    """The run, once everything it sent has been judged."""
    deadline = time.monotonic() + JUDGE_DEADLINE_S
    run = client.run(run_id)
    while not (run.judged and run.status != "running") and time.monotonic() < deadline:
        time.sleep(0.1)
        run = client.run(run_id)
    return run


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title="What gradwatch found", title_justify="left")
    for heading in ("", "network", "verdict", "finding", "first step", "where"):
        table.add_column(heading)
    for outcome in outcomes:
        mark = "[green]as expected[/]" if outcome.as_expected else "[red]NOT EXPECTED[/]"
        findings = outcome.open_findings
        table.add_row(
            mark,
            outcome.scenario.title,
            outcome.run.verdict,
            "\n".join(finding.title for finding in findings) or "none",
            "\n".join(str(finding.first_step) for finding in findings),
            "\n".join((finding.layers or ["the loss"])[0] for finding in findings),
        )
    return table


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
