"""Where findings begin, as labelled lines over a plot of steps."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.wire.api import FindingView

LEVEL_PX = 18
MAX_MARKS = 6
CHARACTER_SHARE = 0.0075  # of the plot's width on a laptop's screen


class Mark(NamedTuple):
    """One labelled line. level: the row of the label over the plot, 0 is the lowest."""

    x: float  # a step that has a column, so that the line meets it
    text: str
    anchor: str  # the label's side at the line: left or right
    level: int

    @property
    def lift_px(self) -> int:
        return 2 + self.level * LEVEL_PX


def finding_marks(findings: Sequence[FindingView], steps: NDArray[np.int64]) -> list[Mark]:
    """Marks for findings whose first step lies in `steps`, int64[columns], earliest first.

    Findings that share a column share a mark; labels that would meet stand on different levels.
    """
    if not steps.size:
        return []
    titles: dict[int, list[tuple[int, str]]] = {}
    for finding in sorted(findings, key=lambda finding: finding.first_step):
        if finding.first_step < steps[0]:
            continue
        column = int(np.searchsorted(steps, finding.first_step, side="right")) - 1
        known = titles.setdefault(int(steps[column]), [])
        if finding.title not in [title for _, title in known]:
            known.append((finding.first_step, finding.title))
    span = max(int(steps[-1] - steps[0]), 1)
    marks: list[Mark] = []
    ends: list[float] = []  # of the last label of each level, as a share of the width
    for x, entries in sorted(titles.items())[:MAX_MARKS]:
        place = (x - int(steps[0])) / span
        anchor = "left" if place < 0.5 else "right"
        text = f"{' + '.join(title for _, title in entries)}, step {entries[0][0]:,}"
        width = (len(text) + 4) * CHARACTER_SHARE
        start = place if anchor == "left" else place - width
        level = next((row for row, end in enumerate(ends) if end <= start), len(ends))
        ends[level : level + 1] = [start + width]
        marks.append(Mark(float(x), html.escape(text, quote=False), anchor, level))
    return marks


def marks_height(marks: Sequence[Mark]) -> int:
    """Pixels over the plot that the labels need."""
    return (max(mark.level for mark in marks) + 1) * LEVEL_PX if marks else 0
