"""The report in a terminal."""

from __future__ import annotations

import sys

from gradwatch.checkup.verdict import Report, Status

COLOURS = {
    Status.PASSED: "green",
    Status.WRONG: "bold red",
    Status.ADVICE: "yellow",
    Status.SKIPPED: "dim",
}


def show(report: Report) -> None:
    """Print the report on standard output: in colours where rich is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        print(report.table(), flush=True)
        return
    if not sys.stdout.isatty():
        print(report.table(), flush=True)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "what was found, and what to do"):
        table.add_column(heading)
    for line in report.lines:
        verdict, colour = line.verdict, COLOURS[line.verdict.status]
        told = Text(verdict.found, "dim" if verdict.status is Status.SKIPPED else "")
        if verdict.action:
            told.append(f"\n{verdict.action}", "italic")
        table.add_row(Text(verdict.status, colour), line.title, told)
    console = Console()
    console.print(table)
    console.print(f"\n{report.summary()}")
