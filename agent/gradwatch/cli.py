"""The command line: `gradwatch COMMAND`. Commands are found by name and imported when called."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from gradwatch import __version__

GROUP = "gradwatch.commands"
# What each command is for, told without importing it: `gradwatch --help` must work anywhere.
COMMANDS = {
    "up": "Start collector, worker and dashboard on this machine.",
    "run": "Run a training script and watch it, without changing a line of it.",
    "doctor": "Check a training script's data, model, loss and loop in its first steps.",
    "sync": "Send runs that were kept on local disk to a collector.",
    "export": "Write a run's frames to a Parquet or CSV file.",
    "token": "Make, list and revoke the tokens that a collector asks for.",
    "replay": "Judge an old run again, by today's detectors or by other thresholds.",
    "explain": "Say what a kind of finding means, why it happens, and what to do.",
    "demo": "Train healthy and faulty networks, and look at the verdicts.",
}
EXTRA_OF = {"up": "server,dashboard", "demo": "all", "run": "torch", "token": "server"}


class Handover(BaseException):
    """Raised by a command to run something once the command line is done with.

    A script's exceptions and exit status are its own; click would make "Aborted!" of some.
    """

    def __init__(self, start: Callable[[], None]) -> None:
        super().__init__()
        self.start = start


class Commands(click.Group):
    """Commands by entry point, so that the agent never imports the server."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            return super().main(*args, **extra)
        except Handover as handover:
            start = handover.start
        return start()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = entry_points(group=GROUP, name=cmd_name)
        return self._load(next(iter(found))) if found else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def _load(self, entry: EntryPoint) -> click.Command:
        try:
            return entry.load()
        except ModuleNotFoundError as error:
            extra = EXTRA_OF.get(entry.name)
            if extra is None or (error.name or "").startswith("gradwatch"):
                raise
            raise click.ClickException(
                f"`gradwatch {entry.name}` needs {error.name}, which is not installed: "
                f"pip install 'gradwatch[{extra}]'"
            ) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gradwatch")
def main() -> None:
    """Watches neural networks train and says what is wrong with their gradients.

    \b
    Look at it work:             gradwatch demo
    Start it:                    gradwatch up
    Watch a script, unchanged:   gradwatch run train.py
    Or add one line to it:       monitor = gradwatch.watch(model, optimizer)
    """
