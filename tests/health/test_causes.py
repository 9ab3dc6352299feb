from __future__ import annotations

import pytest

from gradwatch.health.causes import root_causes
from gradwatch.health.finding import Finding, Severity


def found(kind: str, step: int) -> Finding:
    return Finding(kind, Severity.CRITICAL, (), step, 200, "summary")


@pytest.mark.parametrize(
    ("exploding", "told"), [(110, {"exploding"}), (121, {"exploding", "loss_spike"})]
)
def test_gradients_bring_about_no_leap_of_the_loss_that_they_are_of(
    exploding: int, told: set[str]
) -> None:
    story = root_causes([found("exploding", exploding), found("loss_spike", 121)])
    assert {each.kind for each in story} == told
