"""Comparing ranks: when each of them says what the collector compares, and its own time a step.

No rank asks another: each takes its part at the same steps, and the collector puts them together.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

from gradwatch.pacer import COST_GROWTH, WARM_UP_STEPS
from gradwatch.waiting import Span

# Steps that the own time of a rank is the median of: a pause for an evaluation does not show.
OWN_STEPS = 20
# The rarest comparison: every 2^10 times the usual number of steps.
MAX_DOUBLINGS = 10


class _Took(NamedTuple):
    """One step of this rank."""

    seconds: float  # all of it, but for the agent and the wait for a core
    waits: Sequence[Span]

    @property
    def waited_s(self) -> float:
        return sum(span() for span in self.waits)


class RankCheck:
    """The steps at which ranks are compared, all of them at the same ones.

    every: steps between two comparisons, at least. share: of the training time that they may cost;
    0 means no limit. What costs more than that is done every 2, 4, 8 times as many steps, so that
    ranks which disagree about their costs still meet.
    """

    def __init__(self, every: int, share: float) -> None:
        self._every = every
        self._share = share
        self._interval = every
        self._cost_s = 0.0
        self._steps: collections.deque[_Took] = collections.deque(maxlen=OWN_STEPS)

    def due(self, step: int) -> bool:
        """Whether ranks are compared at `step`."""
        return step <= WARM_UP_STEPS or step % self._interval == 0

    def next_step(self, step: int) -> int:
        """The first after `step` at which ranks are compared."""
        if step < WARM_UP_STEPS:
            return step + 1
        return (step // self._interval + 1) * self._interval

    def took(self, cost_s: float) -> None:
        """A comparison cost the training thread this long."""
        self._cost_s = min(cost_s, self._cost_s * COST_GROWTH) if self._cost_s else cost_s
        step_s = median([each.seconds for each in self._steps]) if self._steps else 0.0
        if not self._share or not step_s:
            return
        wanted = self._cost_s / (self._share * step_s * self._every)
        doublings = math.ceil(math.log2(wanted)) if wanted > 1 else 0
        self._interval = self._every << min(doublings, MAX_DOUBLINGS)

    def stepped(self, seconds: float, waits: Sequence[Span] | None) -> None:
        """Note a step. waits: at the ends of its backward passes; None when they are not known."""
        if waits is not None and seconds > 0:
            self._steps.append(_Took(seconds, waits))

    def times_s(self) -> dict[str, Callable[[], float]]:
        """What this rank needed for itself in the last steps, and how long it waited for others.

        Medians by name; nothing before they are known. To be called in the agent's own thread:
        they wait for the device.
        """
        steps = list(self._steps)
        if len(steps) < max(1, min(self._every, OWN_STEPS) // 2):
            return {}
        return {
            "own_time_s": lambda: max(0.0, median(each.seconds - each.waited_s for each in steps)),
            "wait_time_s": lambda: median(each.waited_s for each in steps),
        }
