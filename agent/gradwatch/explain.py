"""`gradwatch explain`: what a kind of finding means, in the terminal."""

from __future__ import annotations

import textwrap

import click

from gradwatch.health.judge import DETECTORS
from gradwatch.health.kinds import KINDS
from gradwatch.health.thresholds import thresholds_of

WIDTH = 88
PAGES = "docs/findings"  # of the source tree: a page for each kind


@click.command()
@click.argument("kind", required=False)
def explain(kind: str | None) -> None:
    """Say what a kind of finding means, why it happens, and what to do.

    Without KIND all of them are listed, a line each.
    """
    if kind is None:
        width = max(map(len, KINDS))
        for each in KINDS.values():
            click.echo(f"{each.name:<{width}}  {each.title}")
        return
    name = kind.strip().lower().replace("-", "_").replace(" ", "_")
    if name not in KINDS:
        raise click.UsageError(f"{kind!r} is no kind of finding; known are {', '.join(KINDS)}")
    click.echo(reference(name))


def reference(name: str) -> str:
    """The reference text of a kind, wrapped for a terminal."""
    kind = KINDS[name]
    (detector,) = (row for row in DETECTORS if row.kind == name)
    parts = [click.style(f"{kind.title} ({kind.name})", bold=True), _wrapped(kind.meaning)]
    for title, text in (
        ("Why it happens", kind.explanation),
        ("What to do", kind.action),
        ("Source", kind.source),
    ):
        parts.append(f"{click.style(title, bold=True)}\n{_wrapped(text)}")
    rows = thresholds_of(detector.thresholds)
    width = max(len(row.name) for row in rows)
    lines = [
        textwrap.fill(
            f"{row.name:<{width}}  {row.default:<8g} {row.reason} [{row.unit}]",
            WIDTH,
            initial_indent="  ",
            subsequent_indent=" " * (width + 13),
        )
        for row in rows
    ]
    parts.append("\n".join([click.style("Thresholds", bold=True), *lines]))
    parts.append(
        _wrapped(f"The mathematics, and a real example: {PAGES}/{name}.md in the sources.")
    )
    return "\n\n".join(parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )
