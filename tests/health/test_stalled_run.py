"""Silence is told by the clock, and by what the run has been silent for before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gradwatch.health import stalled_run
from gradwatch.health.finding import Severity
from gradwatch.health.judge import judge
from gradwatch.health.window import Silence

from .windows import mlp, window

BASE = window(mlp(2), np.full(4, 1e-2), steps=200)
SETTINGS = stalled_run.Thresholds(after_s=60.0, pauses=3.0)


@pytest.mark.parametrize(
    ("seconds", "longest_s", "told"),
    [
        (59, 1, False),
        (61, 1, True),
        (200, 100, False),  # it has been evaluating for as long
        (301, 100, True),
    ],
)
def test_a_run_is_silent_for_too_long_by_its_own_pace_and_never_below_the_floor(
    seconds: float, longest_s: float, told: bool
):
    finding = stalled_run.detect(replace(BASE, silence=Silence(seconds, longest_s)), SETTINGS)
    assert (finding is not None) == told


def test_it_says_for_how_long_and_after_which_step():
    finding = stalled_run.detect(replace(BASE, silence=Silence(1200, 2.5)))
    assert finding is not None
    assert (finding.severity, finding.first_step) == (Severity.CRITICAL, 200)
    assert finding.summary == (
        "No step for 20 minutes after step 200: the job hangs or was killed. "
        "Its longest pause before was 2.5 s."
    )


def test_frames_alone_never_tell_it():
    assert "stalled_run" not in [finding.kind for finding in judge(BASE)]
