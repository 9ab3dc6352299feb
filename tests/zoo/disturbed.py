"""A job's frames as a bad network brings them: out of order, some twice, some never."""

from __future__ import annotations

import random
from collections.abc import Collection

from gradwatch.replay import Recording, recording
from gradwatch.wire.frame import Frame, Record

from .scoring import told_kinds

TWICE = 1 / 3  # of the records
NEVER = 0.1  # of the frames


def shuffled(recorded: Recording, chance: random.Random) -> Recording:
    """All records in another order, a third of them twice."""
    records = _records(recorded)
    records += chance.sample(records, int(TWICE * len(records)))
    chance.shuffle(records)
    return recording(records)


def with_gaps(recorded: Recording, chance: random.Random, steps: Collection[int] = ()) -> Recording:
    """One frame in ten is missing, but none of `steps`: what one frame shows needs that frame."""
    return recording(
        item
        for item in _records(recorded)
        if not isinstance(item, Frame) or item.step in steps or chance.random() > NEVER
    )


def verdicts(recorded: Recording) -> dict[str, frozenset[str]]:
    """What is told at the end, of each optimizer."""
    return {name: frozenset(told_kinds(recorded.window(name))) for name in recorded.optimizers}


def differences(recorded: Recording, seed: str, steps: Collection[int] = ()) -> list[str]:
    """What is told of the same job when its frames are disturbed, where that is something else.

    steps: those whose frames are not lost.
    """
    chance = random.Random(seed)
    expected = verdicts(recorded)
    disturbed = {
        "shuffled": shuffled(recorded, chance),
        "with gaps": with_gaps(recorded, chance, steps),
    }
    return [
        f"{word}: {_listed(found)}, not {_listed(expected)}"
        for word, other in disturbed.items()
        if (found := verdicts(other)) != expected
    ]


def _records(recorded: Recording) -> list[Record]:
    found: list[Record] = [item for each in recorded.manifests.values() for item in each]
    return found + [frame for each in recorded.frames.values() for frame in each]


def _listed(told: dict[str, frozenset[str]]) -> str:
    return ", ".join(sorted(kind for kinds in told.values() for kind in kinds)) or "nothing"
