"""`gradwatch doctor train.py`: the checks on what a script does in its first steps."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager, nullcontext

import click

from gradwatch.checkup.checks import CHECKS, examine
from gradwatch.checkup.observation import Observation
from gradwatch.checkup.observing import EnoughSeen, Observer
from gradwatch.checkup.showing import show
from gradwatch.checkup.verdict import Line, Report
from gradwatch.cli import Handover
from gradwatch.notice import say
from gradwatch.run_script import start_script

SOUND, WRONG, UNSEEN = 0, 1, 2
# Two show whether gradients are cleared; a few more show more labels.
STEPS = 5


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("-m", "module", is_flag=True, help="SCRIPT is a module or package, as in python -m.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=STEPS,
    show_default=True,
    help="Optimizer steps that the script takes before it is stopped.",
)
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def doctor(
    module: bool, as_json: bool, steps: int, script: str, arguments: tuple[str, ...]
) -> None:
    """Run a script for its first steps, and check what a person would check by hand.

    Looks at inputs, labels, initial weights, the first loss, gradients, whether one batch can be
    learnt by heart, custom backward passes and the training loop, and says what is wrong and what
    to do. The script is stopped after a few steps, whatever it does by then is done: files that it
    writes are written.

    \b
    gradwatch doctor train.py --epochs 3
    gradwatch doctor --json -m package.train > report.json

    Exit status: 0 nothing is wrong, 1 something is, 2 there was nothing to look at.
    """
    if not module and not os.path.isfile(script):
        raise click.UsageError(f"there is no script {script!r} here")
    raise Handover(lambda: sys.exit(_examine(module, as_json, steps, script, arguments)))


def _examine(
    module: bool, as_json: bool, steps: int, script: str, arguments: tuple[str, ...]
) -> int:
    """The exit status."""
    os.environ["GRADWATCH_DISABLED"] = "1"  # a few steps are no run to record
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what is compiled cannot be observed
    with _stdout_to_stderr() if as_json else nullcontext():
        seen = observe(module, steps, script, arguments)
        if seen is None:
            return UNSEEN
        lines: list[Line] = []
        # On standard error: the report may go to a file.
        with click.progressbar(
            length=len(CHECKS), label="Checking", file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as bar:
            for line in examine(seen):
                lines.append(line)
                bar.update(1)
    report = Report(tuple(lines))
    if as_json:
        print(report.to_json(), flush=True)
    else:
        show(report)
    return SOUND if report.ok else WRONG


def observe(
    module: bool, steps: int, script: str, arguments: tuple[str, ...]
) -> Observation | None:
    """What the script did; None, and a word why, when it trained nothing."""
    observer = Observer(steps)
    ended = ""
    try:
        with observer:
            start_script(module, script, arguments)
    except EnoughSeen:
        pass
    except SystemExit as exit_:
        ended = f"it exits with status {exit_.code}"
    except Exception as error:
        traceback.print_exc()
        ended = f"it ends with {type(error).__name__}"
    seen = observer.seen
    if seen.trainings or seen.values or (seen.error and (seen.models or seen.losses)):
        return seen
    say(
        f"nothing to check: {ended or 'it ends'} before a torch optimizer took a step or "
        "backward() was called"
    )
    return None


@contextmanager
def _stdout_to_stderr() -> Generator[None]:
    """What the script and its processes print leaves standard output to the report."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
