"""Pacing: a token bucket that keeps a kind of frame within its share of the training time."""

from __future__ import annotations

# Enough of the start is seen at full rate to judge initialisation, whatever it costs.
WARM_UP_STEPS = 10
# A long pause (evaluation, a checkpoint) must not buy a burst of frames.
MAX_CREDIT_FRAMES = 3.0
# How fast the estimated cost may rise: one slow frame on a busy machine must not stop the next.
COST_GROWTH = 1.25


class Pacer:
    """Says at which steps a frame may be taken.

    every: steps between two frames, at least. share: of the elapsed time that frames may cost;
    0 means no limit.
    """

    def __init__(self, every: int, share: float) -> None:
        self._every = every
        self._share = share
        self._credit_s = 0.0
        self._cost_s = 0.0
        self._last = 0

    def due(self, step: int, elapsed_s: float) -> bool:
        """Whether to take a frame at `step`, `elapsed_s` seconds after the step before."""
        self._credit_s = self._credit_after(elapsed_s)
        return self._affords(step, self._credit_s)

    def expects(self, step: int, elapsed_s: float) -> bool:
        """Whether `due` will say yes to `step`, the next one, should it take so many seconds."""
        return self._affords(step, self._credit_after(elapsed_s))

    def _credit_after(self, elapsed_s: float) -> float:
        if not self._share:
            return self._credit_s
        return min(self._credit_s + self._share * elapsed_s, MAX_CREDIT_FRAMES * self._cost_s)

    def _affords(self, step: int, credit_s: float) -> bool:
        if step <= WARM_UP_STEPS:
            return True
        if self._last and step - self._last < self._every:
            return False
        return not self._share or credit_s >= self._cost_s

    def took(self, step: int, cost_s: float) -> None:
        """A frame was taken at `step` and cost the training thread this long."""
        self._last = step
        self._cost_s = min(cost_s, self._cost_s * COST_GROWTH) if self._cost_s else cost_s
        if step > WARM_UP_STEPS:
            self._credit_s -= cost_s

    def charge(self, cost_s: float) -> None:
        """Cost that belongs to no single frame, as that of the sending thread."""
        self._credit_s -= cost_s
