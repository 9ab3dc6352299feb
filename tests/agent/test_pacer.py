"""Frames keep within their share of the training time, and the start is seen at full rate."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradwatch
from gradwatch.pacer import MAX_CREDIT_FRAMES, WARM_UP_STEPS, Pacer
from gradwatch.wire.frame import Record

times = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=300)
costs = st.floats(1e-6, 0.5)
shares = st.floats(0.001, 0.5)


def taken(pacer: Pacer, elapsed: list[float], cost_s: float) -> list[int]:
    """Steps, counted from 1, at which a frame was taken."""
    steps: list[int] = []
    for step, clock_s in enumerate(itertools.accumulate(elapsed), start=1):
        if pacer.due(step, clock_s):
            pacer.took(step, clock_s, cost_s)
            steps.append(step)
    return steps


@given(times, costs, shares, st.integers(1, 50))
def test_the_first_steps_are_all_taken(
    elapsed: list[float], cost_s: float, share: float, every: int
) -> None:
    warm_up = min(WARM_UP_STEPS, len(elapsed))
    assert taken(Pacer(every, share), elapsed, cost_s)[:warm_up] == list(range(1, warm_up + 1))


@given(times, costs, shares)
def test_what_frames_cost_stays_within_the_share_of_the_time(
    elapsed: list[float], cost_s: float, share: float
) -> None:
    steps = taken(Pacer(1, share), elapsed, cost_s)
    paid = [step for step in steps if step > WARM_UP_STEPS]
    credit_s = share * sum(elapsed)
    assert len(paid) * cost_s <= credit_s + 1e-9


@given(times, st.lists(costs, min_size=300, max_size=300), shares)
def test_costs_that_vary_stay_within_the_share_but_for_one_frame(
    elapsed: list[float], cost_of: list[float], share: float
) -> None:
    pacer = Pacer(1, share)
    spent_s = 0.0
    for step, clock_s in enumerate(itertools.accumulate(elapsed), start=1):
        if pacer.due(step, clock_s):
            pacer.took(step, clock_s, cost_of[step - 1])
            spent_s += cost_of[step - 1] if step > WARM_UP_STEPS else 0.0
    assert spent_s <= share * sum(elapsed) + max(cost_of)


@given(times, shares)
def test_the_cost_of_no_frame_in_particular_is_paid_for_too(
    elapsed: list[float], share: float
) -> None:
    pacer = Pacer(1, share)
    spent_s = 0.0
    for step, clock_s in enumerate(itertools.accumulate(elapsed), start=1):
        if pacer.due(step, clock_s):
            pacer.took(step, clock_s, 0.01)
            spent_s += 0.01 if step > WARM_UP_STEPS else 0.0
        pacer.charge(clock_s, 0.001)
    charged_s = 0.001 * len(elapsed)
    assert spent_s <= max(share * sum(elapsed) - charged_s + 0.001, 0.0) + 1e-9


@given(st.integers(1, 30), st.integers(1, 200))
def test_without_a_limit_every_so_many_steps_is_taken(every: int, steps: int) -> None:
    after = [step for step in taken(Pacer(every, 0.0), [0.0] * steps, 1.0) if step >= WARM_UP_STEPS]
    assert all(later - earlier == every for earlier, later in itertools.pairwise(after))


@given(times, costs, shares, st.integers(1, 30))
def test_frames_are_never_closer_than_asked_after_the_start(
    elapsed: list[float], cost_s: float, share: float, every: int
) -> None:
    after = [step for step in taken(Pacer(every, share), elapsed, cost_s) if step >= WARM_UP_STEPS]
    assert all(later - earlier >= every for earlier, later in itertools.pairwise(after))


def test_with_time_enough_every_step_is_taken() -> None:
    assert taken(Pacer(1, 0.01), [1.0] * 100, 0.001) == list(range(1, 101))


def test_a_long_pause_buys_no_burst_of_frames() -> None:
    pacer = Pacer(1, 0.01)
    taken(pacer, [0.01] * 100, 0.01)
    burst = 0
    for step in range(101, 201):
        if pacer.due(step, 3600.0):
            pacer.took(step, 3600.0, 0.01)
            burst += 1
    assert 1 <= burst <= MAX_CREDIT_FRAMES


def test_one_slow_frame_delays_the_next_only_by_what_it_cost() -> None:
    pacer = Pacer(1, 0.1)
    taken(pacer, [0.1] * 50, 0.001)
    pacer.took(51, 5.1, 1.0)
    waited = next(step for step in range(52, 1000) if pacer.due(step, step * 0.1))
    assert 95 <= waited - 51 <= 105


def test_the_optimizers_of_a_job_share_its_time(
    kept: Callable[[], list[Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: dict[int, float] = defaultdict(float)
    due = Pacer.due

    def noted(pacer: Pacer, step: int, clock_s: float) -> bool:
        passed[id(pacer)] = max(passed[id(pacer)], clock_s)
        return due(pacer, step, clock_s)

    monkeypatch.setattr(Pacer, "due", noted)
    weights = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
    began = time.perf_counter()
    with gradwatch.watch(nn.ParameterList(weights), optimizers):
        for _ in range(20):
            for weight, optimizer in zip(weights, optimizers, strict=True):
                weight.grad = torch.ones(4)
                optimizer.step()
    took_s = time.perf_counter() - began
    assert 0 < sum(passed.values()) <= took_s * len(passed) / len(optimizers)
    assert kept()
