"""`gradwatch replay`: an old run judged again, by today's detectors or by other thresholds."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

from gradwatch.client import CollectorError
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.judge import DEFAULTS, Settings, judge, settings_of
from gradwatch.health.score import DEFINITION, layer_scores, score_of
from gradwatch.health.thresholds import ThresholdError
from gradwatch.notice import told
from gradwatch.remote_runs import collector, find_run, is_id
from gradwatch.replay import Recording, read_spool, recording
from gradwatch.spool import spooled
from gradwatch.windows import as_judged
from gradwatch.wire.api import FrameView
from gradwatch.wire.codec import BatchError
from gradwatch.wire.frame import Frame, Manifest

MOMENTS = 40  # at which a run is judged as it goes on
NAMES = 5  # of layers that do equally


class Story(NamedTuple):
    """What became of one kind of finding over a run."""

    severity: Severity  # the gravest that it had
    first_step: int
    summary: str  # the last one
    open: bool  # whether it stood at the end; of a collector's, whether it is open now
    layers: tuple[str, ...]  # the last ones that it named


Stories = dict[tuple[str, str], Story]  # by optimizer and kind


@click.command()
@click.argument("run")
@click.option(
    "--thresholds",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file, as: [exploding] growth = 200. Names: `gradwatch explain KIND`.",
)
@click.option("--url", help="The collector, as http://127.0.0.1:8470 [GRADWATCH_URL].")
@click.option("--token", help="Its token, with scope read [GRADWATCH_TOKEN].")
def replay(run: str, thresholds: Path | None, url: str | None, token: str | None) -> None:
    """Judge an old run again and show what differs.

    RUN is a folder of a run kept on local disk, or the id of a collector's run, or the beginning
    of it. A collector's run is compared with what was told of it then; with --thresholds, the
    thresholds given are compared with the defaults.
    """
    settings = _settings(thresholds) if thresholds else DEFAULTS
    before: Stories | None = None
    if Path(run).is_dir():
        recorded = _local(Path(run))
    else:
        recorded, before = _remote(run, url, token)
    after = _judged(recorded, settings, "Judging")
    if thresholds:
        before = _judged(recorded, DEFAULTS, "Judging by the defaults")
    _show(before, after)
    _show_layers(recorded, after)


def _settings(path: Path) -> Settings:
    try:
        return settings_of(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ThresholdError) as error:
        raise click.ClickException(f"{path}: {error}") from None


def _local(folder: Path) -> Recording:
    inner = list(spooled(folder))
    try:
        recorded = read_spool(folder)
    except (OSError, BatchError) as error:
        raise click.ClickException(f"{folder} cannot be read: {told(error)}") from None
    if not recorded.frames:
        hint = f"; did you mean {inner[0]}?" if inner else ""
        raise click.ClickException(f"{folder} holds no frames{hint}")
    return recorded


def _remote(run: str, url: str | None, token: str | None) -> tuple[Recording, Stories]:
    if not is_id(run):
        raise click.UsageError(f"{run} is neither a folder nor a run's id")
    client = collector(url, token)
    try:
        run = find_run(client, run).info.id
        records: list[Manifest | Frame] = []
        views = client.manifests(run)
        for optimizer in sorted({view.optimizer for view in views}):
            rank: int | None = None
            label = f"Fetching {optimizer}"
            with click.progressbar(client.all_frames(run, optimizer), label=label) as frames:
                for view in frames:
                    rank = view.rank
                    records.append(_frame(view))
            records += [
                Manifest(optimizer=optimizer, version=view.version, layers=view.layers)
                for view in views
                if view.optimizer == optimizer and view.rank == rank
            ]
        stored = {
            (item.optimizer, item.kind): Story(
                Severity(item.severity),
                item.first_step,
                item.summary,
                item.state == "open",
                tuple(item.layers),
            )
            for item in client.findings(run)
        }
    except CollectorError as error:
        raise click.ClickException(str(error)) from None
    return recording(records), stored


def _frame(view: FrameView) -> Frame:
    """A frame as an agent sent it. What was not finite comes back as null, and its count."""
    rows = [
        np.array([np.nan if value is None else value for value in row], dtype="<f4")
        for row in view.statistics.values()
    ]
    return Frame(
        optimizer=view.optimizer,
        rank=max(view.rank, 0),
        step=view.step,
        time=view.time or 0.0,
        manifest=view.manifest,
        columns=tuple(view.statistics),
        values=memoryview(np.stack(rows).tobytes() if rows else b""),
        scalars={
            name: float("nan") if value is None else value for name, value in view.scalars.items()
        },
        events=tuple(view.events),
    )


def _judged(recorded: Recording, settings: Settings, label: str) -> Stories:
    """Every kind that was told as the run went on."""
    stories: Stories = {}
    for optimizer in recorded.optimizers:
        frames = recorded.frames[optimizer]
        ends = np.unique(np.linspace(0, len(frames) - 1, MOMENTS + 1).astype(int)).tolist()
        with click.progressbar(ends, label=f"{label} {optimizer}") as bar:
            for end in bar:
                window = recorded.window(optimizer, frames[end].step, as_judged)
                findings = {finding.kind: finding for finding in judge(window, settings)}
                for key, story in list(stories.items()):
                    if key[0] == optimizer and key[1] not in findings:
                        stories[key] = story._replace(open=False)
                for kind, finding in findings.items():
                    key = (optimizer, kind)
                    stories[key] = _continued(stories.get(key), finding)
    return stories


def _continued(story: Story | None, finding: Finding) -> Story:
    graver = finding.severity
    first = finding.first_step
    if story is not None:
        graver = max(graver, story.severity, key=lambda severity: severity.rank)
        first = min(first, story.first_step)
    return Story(graver, first, finding.summary, True, finding.layers)


def _show(before: Stories | None, after: Stories) -> None:
    """The findings, or the differences when there is something to compare with."""
    _show_findings(before, after)
    was = "" if before is None else f" (was {_health(before):.0f})"
    click.echo(f"Health at the end: {_health(after):.0f} of 100{was}. It is {DEFINITION}.")


def _health(stories: Stories) -> float:
    return score_of(story.severity for story in stories.values() if story.open)


def _show_layers(recorded: Recording, stories: Stories) -> None:
    """The layers that are not well at the end, those that do worst first."""
    for optimizer in recorded.optimizers:
        names = [layer.name for layer in recorded.manifests[optimizer][-1].layers]
        told = [
            (story.severity, story.layers)
            for (of, _), story in stories.items()
            if story.open and of == optimizer
        ]
        by_score: dict[float, list[str]] = {}
        for name, score in layer_scores(told, names).items():
            by_score.setdefault(score, []).append(name)
        well = len(by_score.pop(100.0, []))
        if not by_score:
            continue
        click.echo(f"Layers of {optimizer}: {len(names) - well} of {len(names)} below 100:")
        for score, ill in sorted(by_score.items()):
            more = f" and {len(ill) - NAMES} more" if len(ill) > NAMES else ""
            click.echo(f"  {score:3.0f}  {', '.join(ill[:NAMES])}{more}")


def _show_findings(before: Stories | None, after: Stories) -> None:
    if before is None:
        for key, story in sorted(after.items(), key=lambda item: item[1].first_step):
            click.echo(_line(" ", key, story))
        if not after:
            click.echo("No finding.")
        return
    rows = sorted({*before, *after}, key=lambda key: (after.get(key) or before[key]).first_step)
    differing = 0
    for key in rows:
        old, new = before.get(key), after.get(key)
        mark = "+" if old is None else "-" if new is None else " "
        if old and new and (old.severity, old.first_step) != (new.severity, new.first_step):
            mark = "~"
        differing += mark != " "
        click.echo(_line(mark, key, new or before[key]))
        if old and mark == "~":
            click.echo(f"    was {old.severity} from step {old.first_step}")
    click.echo(
        f"{differing} of {len(rows)} findings differ (+ new, - gone, ~ changed)."
        if differing
        else f"Nothing differs. Findings: {len(rows)}."
    )


STYLES: Mapping[str, Callable[[str], str]] = {
    "+": lambda line: click.style(line, fg="green"),
    "-": lambda line: click.style(line, fg="red"),
    "~": lambda line: click.style(line, fg="yellow"),
}


def _line(mark: str, key: tuple[str, str], story: Story) -> str:
    optimizer, kind = key
    state = "" if story.open else " (over)"
    line = f"{mark} {optimizer}: {kind}, {story.severity} from step {story.first_step}{state}"
    return f"{STYLES.get(mark, str)(line)}\n    {story.summary}"
