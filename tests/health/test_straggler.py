"""A rank that the others wait for is told; uneven work, pauses and jobs apart are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import ArrayLike

from gradwatch.health import straggler
from gradwatch.health.window import Window

from .windows import mlp, window

STEPS = list(range(1, 11)) + list(range(20, 141, 20))
COMPARED = len(STEPS) - 10  # after the warm-up


def ranks(
    slow_s: ArrayLike, others_s: float = 0.1, rank: ArrayLike = 1, wait_s: ArrayLike | None = None
) -> Window:
    """slow_s, rank: of the comparisons after the warm-up."""
    made = window(mlp(2), np.full(4, 1e-2), STEPS)

    def late(values: ArrayLike) -> np.ndarray:
        row = np.full(len(STEPS), np.nan)
        row[10:] = values
        return row

    slow = np.asarray(slow_s, dtype=np.float64)
    scalars = {
        "rank_slowest": late(rank),
        "rank_slowest_s": late(slow),
        "rank_others_s": late(others_s),
        "rank_others_wait_s": late(slow - others_s if wait_s is None else wait_s),
    }
    return replace(made, scalars={**made.scalars, **scalars})


def test_a_rank_that_needs_five_times_as_long_is_told_by_the_second_comparison():
    made = ranks(0.5)
    finding = straggler.detect(made.until(40))
    assert finding is not None
    assert (finding.first_step, finding.evidence["slow rank"]) == (20, 1)
    assert finding.summary.startswith("Rank 1 needs 0.50 s a step, 5.0 times as long")
    assert straggler.detect(made.until(20)) is None


def test_one_that_turns_slow_is_told_since_then():
    finding = straggler.detect(ranks([0.11] * 4 + [0.4] * 3))
    assert finding is not None
    assert finding.first_step == 100


@pytest.mark.parametrize(
    "made",
    [
        ranks(0.15),  # half as much data again
        ranks([0.5, 0.11] * 3 + [0.5]),  # an evaluation now and then
        ranks(0.5, rank=[0, 1, 0, 1, 1, 0, 1]),  # now this one, now that one
        ranks(0.5, wait_s=0.001),  # nobody waits: they do not train together
        ranks(0.0009, others_s=0.0002),  # the operating system decides
        ranks(np.nan),
        ranks([0.5] * 5 + [0.1] * 2),  # it is over
    ],
)
def test_what_is_no_straggler_is_not_told(made: Window):
    assert straggler.detect(made) is None


def test_warm_up_and_jobs_of_one_rank_say_nothing():
    made = ranks(0.5)
    assert straggler.detect(made.until(10)) is None
    assert straggler.detect(window(mlp(2), np.full(4, 1e-2))) is None
