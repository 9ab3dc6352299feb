"""Ranks are compared at the same steps, by numbers that equal weights share."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradwatch.layers import Layer
from gradwatch.measure import Meter
from gradwatch.rank_check import RankCheck
from gradwatch.reading import COMPARED
from gradwatch.waiting import WaitClock


def met(check: RankCheck, step_s: float, cost_s: float, steps: int = 4000) -> list[int]:
    """The steps at which a rank of such steps and costs is compared."""
    found: list[int] = []
    for step in range(1, steps + 1):
        check.stepped(step_s, [lambda: 0.0])
        if check.due(step):
            check.took(cost_s)
            found.append(step)
    return found


def test_without_a_limit_ranks_meet_on_the_first_steps_and_each_so_many_th():
    assert met(RankCheck(20, 0.0), 0.1, 1.0, 60) == [*range(1, 11), 20, 40, 60]


def test_what_costs_too_much_is_done_more_rarely_and_ranks_of_unlike_costs_still_meet():
    cheap, dear = met(RankCheck(20, 0.001), 0.1, 0.002), met(RankCheck(20, 0.001), 0.1, 0.015)
    assert cheap[10:13] == [20, 40, 60]
    assert np.diff(dear[-4:]).tolist() == [160] * 3
    assert set(dear) <= set(cheap)


def test_the_next_comparison_is_the_first_step_after_that_one_is_due_at():
    for cost_s in (0.002, 0.015, 0.5):
        check = RankCheck(20, 0.001)
        for _ in range(3):
            check.stepped(0.1, [lambda: 0.0])
            check.took(cost_s)
        for step in range(400):
            rest = range(step + 1, step + 10_000)
            assert check.next_step(step) == next(each for each in rest if check.due(each))


def test_a_rank_tells_the_median_of_its_last_steps_without_its_waits():
    check = RankCheck(20, 0.0)
    assert check.times_s() == {}
    for step in range(40):
        pause_s = 50.0 if step == 30 else 0.0
        check.stepped(1.0 + pause_s, [lambda: 0.2, lambda: 0.1])
    check.stepped(1.0, None)  # no backward pass reached the parameter
    told = {name: time_s() for name, time_s in check.times_s().items()}
    assert told == {"own_time_s": pytest.approx(0.7), "wait_time_s": pytest.approx(0.3)}


def probes(*weights: Tensor) -> list[float]:
    """What a rank with these weights tells of each."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    layers = [Layer(str(place), each, None) for place, each in enumerate(parameters)]
    for read in (Meter(layers).norms, Meter(layers).details):
        reading = read(parameters, compare=True)
        assert reading is not None
        found = reading.resolve()
        assert found.columns[-1] == COMPARED
        row = found.values[-1]
    return row.tolist()


@pytest.mark.parametrize("shape", [(5,), (40, 30), (3000,), (1,)])
def test_equal_weights_give_equal_numbers_and_others_differ_by_their_distance(
    shape: tuple[int, ...],
):
    torch.manual_seed(0)
    weight = torch.randn(*shape)
    assert probes(weight) == probes(weight)
    for distance in (1e-4, 1e-2):
        changes = [torch.randn(*shape) for _ in range(30)]
        moved = [w * distance * weight.norm() / w.norm() + weight for w in changes]
        seen = [abs(probes(each)[0] - probes(weight)[0]) for each in moved]
        assert 0.2 * distance < float(np.sqrt(np.mean(np.square(seen)))) < 5 * distance


def test_a_change_of_length_alone_is_seen():
    ones = torch.ones(64)
    assert abs(probes(1.01 * ones)[0] - probes(ones)[0]) == pytest.approx(0.01, rel=0.02)


def test_weights_that_are_0_or_nan_or_without_gradient_have_their_number_too():
    zero, broken = probes(torch.zeros(4), torch.full((4,), torch.nan))
    assert zero == 0
    assert np.isnan(broken)
    bare, trained = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    trained.grad = torch.ones(4)
    layers = [Layer("bare", bare, None), Layer("trained", trained, None)]
    reading = Meter(layers).norms([bare, trained], compare=True)
    assert reading is not None
    told = reading.resolve().values[-1]
    assert told[0] == told[1] != 0


def test_a_job_of_one_rank_measures_nothing_for_others():
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    reading = Meter([Layer("it", parameter, None)]).details([parameter])
    assert reading is not None
    assert COMPARED not in reading.resolve().columns


def test_a_script_that_closes_every_file_costs_a_clock_only_the_waits_for_a_core():
    faults: list[Exception] = []
    clock = WaitClock(nn.Linear(3, 2).weight, faults.append)
    opened = clock._cores
    assert opened is not None
    os.close(opened)
    assert clock.starved_s() == 0
    clock.remove()
    assert faults == []


def test_the_end_of_each_backward_pass_is_timed_and_the_model_stays_an_ordinary_one(tmp_path: Path):
    model = nn.Linear(3, 2)
    faults: list[Exception] = []
    clock = WaitClock(model.weight, faults.append)
    assert clock.take() is None
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
    spans = clock.take()
    assert spans is not None
    assert len(spans) == 2
    assert all(span() >= 0 for span in spans)
    assert clock.take() is None
    twin = copy.deepcopy(model)
    twin(torch.ones(1, 3)).sum().backward()
    pickle.loads(pickle.dumps(model))(torch.ones(1, 3)).sum().backward()
    torch.save(model, tmp_path / "model.pt")
    assert clock.take() is None
    assert 0 <= clock.starved_s() < 1000
    assert clock.starved_s() < 100
    clock.remove()
    assert clock.starved_s() == 0
    model(torch.ones(1, 3)).sum().backward()
    assert clock.take() is None
    assert faults == []


def test_no_time_is_told_of_no_step_however_often_ranks_are_compared() -> None:
    assert RankCheck(every=1, share=0.0).times_s() == {}
