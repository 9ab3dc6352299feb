from __future__ import annotations

import pytest

from gradwatch.health.causes import root_causes
from gradwatch.health.finding import Finding, Severity


def found(kind: str, step: int, severity: Severity = Severity.CRITICAL) -> Finding:
    return Finding(kind, severity, (), step, 200, "summary")


@pytest.mark.parametrize(
    ("exploding", "told"), [(110, {"exploding"}), (121, {"exploding", "loss_spike"})]
)
def test_gradients_bring_about_no_leap_of_the_loss_that_they_are_of(
    exploding: int, told: set[str]
) -> None:
    story = root_causes([found("exploding", exploding), found("loss_spike", 121)])
    assert {each.kind for each in story} == told


@pytest.mark.parametrize(
    ("severity", "told"),
    [
        (Severity.CRITICAL, {"dead_units"}),
        (Severity.WARNING, {"dead_units", "learning_rate_too_low"}),
    ],
)
def test_dead_units_are_why_nothing_is_learnt_where_hardly_any_live(
    severity: Severity, told: set[str]
) -> None:
    story = root_causes([found("dead_units", 5, severity), found("learning_rate_too_low", 1)])
    assert {each.kind for each in story} == told
