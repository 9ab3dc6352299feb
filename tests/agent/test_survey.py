"""The optimizers of a job share a look at its models, however many there are."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import monitor
from gradwatch.layers import living
from gradwatch.run_script import watch_every_optimizer
from gradwatch.settings import Settings
from gradwatch.tracer import AGENT_FOLDER
from gradwatch.wire.frame import Frame, Manifest, Origin, Record

Kept = Callable[[], list[Record]]
STEPS = 3


def stepped_in_the_backward_pass(model: nn.Module) -> list[torch.optim.Optimizer]:
    """An optimizer for each parameter, which a hook steps as soon as the gradient is there."""
    optimizers: dict[Tensor, torch.optim.Optimizer] = {
        each: torch.optim.SGD([each], lr=0.01) for each in model.parameters()
    }

    def step_now(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step_now)
    return list(optimizers.values())


def found_as_they_step(train: Callable[[], object]) -> None:
    """As `gradwatch run` does it."""
    stop = watch_every_optimizer(Settings.load({}))
    try:
        train()
    finally:
        stop()
        assert monitor._current is not None
        monitor._current.finish("finished")
        assert not monitor._current.outlet.drops


def calls_of_the_agent(work: Callable[[], object]) -> int:
    """Functions of the agent's, and of torch's for it, that run in this thread meanwhile."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        caller: FrameType | None = frame
        if event == "call":
            for _ in range(3):
                if caller is not None and caller.f_code.co_filename.startswith(AGENT_FOLDER):
                    calls += 1
                    return
                caller = caller.f_back if caller is not None else None

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def manifests(records: list[Record]) -> dict[str, list[Manifest]]:
    """Each version once: they may travel again."""
    found: dict[str, dict[int, Manifest]] = {}
    for record in records:
        if isinstance(record, Manifest):
            found.setdefault(record.optimizer, {})[record.version] = record
    return {optimizer: list(versions.values()) for optimizer, versions in found.items()}


def names(manifest: Manifest) -> list[str]:
    return [layer.name for layer in manifest.layers]


@pytest.mark.parametrize("how", ["watched", "found", "found one by one"])
def test_optimizers_in_the_backward_pass_cost_no_more_each_the_more_there_are(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cost(layers: int) -> int:
        monkeypatch.setenv("GRADWATCH_SPOOL", str(tmp_path / str(layers)))
        parts = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(layers)]
        whole = [nn.Sequential(*parts)]
        optimizers = stepped_in_the_backward_pass(whole[0])
        if how == "found one by one":  # each part is then a model of its own
            whole.clear()

        def train() -> None:
            for _ in range(STEPS):
                x = torch.ones(2, 4)
                for part in parts:
                    x = part(x)
                x.sum().backward()

        if how == "watched":
            with gradwatch.watch(whole[0], optimizers):
                return calls_of_the_agent(train)
        return calls_of_the_agent(lambda: found_as_they_step(train))

    cost(10)  # what is imported and cached at first
    assert cost(80) < 2.5 * cost(40)


def test_each_layer_is_described_once_by_the_optimizer_in_the_backward_pass(kept: Kept) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    stepped_in_the_backward_pass(model)

    def train() -> None:
        for _ in range(STEPS):
            model(torch.ones(2, 4)).sum().backward()

    found_as_they_step(train)
    told = manifests(kept())
    assert [[len(each.layers) for each in versions] for versions in told.values()] == [[1]] * 10
    assert sorted(name for versions in told.values() for name in names(versions[-1])) == sorted(
        name for name, _ in model.named_parameters()
    )
    sizes = Counter(frame.layers for frame in kept() if isinstance(frame, Frame))
    assert sizes == {1: 10 * STEPS}


def test_layers_that_no_optimizer_holds_are_described_by_one(kept: Kept) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    one, other = (torch.optim.SGD(model[place].parameters(), lr=0.1) for place in (2, 1))
    with gradwatch.watch(model, [one, other]):
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            one.step()
            other.step()
        other.add_param_group({"params": list(model[0].parameters())})
        for _ in range(2):
            other.step()
            one.step()
    told = manifests(kept())
    assert [[name[0] for name in names(each)] for each in told["SGD"]] == [
        ["0", "0", "2", "2", "3", "3"],
        ["2", "2", "3", "3"],
    ]
    assert [[name[0] for name in names(each)] for each in told["SGD-2"]] == [
        ["1", "1"],
        ["0", "0", "1", "1"],
    ]


