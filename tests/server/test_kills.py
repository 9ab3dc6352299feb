"""A collector killed at any instant loses nothing that it acknowledged, and keeps nothing twice."""

from __future__ import annotations

import pytest

from kill_load import kill_at_random

pytestmark = pytest.mark.slow

KILLS = 3


def test_no_acknowledged_frame_is_missing_and_none_is_double(database_url, tmp_path):
    counts = kill_at_random(database_url, tmp_path, KILLS, seed=8, on_kill=lambda: None)
    assert counts.kills == KILLS
    assert counts.acknowledged > 0
    assert counts.retries > 0
    assert (counts.missing, counts.altered, counts.double, counts.unmerged) == (0, 0, 0, 0)
    assert counts.misfolded == 0
