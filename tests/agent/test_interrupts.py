"""What a signal's handler raises reaches the script, wherever the agent was at that moment."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import activations
from gradwatch.interrupts import is_scripts_own
from gradwatch.run_script import watch_every_optimizer
from gradwatch.settings import Settings
from gradwatch.watching import OptimizerWatch


class TimeIsUpError(Exception):
    """Of a script that has given itself so long."""


def give_up(*_: object) -> None:
    raise TimeIsUpError


def through_another(*_: object) -> None:
    give_up()


class Limit:
    def over(self, *_: object) -> None:
        raise TimeIsUpError

    __call__ = over


HANDLERS: dict[str, Callable[..., None]] = {
    "a function": give_up,
    "one that calls another": through_another,
    "a method": Limit().over,
    "an object": Limit(),
    "a partial": functools.partial(give_up, 1),
}


@pytest.fixture
def handled() -> Iterator[Callable[[Any], None]]:
    before = signal.getsignal(signal.SIGALRM)
    yield lambda handler: signal.signal(signal.SIGALRM, handler)  # pyright: ignore
    signal.signal(signal.SIGALRM, before)


def interrupted(*_: Any, **__: Any) -> Any:
    """Stands in the place of something of the agent's."""
    signal.raise_signal(signal.SIGALRM)


@pytest.mark.parametrize("kind", HANDLERS)
def test_what_a_handler_raises_is_the_scripts_own(kind: str, handled: Any) -> None:
    handled(HANDLERS[kind])
    with pytest.raises(TimeIsUpError) as caught:
        interrupted()
    assert is_scripts_own(caught.value)


def test_any_other_error_is_not(handled: Any) -> None:
    handled(lambda *_: None)
    with pytest.raises(TimeIsUpError) as caught:
        give_up()
    assert not is_scripts_own(caught.value)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()


def test_it_is_raised_out_of_a_sampled_activation(
    handled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled(give_up)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr(activations._listener, "_sample", interrupted)
    monitor = gradwatch.watch(model, optimizer, overhead_budget=0, detail_every=1)
    with pytest.raises(TimeIsUpError), monitor:
        train(model, optimizer)


@pytest.mark.parametrize("within", ["_observe", "_sleep", "_is_broken"])
def test_it_is_raised_out_of_a_step(
    within: str, handled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled(give_up)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rarely = {"norm_every": 1000, "detail_every": 1000}
    with gradwatch.watch(model, optimizer, overhead_budget=0, **rarely) as monitor:
        for _ in range(4):  # past the first steps, that are all looked at
            train(model, optimizer)
        monkeypatch.setattr(OptimizerWatch, within, interrupted)
        if within != "_is_broken":
            monitor.clip_grad_norm_(model.parameters(), 1.0)  # brings news for the step
        with pytest.raises(TimeIsUpError):
            train(model, optimizer)
        assert monitor.dropped == {}


def test_it_is_raised_out_of_the_hook_of_gradwatch_run(
    handled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled(give_up)
    monkeypatch.setattr("gradwatch.run_script.current_job", interrupted)
    model = nn.Linear(3, 2)
    stop = watch_every_optimizer(Settings())
    try:
        with pytest.raises(TimeIsUpError):
            train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    finally:
        stop()
