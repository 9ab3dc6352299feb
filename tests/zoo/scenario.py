"""What a scenario of the zoo is: a real training job, and what must be said of it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from gradwatch.demo.scenarios import Watch

# `train(watch, chance)`: torch is seeded already; `chance` varies sizes, data and optimizers.
Train = Callable[[Watch, Random], None]

LONG = 200  # steps within which slow faults must be told
FAST = 50


class Expected(NamedTuple):
    """One story that must be told, by one of the kinds that tell it."""

    kinds: tuple[str, ...]  # the first is the one it is scored under
    onset: int = 1  # step at which the fault begins
    within: int = LONG  # steps after it by which it must be told


class Scenario(NamedTuple):
    """One row of the zoo. Healthy when nothing is expected.

    allowed: kinds that may be told beside it, for they are true of the job as well.
    """

    name: str
    train: Train
    expected: tuple[Expected, ...] = ()
    allowed: frozenset[str] = frozenset()
    ranks: int = 1  # of several, each trains in a process of its own

    @property
    def healthy(self) -> bool:
        return not self.expected and not self.allowed


def expect(*kinds: str, onset: int = 1, within: int = LONG) -> Expected:
    return Expected(kinds, onset, within)
