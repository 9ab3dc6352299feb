"""Pacing: a token bucket that keeps a kind of frame within its share of the training time.

What is spent on no frame, as on counting a step that has none and on sending, comes first: the
clock that all pacers of a watch go by stands still until it is earned.
"""

from __future__ import annotations

# Enough of the start is seen at full rate to judge initialisation, whatever it costs.
WARM_UP_STEPS = 10
# A long pause (evaluation, a checkpoint) must not buy a burst of frames.
MAX_CREDIT_FRAMES = 3.0
# How fast the estimated cost may rise: one slow frame on a busy machine must not stop the next.
COST_GROWTH = 1.25
# Of what a hook sees itself spend, that calling it takes as well, which no clock inside of it sees.
UNSEEN_SHARE = 0.5
# Of the time, that frames are taken from at least: where steps take a millisecond, counting them
# alone may cost more than the budget, and who looks at such a job still wants to see it.
MIN_FRAMES_SHARE = 0.25
# What was spent beyond that is remembered for this long, and forgiven after.
MAX_DEBT_S = 60.0


class Clock:
    """Training time in seconds, less what it takes to earn the costs that belong to no frame.

    budget: share of the training time that may be spent; 0 means no limit.
    """

    __slots__ = ("_debt_s", "_per_cost", "now_s")

    def __init__(self, budget: float) -> None:
        self.now_s = 0.0
        self._debt_s = 0.0  # in training time
        self._per_cost = 1 / budget if budget else 0.0

    def after(self, elapsed_s: float) -> float:
        """What it will show once so much training time has passed."""
        payable_s = (1 - MIN_FRAMES_SHARE) * elapsed_s
        return self.now_s + elapsed_s - (self._debt_s if self._debt_s < payable_s else payable_s)

    def advance(self, elapsed_s: float, spent_s: float) -> None:
        """So much training time has passed, and so much of it, or elsewhere, was spent."""
        now_s = self.after(elapsed_s)
        debt_s = self._debt_s + spent_s * self._per_cost - (self.now_s + elapsed_s - now_s)
        self._debt_s = debt_s if debt_s < MAX_DEBT_S else MAX_DEBT_S
        self.now_s = now_s


class Pacer:
    """Says at which steps a frame may be taken.

    every: steps between two frames, at least. share: of the training time that frames may cost;
    0 means no limit.

    Every step asks, so what it asks of is two numbers: a frame is due from step `next_step` on,
    once the clock shows `next_s`. Credit is that the clock is past it: by as many seconds as it
    takes to earn it.
    """

    def __init__(self, every: int, share: float) -> None:
        self.next_step = 0
        self.next_s = 0.0 if share else float("-inf")
        self._every = every
        self._share = share
        self._cost_s = 0.0

    def due(self, step: int, clock_s: float) -> bool:
        """Whether to take a frame at `step`."""
        return (step >= self.next_step and clock_s >= self.next_s) or step <= WARM_UP_STEPS

    def took(self, step: int, clock_s: float, cost_s: float) -> None:
        """A frame was taken at `step` and cost the training thread this long."""
        self.seen(step)
        known_s = self._cost_s
        self.charge(clock_s, cost_s if step > WARM_UP_STEPS else 0.0)
        self._cost_s = min(cost_s, known_s * COST_GROWTH) if known_s else cost_s
        self._pay(self._cost_s - known_s)

    def seen(self, step: int) -> None:
        """Something else has shown of `step` what a frame would."""
        self.next_step = step + self._every

    def charge(self, clock_s: float, cost_s: float) -> None:
        """Cost of such frames that belongs to none of them in particular."""
        if self._share:
            credit_s = (MAX_CREDIT_FRAMES - 1) * self._cost_s / self._share
            self.next_s = max(self.next_s, clock_s - credit_s)
        self._pay(cost_s)

    def _pay(self, cost_s: float) -> None:
        if self._share:
            self.next_s += cost_s / self._share
