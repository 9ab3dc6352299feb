"""Every job of the demo gets its verdict, from frames that were measured independently."""

from __future__ import annotations

import contextlib

import pytest

from gradwatch.demo.scenarios import (
    LOG_BLANK_STEP,
    SCENARIOS,
    Scenario,
)
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.judge import Verdict, judge, verdict
from gradwatch.health.kinds import KINDS

from .recorder import Recorder

LONG = set(SCENARIOS) - {"log-of-zero"}


class SeenEnough(Exception):  # noqa: N818
    """Raised out of a training loop whose later steps no test needs."""


def recorded(
    scenario: Scenario, seed: int, detail_every: int = 10, until: int | None = None
) -> Recorder:
    recorder = Recorder(detail_every=detail_every)
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(recorder.step)
        if recorder.step == until:
            raise SeenEnough

    with contextlib.suppress(SeenEnough):
        scenario.train(recorder, tick, seed)
    expected = list(range(1, (until or scenario.steps) + 1))
    assert ticks == expected, "one tick a step, as the table says"
    return recorder


def moments(recorder: Recorder) -> list[int]:
    """Steps at which to look: each early one, then ever more rarely, and the last."""
    last = recorder.steps[-1]
    return [*range(1, min(last, 25)), *range(25, last, max(last // 12, 1)), last]


def judged(recorder: Recorder) -> dict[int, list[Finding]]:
    return {step: judge(recorder.window(until=step)) for step in moments(recorder)}


CASES = [
    pytest.param(name, seed, id=f"{name}-{seed}", marks=[pytest.mark.slow] if name in LONG else [])
    for name in SCENARIOS
    for seed in ((0,) if name in LONG else (0, 1, 5))
]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_a_job_ends_with_exactly_its_findings_and_never_has_another(name: str, seed: int) -> None:
    scenario = SCENARIOS[name]
    recorder = recorded(scenario, seed)
    found = judged(recorder)
    assert {finding.kind for finding in found[recorder.steps[-1]]} == scenario.expected
    ever = {finding.kind for findings in found.values() for finding in findings}
    assert ever == scenario.expected


def test_the_demo_shows_the_four_patterns_and_health() -> None:
    shown = {kind for scenario in SCENARIOS.values() for kind in scenario.expected}
    assert shown == {"vanishing", "exploding", "dead_units", "non_finite"} <= set(KINDS)
    assert sum(not scenario.expected for scenario in SCENARIOS.values()) == 2


def test_the_transformer_learns_and_is_called_healthy() -> None:
    recorder = recorded(SCENARIOS["healthy-transformer"], 1, until=100)
    assert recorder.losses[100] < 0.7 * recorder.losses[1]
    assert verdict(judge(recorder.window())) is Verdict.HEALTHY


def test_vanishing_names_the_layers_at_the_input_and_none_at_the_output() -> None:
    recorder = recorded(SCENARIOS["ten-sigmoids"], 2, until=50)
    (finding,) = judge(recorder.window())
    assert finding.severity is Severity.CRITICAL
    assert finding.layers[0] == "0.weight"
    assert finding.first_step == 1
    assert not {"18.weight", "20.weight"} & set(finding.layers)


def test_explosion_is_told_within_20_steps() -> None:
    recorder = recorded(SCENARIOS["exploding-rnn"], 1, until=20)
    (finding,) = judge(recorder.window())
    assert finding.kind == "exploding"
    assert finding.first_step == 1


def test_a_dead_layer_is_named_and_the_layers_around_it_are_not() -> None:
    recorder = recorded(SCENARIOS["dead-relu"], 2, until=50)
    (finding,) = judge(recorder.window())
    assert finding.layers == ("4.weight",)
    assert finding.first_step == 1
    assert finding.evidence["layers before it left without gradient"] == 2


def test_non_finite_is_told_at_its_very_step_and_of_the_last_layer_first() -> None:
    recorder = recorded(SCENARIOS["log-of-zero"], 2)
    assert judge(recorder.window(until=LOG_BLANK_STEP - 1)) == []
    (finding,) = judge(recorder.window(until=LOG_BLANK_STEP))
    assert finding.first_step == LOG_BLANK_STEP
    assert finding.layers[0] == "4.weight"
    assert finding.evidence["loss at that step"] == "inf"
    (later,) = judge(recorder.window())
    assert later.first_step == LOG_BLANK_STEP


def test_rare_detail_frames_give_the_same_verdict() -> None:
    recorder = recorded(SCENARIOS["dead-relu"], 3, detail_every=20, until=200)
    assert [finding.layers for finding in judge(recorder.window())] == [("4.weight",)]
