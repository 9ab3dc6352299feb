"""Steps that nothing is recorded of are only counted, and nothing that happens at them is lost."""

from __future__ import annotations

import gc
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradwatch
from gradwatch.health import rank_drift, straggler
from gradwatch.pacer import MIN_FRAMES_SHARE, WARM_UP_STEPS, Clock, Pacer
from gradwatch.reading import COMPARED
from gradwatch.replay import read_spool
from gradwatch.waiting import WaitClock
from gradwatch.watching import OptimizerWatch
from gradwatch.wire.frame import Frame, Origin, Record

from ..zoo.merging import together

Kept = Callable[[], list[Record]]
# Frames so rare that after the first steps there is none but for a reason.
RARELY = {"norm_every": 1000, "detail_every": 1000}
STEPS = 40


def frames(kept: Kept, optimizer: str = "SGD") -> dict[int, Frame]:
    """By step."""
    found = [record for record in kept() if isinstance(record, Frame)]
    return {frame.step: frame for frame in found if frame.optimizer == optimizer}


def job() -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> float:
    optimizer.zero_grad()
    loss = (model(torch.ones(2, 4)) * factor).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.fixture(autouse=True)
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many steps of each optimizer were more than counted."""
    counted: Counter[str] = Counter()
    observe = OptimizerWatch._observe

    def noted(watch: OptimizerWatch, *given: object) -> None:
        counted[watch.name] += 1
        observe(watch, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(OptimizerWatch, "_observe", noted)
    # Samples of its own are due as time passes: without them steps are quiet on any machine.
    monkeypatch.setattr("gradwatch.flight.SHARE", 1e-9)
    return counted


def test_most_steps_are_only_counted_and_none_is_skipped(
    kept: Kept, looked_at: Counter[str]
) -> None:
    model, optimizer = job()
    with gradwatch.watch(model, optimizer, **RARELY):
        for _ in range(STEPS):
            stepped(model, optimizer)
        assert looked_at["SGD"] <= WARM_UP_STEPS + 2
        stepped(model, optimizer, math.nan)
    assert list(frames(kept)) == [*range(1, WARM_UP_STEPS + 1), STEPS + 1]
    assert frames(kept)[STEPS + 1].events == ("non_finite",)


def test_an_infinite_gradient_is_seen_at_its_step_as_well(kept: Kept) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, **RARELY):
        for _ in range(STEPS):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, math.inf)
        optimizer.step()
    assert frames(kept)[STEPS + 1].events == ("non_finite",)


def test_what_is_logged_belongs_to_its_step_with_the_rate_of_that_step(
    kept: Kept, looked_at: Counter[str]
) -> None:
    model, optimizer = job()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
    expected: dict[int, tuple[float, float]] = {}
    with gradwatch.watch(model, optimizer, **RARELY) as monitor:
        for step in range(1, STEPS + 1):
            rate = optimizer.param_groups[0]["lr"]
            loss = stepped(model, optimizer)
            schedule.step()
            if step % 3 == 0:
                monitor.log(loss=loss)
                expected[step] = loss, rate
    found = {
        step: (frame.scalars["loss"], frame.scalars["lr"])
        for step, frame in frames(kept).items()
        if "loss" in frame.scalars
    }
    assert found == expected
    assert all(frames(kept)[step].scalars["step_time_s"] > 0 for step in expected if step > 1)
    assert looked_at["SGD"] <= WARM_UP_STEPS + 2


def test_what_is_logged_before_its_step_belongs_to_it(kept: Kept) -> None:
    model, optimizer = job()
    with gradwatch.watch(model, optimizer, **RARELY) as monitor:
        for step in range(1, STEPS + 1):
            monitor.log(epoch=step)
            stepped(model, optimizer)
    assert {step: frame.scalars["epoch"] for step, frame in frames(kept).items()} == {
        step: step for step in range(1, STEPS + 1)
    }


def test_clipping_is_recorded_at_every_step_that_has_it(kept: Kept) -> None:
    model, optimizer = job()
    totals: dict[int, float] = {}
    with gradwatch.watch(model, optimizer, **RARELY) as monitor:
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().mean().backward()
            if step % 4 == 0:
                totals[step] = float(monitor.clip_grad_norm_(model.parameters(), 0.01))
            optimizer.step()
    found = {
        step: frame.scalars["total_norm_before_clip"]
        for step, frame in frames(kept).items()
        if "total_norm_before_clip" in frame.scalars
    }
    assert found == pytest.approx(totals, rel=1e-5)


def test_a_step_that_a_scaler_skips_is_told_of(kept: Kept) -> None:
    model, optimizer = job()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with gradwatch.watch(model, optimizer, **RARELY):
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().mean()
            scaler.scale(loss * (math.inf if step == 30 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    skipped = [step for step, frame in frames(kept).items() if "amp_skipped" in frame.events]
    assert skipped == [30]


@pytest.mark.parametrize("enabled", [True, False])
def test_steps_under_a_loss_scaler_are_only_counted_as_well(
    enabled: bool, kept: Kept, looked_at: Counter[str]
) -> None:
    model, optimizer = job()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=enabled)
    with gradwatch.watch(model, optimizer, **RARELY):
        for _ in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 4)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert looked_at["SGD"] <= WARM_UP_STEPS + 2
    assert list(frames(kept)) == [*range(1, WARM_UP_STEPS + 1)]
    assert all(("grad_scale" in frame.scalars) == enabled for frame in frames(kept).values())


def test_a_step_that_a_fused_optimizer_skips_is_told_of_though_those_before_had_no_scaler(
    kept: Kept,
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with gradwatch.watch(model, optimizer, **RARELY):
        for _ in range(STEPS):
            stepped(model, optimizer)
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).square().mean()).backward()
        assert model[2].weight.grad is not None
        model[2].weight.grad.fill_(math.inf)  # far from the input, where every step is looked at
        scaler.step(optimizer)
        scaler.update()
    skipped = [step for step, frame in frames(kept).items() if "amp_skipped" in frame.events]
    assert skipped == [STEPS + 1]


class Times:
    """Instead of a clock: times are what a test says they are."""

    def __init__(self) -> None:
        self.now_s = 1.0
        self.wait_s = 0.0  # of the backward pass at hand, for other ranks

    def perf_counter(self) -> float:
        self.now_s += 1e-6  # what anything costs
        return self.now_s

    def between(self, first: object, last: object) -> Callable[[], float]:
        waited_s = self.wait_s
        return lambda: waited_s


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> Times:
    """This process is one of two ranks, whose gradients torch averages."""
    times = Times()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def averaged(models: object, parameters: Iterable[torch.Tensor], world_size: int) -> set[int]:
        return {id(parameter) for parameter in parameters}

    monkeypatch.setattr("gradwatch.survey.wrapped_by_ddp", averaged)
    monkeypatch.setattr("gradwatch.watching.time", times)
    monkeypatch.setattr("gradwatch.waiting._between", times.between)
    monkeypatch.setattr(WaitClock, "starved_s", lambda _: 0.0)
    # Activations are sampled in real time: after the first steps there are no frames for them.
    monkeypatch.setattr("gradwatch.watching.DETAIL_SHARE", 1e-9)
    return times


def test_ranks_count_the_steps_between_their_comparisons_and_time_each_of_them(
    kept: Kept, looked_at: Counter[str], of_two: Times
) -> None:
    model, optimizer = job()
    with gradwatch.watch(model, optimizer, norm_every=1000, detail_every=20):
        for step in range(1, 91):
            of_two.now_s += step
            of_two.wait_s = step / 4
            stepped(model, optimizer)
    compared = {step: frame for step, frame in frames(kept).items() if COMPARED in frame.columns}
    assert list(compared) == [*range(1, WARM_UP_STEPS + 1), 20, 40, 60, 80]
    for step in (40, 60, 80):
        median = step - 9.5  # of this step and the 19 before
        scalars = compared[step].scalars
        assert scalars["wait_time_s"] == pytest.approx(median / 4)
        assert scalars["own_time_s"] == pytest.approx(median * 3 / 4, rel=1e-3)
    assert looked_at["SGD"] <= WARM_UP_STEPS + 8


def test_what_a_step_costs_the_agent_is_none_of_the_time_that_its_rank_needs(
    kept: Kept, looked_at: Counter[str], of_two: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = OptimizerWatch._measured

    def slowly(*given: object) -> object:
        of_two.now_s += 1000.0
        return observe(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(OptimizerWatch, "_measured", slowly)
    monkeypatch.setattr("gradwatch.flight.Pacer", lambda _, share: Pacer(1000, share))
    model, optimizer = job()
    with gradwatch.watch(model, optimizer, overhead_budget=0, norm_every=2, detail_every=20):
        for step in range(1, 41):
            of_two.now_s += 1.0 if step % 2 else 3.0
            stepped(model, optimizer)
    assert looked_at["SGD"] < 30  # of 40: it is every other one
    assert frames(kept)[40].scalars["own_time_s"] == pytest.approx(2.0, rel=1e-3)


def test_a_parameter_whose_optimizer_is_gone_is_timed_no_more(of_two: Times) -> None:
    model, optimizer = job()
    with gradwatch.watch(model, optimizer):
        stepped(model, optimizer)
        timed = [each for each in model.parameters() if each._post_accumulate_grad_hooks]
        assert len(timed) == 1
        del optimizer
        gc.collect()
        assert not timed[0]._post_accumulate_grad_hooks


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["healthy", "lags", "drifts"])
def test_two_ranks_that_look_at_few_steps_see_what_goes_wrong_between_them(
    fault: str, spool: Path
) -> None:
    script = Path(__file__).parent / "quiet_ranks.py"
    done = subprocess.run(
        [sys.executable, str(script), fault],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    looked_at = [int(count) for count in re.findall(r"looked at (\d+)", done.stdout)]
    assert len(looked_at) == 2
    assert max(looked_at) < 40  # of 100
    ranks = [read_spool(folder) for folder in sorted(spool.iterdir())]
    for rank in ranks:
        compared = [frame for frame in rank.frames["SGD"] if COMPARED in frame.columns]
        assert [frame.step for frame in compared] == [*range(1, 11), 20, 40, 60, 80, 100]
        timed = {frame.step for frame in compared if "own_time_s" in frame.scalars}
        assert timed.issuperset(() if fault == "drifts" else {20, 40, 60, 80, 100})
    window = together(ranks).window("SGD")
    slow, drift = straggler.detect(window), rank_drift.detect(window)
    assert (slow is not None, drift is not None) == (fault == "lags", fault == "drifts")


def test_the_origin_of_a_nan_is_found_after_quiet_steps(kept: Kept) -> None:
    model, optimizer = job()
    with gradwatch.watch(model, optimizer, **RARELY):
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            output = model(torch.ones(2, 4)).square()
            loss = torch.sqrt(output.sum() * (-1 if step >= 30 else 1))
            loss.backward()
            optimizer.step()
    (origin,) = [record for record in kept() if isinstance(record, Origin)]
    assert origin.step in range(30, 36)
    assert origin.operation == "sqrt"


def test_training_stops_though_its_steps_are_quiet() -> None:
    model, optimizer = job()
    gradwatch.watch(model, optimizer, stop_on="non_finite", **RARELY)
    for _ in range(STEPS):
        stepped(model, optimizer)

    def go_on() -> None:
        for _ in range(200):
            stepped(model, optimizer, math.nan)
            time.sleep(0.01)

    with pytest.raises(gradwatch.TrainingStoppedError) as raised:
        go_on()
    assert raised.value.finding.first_step == STEPS + 1


def test_a_step_with_a_closure_is_counted_once(kept: Kept) -> None:
    model, optimizer = job()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    with gradwatch.watch(model, optimizer, **RARELY) as monitor:
        for step in range(1, STEPS + 1):
            optimizer.step(closure)  # pyright: ignore
            monitor.log(number=step)
    logged = {step: frame.scalars["number"] for step, frame in frames(kept).items()}
    assert logged == {step: step for step in range(1, STEPS + 1)}


def test_each_optimizer_counts_its_own(kept: Kept) -> None:
    first, second = job(), job()
    with gradwatch.watch([first[0], second[0]], [first[1], second[1]], **RARELY) as monitor:
        for step in range(1, STEPS + 1):
            stepped(*first)
            if step % 2 == 0:
                stepped(*second)
                monitor.log(loss=step)
    assert frames(kept, "SGD").keys() == set(range(1, WARM_UP_STEPS + 1))
    logged = {step: frame.scalars["loss"] for step, frame in frames(kept, "SGD-2").items()}
    assert logged == {step: 2 * step for step in range(1, STEPS // 2 + 1)}


def test_a_fault_at_a_quiet_step_is_counted_and_training_goes_on(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = job()
    monitor = gradwatch.watch(model, optimizer, **RARELY)
    for _ in range(STEPS):
        stepped(model, optimizer)

    def fail(_: OptimizerWatch) -> bool:
        raise RuntimeError("broken")

    with monkeypatch.context() as broken:
        broken.setattr(OptimizerWatch, "_is_broken", fail)
        stepped(model, optimizer)
    stepped(model, optimizer)
    monitor.log(loss=1.0)
    monitor.finish()
    assert monitor.dropped == {"agent_error": 1}
    assert max(frames(kept)) == STEPS + 2


@pytest.mark.slow
def test_a_compiled_step_is_left_as_it_is(looked_at: Counter[str]) -> None:
    counters = torch._dynamo.utils.counters
    counts: list[dict[str, object]] = []
    for settings in (RARELY, {"overhead_budget": 0}):
        torch._dynamo.reset()
        counters.clear()
        model, optimizer = job()
        step = torch.compile(optimizer.step, backend="aot_eager")
        looked_at.clear()
        with gradwatch.watch(model, optimizer, **settings):  # type: ignore[arg-type]
            for number in range(30):
                optimizer.zero_grad()
                model(torch.ones(2, 4)).square().mean().backward()
                if number == 20:
                    torch._dynamo.config.error_on_recompile = True
                step()
        torch._dynamo.config.error_on_recompile = False
        counts.append(
            {
                "looked at": looked_at["SGD"],
                "graphs": counters["stats"]["unique_graphs"],
                "breaks": sum(counters["graph_break"].values()),
                "recompilations": dict(counters["recompiles"]),
            }
        )
    torch._dynamo.reset()
    counters.clear()
    quiet, always = counts
    assert quiet.pop("looked at") != always.pop("looked at")
    assert quiet == always


budgets = st.floats(1e-4, 0.5)
steps_s = st.lists(st.tuples(st.floats(1e-5, 2.0), st.floats(0.0, 0.1)), min_size=1, max_size=200)


@given(steps_s, budgets)
def test_the_clock_stands_still_until_what_was_spent_is_earned(
    steps: list[tuple[float, float]], budget: float
) -> None:
    clock = Clock(budget)
    elapsed_s = spent_s = 0.0
    for step_s, cost_s in steps:
        before = clock.now_s
        expected = clock.after(step_s)
        clock.advance(step_s, cost_s)
        elapsed_s += step_s
        spent_s += cost_s
        assert clock.now_s == expected
        assert clock.now_s - before >= MIN_FRAMES_SHARE * step_s - 1e-9
    assert clock.now_s <= elapsed_s + 1e-9
    assert clock.now_s >= elapsed_s - spent_s / budget - 1e-6


def test_what_is_spent_is_earned_in_full_where_there_is_time() -> None:
    clock = Clock(0.01)
    for _ in range(1000):
        clock.advance(1.0, 0.005)
    assert clock.now_s == pytest.approx(500, abs=2)


def test_a_long_debt_is_forgiven() -> None:
    clock = Clock(0.01)
    clock.advance(1.0, 1e6)
    for _ in range(1000):
        clock.advance(1.0, 0.0)
    assert clock.now_s > 800


def test_without_a_limit_the_clock_is_that_of_the_training() -> None:
    clock = Clock(0.0)
    clock.advance(2.0, 1.0)
    clock.advance(1.0, 0.0)
    assert clock.now_s == 3.0
