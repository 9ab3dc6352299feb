"""Scoring of the zoo: recall, precision and delay of each kind of finding, and confusions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import numpy as np

from gradwatch.health.finding import Severity
from gradwatch.health.judge import judge
from gradwatch.health.window import Window
from gradwatch.replay import Recording
from gradwatch.windows import BEGINNING_FRAMES, WINDOW_FRAMES
from gradwatch.wire.frame import Frame

from .scenario import Scenario

# What judges a window: kinds told, with warning or above.
Judge = Callable[[Window], Iterable[str]]
Keep = Callable[[Sequence[Frame]], Sequence[Frame]]


def told_kinds(window: Window) -> list[str]:
    """The kinds that gradwatch tells with warning or above."""
    return [
        finding.kind for finding in judge(window) if finding.severity.rank >= Severity.WARNING.rank
    ]


def moments(steps: Sequence[int], at: Sequence[int] = ()) -> list[int]:
    """Steps at which a run is judged: often at first, then every 20 steps, at the end and `at`."""
    wanted = {*at, *range(21), steps[-1]}
    return [step for step in steps if step in wanted or step % 20 == 0 or step % 50 == 3]


class Told(NamedTuple):
    """When each kind was told of one job first, and what stands at the end."""

    first: dict[str, int]
    last: frozenset[str]


def follow(
    recording: Recording,
    judged: Judge = told_kinds,
    keep: Keep = lambda frames: frames,
    at: Sequence[int] = (),
) -> Told:
    """Judge a job again and again as it goes on, each optimizer by itself.

    at: steps at which it is judged in any case.
    """
    first: dict[str, int] = {}
    last: set[str] = set()
    for optimizer in recording.optimizers:
        versions: dict[int, int] = {}  # last step of each manifest
        for frame in recording.frames[optimizer]:
            versions[frame.manifest] = frame.step
        parts = {
            version: recording.window(optimizer, last, keep) for version, last in versions.items()
        }
        kinds: list[str] = []
        steps = [frame.step for frame in keep(recording.frames[optimizer])]
        for step in moments(sorted(set(steps)), at):
            version = next(number for number, last in versions.items() if step <= last)
            kinds = list(judged(_as_judged(parts[version].until(step))))
            for kind in kinds:
                first[kind] = min(first.get(kind, step), step)
        last |= set(kinds)
    return Told(first, frozenset(last))


def _as_judged(window: Window) -> Window:
    """The part of a window that a collector would load."""
    count = len(window.steps)
    if count <= WINDOW_FRAMES:
        return window
    last = np.arange(count - WINDOW_FRAMES + BEGINNING_FRAMES, count)
    return window.only(np.concatenate([np.arange(BEGINNING_FRAMES), last]))


@dataclass
class Score:
    """Counts over jobs, by kind."""

    hit: Counter[str] = field(default_factory=Counter[str])
    missed: Counter[str] = field(default_factory=Counter[str])
    false: Counter[str] = field(default_factory=Counter[str])
    late: Counter[str] = field(default_factory=Counter[str])
    delays: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    confusion: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    healthy: int = 0
    false_alarms: int = 0  # healthy jobs of which anything was told
    problems: list[str] = field(default_factory=list[str])

    def add(self, name: str, scenario: Scenario, told: Mapping[str, int]) -> None:
        """Count what was told of one job: kind -> step."""
        wanted = {kind for slot in scenario.expected for kind in slot.kinds}
        for slot in scenario.expected:
            steps = [told[kind] for kind in slot.kinds if kind in told]
            label = slot.kinds[0]
            if not steps:
                self.missed[label] += 1
                said = ", ".join(sorted(told)) or "nothing"
                self.problems.append(f"{name}: {' or '.join(slot.kinds)} missed; told: {said}")
                self.confusion[label, next(iter(sorted(told)), "nothing")] += 1
                continue
            delay = min(steps) - slot.onset
            self.hit[label] += 1
            self.delays[label].append(delay)
            told_as = min((told[kind], kind) for kind in slot.kinds if kind in told)[1]
            self.confusion[label, told_as] += 1
            if delay > slot.within:
                self.late[label] += 1
                self.problems.append(f"{name}: {label} told {delay} steps late, not {slot.within}")
        extra = set(told) - wanted - scenario.allowed
        for kind in extra:
            self.false[kind] += 1
            self.problems.append(f"{name}: {kind} told at step {told[kind]}, which it is not")
            self.confusion["healthy" if scenario.healthy else "other fault", kind] += 1
        if scenario.healthy:
            self.healthy += 1
            self.false_alarms += bool(extra)

    def kinds(self) -> list[str]:
        return sorted({*self.hit, *self.missed, *self.false})

    def recall(self, kind: str) -> float | None:
        asked = self.hit[kind] + self.missed[kind]
        return self.hit[kind] / asked if asked else None

    def precision(self, kind: str) -> float | None:
        said = self.hit[kind] + self.false[kind]
        return self.hit[kind] / said if said else None

    def delay(self, kind: str) -> tuple[float, int] | None:
        """Median and worst delay in steps."""
        delays = self.delays.get(kind)
        return (median(delays), max(delays)) if delays else None

    def macro(self) -> tuple[float, float]:
        """Mean recall and precision over the kinds that were asked for."""
        asked = [kind for kind in self.kinds() if self.recall(kind) is not None]
        recalls = [self.recall(kind) or 0.0 for kind in asked]
        precisions = [self.precision(kind) or 0.0 for kind in asked]
        count = max(len(asked), 1)
        return sum(recalls) / count, sum(precisions) / count