def test_a_model_that_was_made_since_another_was_looked_for_is_found(kept: Kept) -> None:
    """Within one iteration: no optimizer has taken a second step."""
    alive: list[object] = []

    def train() -> None:
        for width in (2, 3, 4):
            model = nn.Sequential(nn.Linear(width, 1))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(torch.ones(1, width)).sum().backward()
            optimizer.step()
            alive.append((model, optimizer))

    found_as_they_step(train)
    told = manifests(kept())
    assert [each[0].layers[0].shape for each in told.values()] == [(1, 2), (1, 3), (1, 4)]
    assert [names(each[0]) for each in told.values()] == [["0.weight", "0.bias"]] * 3


def test_a_model_that_hides_behind_parameters_of_none_is_found_an_iteration_later(
    kept: Kept,
) -> None:
    """Looking was in vain once, and is not done again for each parameter that is in no module."""
    bare = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizers = [torch.optim.SGD([each], lr=0.1) for each in bare]
    late: list[nn.Module] = []

    def train() -> None:
        for _ in range(2):
            if len(late) == 0:
                sum(each.sum() for each in bare).backward()  # pyright: ignore
                for optimizer in optimizers:
                    optimizer.step()
                late.append(nn.Sequential(nn.Linear(2, 1)))
                optimizers.append(torch.optim.SGD(late[0].parameters(), lr=0.1))
            late[0](torch.ones(1, 2)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()

    found_as_they_step(train)
    told = manifests(kept())
    assert names(told["SGD-2"][-1]) == ["SGD-2.parameter_0"]
    assert names(told["SGD-4"][-1]) == ["0.weight", "0.bias"]


def test_a_nan_in_the_backward_pass_is_told_with_the_data_it_came_with(kept: Kept) -> None:
    """What happens before and after that pass cannot be traced from within it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    with gradwatch.watch(model, stepped_in_the_backward_pass(model)) as watching:
        for step in range(1, 10):
            batch = torch.ones(2, 4)
            batch[1, 2] = float("nan") if step == 3 else 1.0
            model(batch).sum().backward()
    assert watching.dropped == {}
    steps = Counter(frame.step for frame in kept() if isinstance(frame, Frame))
    assert steps == dict.fromkeys(range(1, 10), 4)
    origins = [record for record in kept() if isinstance(record, Origin)]
    # The bias at the end has the same gradient whatever comes in.
    assert {origin.optimizer for origin in origins} == {"SGD", "SGD-2", "SGD-3"}
    assert {(each.step, each.kind, each.operation) for each in origins} == {(3, "batch", "batch")}


def test_an_optimizer_that_is_let_go_of_leaves_its_share_of_the_budget_and_no_model() -> None:
    other, model = nn.Linear(2, 2), nn.Linear(2, 2)
    held = [other.weight, *model.parameters()]
    optimizers = [torch.optim.SGD([each], lr=0.1) for each in held]
    del held
    with gradwatch.watch([other, model], optimizers):
        model(other(torch.ones(1, 2))).sum().backward()
        for place in range(3):
            optimizers[place].step()
        job = monitor._current
        assert job is not None
        assert job.sharers == 3
        gone = weakref.ref(model)
        del model, optimizers[1:]
        gc.collect()
        assert gone() is None
        assert job.sharers == 1


def test_looking_for_models_disturbs_no_other_thread() -> None:
    """A tuple cannot be completed while somebody else has hold of it, as a list of all objects."""
    model = nn.Linear(2, 2)
    errors: list[BaseException] = []
    made = 0
    done = threading.Event()

    def complete() -> None:
        nonlocal made
        while not done.is_set():
            try:
                tuple(item for item in range(20_000))
                made += 1
            except SystemError as error:
                errors.append(error)

    thread = threading.Thread(target=complete)
    thread.start()
    try:
        for _ in range(10):
            assert any(each is model for each in living(nn.Module))
    finally:
        done.set()
        thread.join()
    assert made > 0
    assert errors == []


def test_layers_of_an_optimizer_that_has_not_stepped_yet_are_no_part_of_another_ones_norm(
    kept: Kept,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    first = torch.optim.SGD(model[0].parameters(), lr=0.0)
    second = torch.optim.Adam([model[1].weight], lr=0.0)

    def train() -> None:
        for _ in range(STEPS):
            model.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            first.step()
            second.step()

    found_as_they_step(train)
    # No optimizer holds the last bias, and one is to describe it.
    gradients = [each.grad for each in (*model[0].parameters(), model[1].bias)]
    norm = float(torch.stack([each.norm() for each in gradients if each is not None]).norm())
    records = kept()
    frames = [each for each in records if isinstance(each, Frame) and each.optimizer == "SGD"]
    assert frames[0].scalars["total_norm"] == pytest.approx(norm, rel=1e-5)
    described = [name for versions in manifests(records).values() for name in names(versions[-1])]
    assert sorted(described) == ["0.bias", "0.weight", "1.bias", "1.weight"]
