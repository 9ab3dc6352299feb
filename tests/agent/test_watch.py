"""The one line: what is recorded of a training job, and that the job does not notice."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import gc
import io
import math
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
from gradwatch import activations
from gradwatch import job as job_module
from gradwatch import monitor as monitor_module
from gradwatch.measure import Meter
from gradwatch.settings import SettingError
from gradwatch.wire.frame import Frame, Manifest, Record, RunEnd

from .scripted_collector import Collector

Kept = Callable[[], list[Record]]
Batch = tuple[Tensor, Tensor]


def frames(records: list[Record], optimizer: str | None = None) -> list[Frame]:
    found = [record for record in records if isinstance(record, Frame)]
    return [frame for frame in found if optimizer in (None, frame.optimizer)]


def manifests(records: list[Record]) -> list[Manifest]:
    """Each once: a spool begins with those that its frames speak of."""
    found = {
        (record.optimizer, record.version): record
        for record in records
        if isinstance(record, Manifest)
    }
    return list(found.values())


def norm_of(frame: Frame, manifest: Manifest, layer: str) -> float:
    row = frame.row("norm")
    assert row is not None
    return float(row[[info.name for info in manifest.layers].index(layer)])


class Sequence(nn.Module):
    """An LSTM with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(self.lstm(series)[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def saturating() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.Dropout(0.3),
        nn.Hardtanh(inplace=True),
        nn.Linear(8, 3),
        nn.Sigmoid(),
    )


def recurrent() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 6)), Sequence())


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.1, batch_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(6, 3)
    )


def batches(steps: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        yield (
            torch.randn(5, 6, generator=generator),
            torch.randint(0, 3, (5,), generator=generator),
        )


def train(make: Callable[[], nn.Module], watched: bool, steps: int = 100) -> list[bytes]:
    """Losses and final weights, to the bit."""
    torch.manual_seed(5)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen: list[bytes] = []
    watching = gradwatch.watch(model, optimizer, detail_every=3) if watched else None
    for inputs, labels in batches(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        if watching is not None:
            watching.log(loss=loss)
        optimizer.step()
        seen.append(loss.detach().numpy().tobytes())
    if watching is not None:
        watching.finish()
    state = model.state_dict().values()
    return seen + [tensor.numpy().tobytes() for tensor in state]


@pytest.mark.parametrize("make", [mlp, convolutional, saturating, recurrent, transformer])
def test_training_is_the_same_to_the_bit_with_and_without_the_agent(
    make: Callable[[], nn.Module], kept: Kept
) -> None:
    assert train(make, watched=True) == train(make, watched=False)
    assert frames(kept())[0].step == 1
    assert frames(kept())[-1].step > 10


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, size: int = 1) -> Tensor:
    """One ordinary training step."""
    optimizer.zero_grad()
    loss = model(torch.ones(size, next(model.parameters()).shape[1])).pow(2).sum()
    loss.backward()
    optimizer.step()
    return loss


def linear_pair(inputs: int = 2, **keywords: Any) -> tuple[nn.Linear, torch.optim.SGD]:
    torch.manual_seed(0)
    model = nn.Linear(inputs, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, **keywords)


def test_the_norms_of_a_frame_are_those_of_the_gradients_that_were_applied(kept: Kept) -> None:
    model, optimizer = linear_pair()
    expected: list[float] = []
    with gradwatch.watch(model, optimizer):
        for _ in range(5):
            stepped(model, optimizer)
            assert model.weight.grad is not None
            expected.append(float(model.weight.grad.double().norm()))
    (manifest,) = manifests(kept())
    found = [norm_of(frame, manifest, "weight") for frame in frames(kept())]
    assert [frame.step for frame in frames(kept())] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_accumulated_gradients_make_one_frame_a_step_of_their_sum(kept: Kept) -> None:
    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(4):
                model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    (manifest,) = manifests(kept())
    assert [frame.step for frame in frames(kept())] == [1, 2, 3]
    assert norm_of(frames(kept())[0], manifest, "bias") == pytest.approx(4 * math.sqrt(2))


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("kind", ["LBFGS", "SGD"])
def test_a_step_with_a_closure_is_measured_after_it(how: str, kind: str, kept: Kept) -> None:
    model = nn.Linear(2, 1)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).pow(2).sum()
        loss.backward()
        return loss.item()

    expected: list[float] = []
    with gradwatch.watch(model, optimizer):
        for _ in range(3):
            optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
            assert model.weight.grad is not None
            expected.append(float(model.weight.grad.norm()))
    (manifest,) = manifests(kept())
    assert [frame.step for frame in frames(kept())] == [1, 2, 3]
    np.testing.assert_allclose(
        [norm_of(frame, manifest, "weight") for frame in frames(kept())], expected, rtol=1e-6
    )


def test_two_optimizers_have_their_own_layers_and_step_counts_in_one_run(kept: Kept) -> None:
    generator, generator_optimizer = linear_pair()
    critic, critic_optimizer = linear_pair()
    first = gradwatch.watch(generator, generator_optimizer)
    second = gradwatch.watch(critic, critic_optimizer)
    for _ in range(2):
        for _ in range(3):
            stepped(critic, critic_optimizer)
        stepped(generator, generator_optimizer)
    first.finish()
    assert first.run_id == second.run_id
    assert [frame.step for frame in frames(kept(), "SGD")] == [1, 2]
    assert [frame.step for frame in frames(kept(), "SGD-2")] == [1, 2, 3, 4, 5, 6]
    for manifest in manifests(kept()):
        assert [layer.name for layer in manifest.layers] == ["weight", "bias"]
    assert len([record for record in kept() if isinstance(record, RunEnd)]) == 1


def test_models_and_optimizers_given_together_are_told_apart(kept: Kept) -> None:
    one, one_optimizer = linear_pair()
    two, two_optimizer = linear_pair()
    with gradwatch.watch([one, two], [one_optimizer, two_optimizer]):
        stepped(one, one_optimizer)
        stepped(two, two_optimizer)
    named = {
        manifest.optimizer: [layer.name for layer in manifest.layers]
        for manifest in manifests(kept())
    }
    assert named == {"SGD": ["weight", "bias"], "SGD-2": ["Linear.weight", "Linear.bias"]}


def test_a_parameter_that_two_optimizers_hold_keeps_its_name_in_both(kept: Kept) -> None:
    model, first = linear_pair()
    second = torch.optim.Adam(model.parameters())
    with gradwatch.watch(model, [first, second]):
        stepped(model, first)
        stepped(model, second)
    for manifest in manifests(kept()):
        assert [layer.name for layer in manifest.layers] == ["weight", "bias"]


def test_watching_the_same_optimizer_again_changes_nothing(kept: Kept) -> None:
    model, optimizer = linear_pair()
    first = gradwatch.watch(model, optimizer)
    second = gradwatch.watch(model, optimizer)
    stepped(model, optimizer)
    first.finish()
    second.finish()
    assert len(frames(kept())) == 1
    assert len([record for record in kept() if isinstance(record, RunEnd)]) == 1


def test_watching_again_after_the_end_is_another_run(collector: Collector) -> None:
    model, optimizer = linear_pair()
    ids: list[str] = []
    for _ in range(2):
        with gradwatch.watch(model, optimizer, url=collector.url) as monitor:
            stepped(model, optimizer)
        stepped(model, optimizer)  # unwatched
        ids.append(monitor.run_id)
    assert len(set(ids)) == 2
    assert set(collector.runs) == set(ids)
    assert collector.steps == [1, 1]


def test_the_runs_of_one_process_differ_even_under_a_launcher_or_a_given_id(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADWATCH_RUN_ID", "ab" * 16)
    monkeypatch.setattr(monitor_module, "_begun", 0)
    for _ in range(3):
        model, optimizer = linear_pair()
        with gradwatch.watch(model, optimizer, url=collector.url):
            stepped(model, optimizer)
    assert len(collector.runs) == 3
    assert "ab" * 16 in collector.runs


def test_optimizers_that_come_and_go_never_share_a_name_in_one_run(kept: Kept) -> None:
    for _ in range(4):
        model, optimizer = linear_pair()
        monitor = gradwatch.watch(model, optimizer)
        stepped(model, optimizer)
        del model, optimizer
        gc.collect()
    monitor.finish()
    keys = [(frame.optimizer, frame.step) for frame in frames(kept())]
    assert len(keys) == len(set(keys)) == 4


def test_threads_that_begin_to_train_at_once_share_one_run_and_no_name(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough that each thread is there before another is done.
    monkeypatch.setattr(monitor_module, "identify", slowly(monitor_module.identify))
    monkeypatch.setattr(job_module, "OptimizerWatch", slowly(job_module.OptimizerWatch))
    threads = 3
    monitors: list[gradwatch.Monitor] = []

    def train() -> None:
        model, optimizer = linear_pair()
        monitors.append(gradwatch.watch(model, optimizer))
        stepped(model, optimizer)

    workers = [threading.Thread(target=train) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    monitors[0].finish()
    assert len({monitor.run_id for monitor in monitors}) == 1
    assert {frame.optimizer for frame in frames(kept())} == {"SGD", "SGD-2", "SGD-3"}


def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **keywords: Any) -> Any:
        time.sleep(0.1)
        return function(*args, **keywords)

    return slow


class Decayed(torch.optim.SGD):
    """Overrides torch's step, whose hooks torch calls for both."""

    refuses = False

    def step(self, closure: Any = None) -> Any:
        if self.refuses:
            raise RuntimeError("out of memory")
        return super().step(closure)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("detail_every", [1, 1000])
def test_a_step_that_calls_the_one_it_overrides_is_counted_once(
    closure: bool, detail_every: int, kept: Kept
) -> None:
    linear_pair()  # from the first optimizer of torch's own class on, its step is wrapped
    model = nn.Linear(4, 1)
    optimizer = Decayed(model.parameters(), lr=0.1)

    def loss() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        return loss

    with gradwatch.watch(model, optimizer, overhead_budget=0, detail_every=detail_every):
        for step in range(6):
            optimizer.refuses = step == 2
            with contextlib.suppress(RuntimeError):
                if closure:
                    optimizer.step(loss)
                else:
                    loss()
                    optimizer.step()
    # The one that raised had begun, so that it counts where gradients are read before it.
    assert [frame.step for frame in frames(kept())] == list(range(1, 6 if closure else 7))


def test_a_wrapper_that_shares_the_hooks_of_its_optimizer_adds_no_steps(kept: Kept) -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            vars(self).update(vars(inner))
            self.inner = inner

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer):
        wrapper = Wrapper(optimizer)
        wrapper._patch_step_function()
        for _ in range(4):
            model(torch.ones(2, model.in_features)).sum().backward()
            wrapper.step()
    assert [frame.step for frame in frames(kept())] == [1, 2, 3, 4]


def test_a_model_that_the_script_lets_go_of_is_not_kept_alive() -> None:
    model, optimizer = linear_pair()
    monitor = gradwatch.watch(model, optimizer)
    stepped(model, optimizer)
    weight = weakref.ref(model.weight)
    del model, optimizer
    gc.collect()
    assert weight() is None
    monitor.finish()


def test_models_of_several_trainings_in_one_run_are_not_kept_alive() -> None:
    def train() -> weakref.ref[Tensor]:
        # What a detail frame knows of a ReLU or a Tanh is told by the layer that feeds it.
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        gradwatch.watch(model, optimizer, detail_every=1, overhead_budget=0)
        for _ in range(4):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        return weakref.ref(model[0].weight)

    weights = [train() for _ in range(3)]
    gc.collect()
    assert [weight() for weight in weights] == [None] * 3


def test_a_finished_run_keeps_no_tensor_alive() -> None:
    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer):
        stepped(model, optimizer)
    weight = weakref.ref(model.weight)
    optimizer.zero_grad()
    del optimizer
    del model
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_logged_before_or_after_a_step_belongs_to_that_step(when: str, kept: Kept) -> None:
    model, optimizer = linear_pair()
    monitor = gradwatch.watch(model, optimizer)
    for step in range(1, 8):
        if when == "before":
            monitor.log(loss=float(step))
        stepped(model, optimizer)
        if when == "after":
            monitor.log(loss=torch.tensor(float(step)))
    monitor.finish()
    assert [frame.scalars["loss"] for frame in frames(kept())] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_logged_now_and_then_belongs_to_the_step_at_hand(when: str, kept: Kept) -> None:
    model, optimizer = linear_pair()
    monitor = gradwatch.watch(model, optimizer)
    for step in range(1, 8):
        if when == "before" and step % 3 == 1:
            monitor.log(loss=float(step))
        stepped(model, optimizer)
        if when == "after" and step % 3 == 1:
            monitor.log(loss=float(step))
    monitor.finish()
    found = {frame.step: frame.scalars.get("loss") for frame in frames(kept())}
    assert {step: loss for step, loss in found.items() if loss is not None} == {1: 1, 4: 4, 7: 7}


def test_learning_rate_total_norm_and_step_time_come_along(kept: Kept) -> None:
    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer):
        stepped(model, optimizer)
        stepped(model, optimizer)
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    scalars = frames(kept())[-1].scalars
    total = math.hypot(float(model.weight.grad.norm()), float(model.bias.grad.norm()))
    assert scalars["lr"] == 0.01
    assert scalars["total_norm"] == pytest.approx(total)
    assert scalars["step_time_s"] > 0


def test_clipping_through_the_monitor_clips_and_records_the_norm_before(kept: Kept) -> None:
    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer) as monitor:
        model(torch.ones(1, 2)).pow(2).sum().mul(100).backward()
        total = monitor.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    scalars = frames(kept())[0].scalars
    assert scalars["total_norm_before_clip"] == pytest.approx(float(total))
    assert scalars["total_norm"] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_through_the_monitor_is_torchs_to_the_bit(
    dtype: torch.dtype, max_norm: float
) -> None:
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(5, 7, dtype=dtype)) for _ in range(4)]
    for parameter in mine[:3]:
        parameter.grad = torch.randn(5, 7, dtype=dtype)
    theirs = copy.deepcopy(mine)
    for one, other in zip(mine, theirs, strict=True):
        other.grad = None if one.grad is None else one.grad.clone()
    with gradwatch.watch(*linear_pair()) as monitor:
        total = monitor.clip_grad_norm_(iter(mine), max_norm)
    assert torch.equal(total, nn.utils.clip_grad_norm_(theirs, max_norm))
    for one, other in zip(mine, theirs, strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("after", ["nothing", "a change of one gradient", "another backward pass"])
def test_the_norms_of_clipping_serve_a_frame_only_while_they_are_true(
    after: str, kept: Kept
) -> None:
    model, optimizer = linear_pair()
    monitor = gradwatch.watch(model, optimizer, detail_every=1000, overhead_budget=0)
    expected: list[float] = []
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).pow(2).sum().mul(100).backward()
        monitor.clip_grad_norm_(model.parameters(), 1.0)
        assert model.weight.grad is not None
        if after == "a change of one gradient":
            model.weight.grad.add_(1.0)
        elif after == "another backward pass":
            model(torch.ones(1, 2)).sum().backward()
        expected.append(float(model.weight.grad.double().norm()))
        optimizer.step()
    monitor.finish()
    (manifest,) = manifests(kept())
    found = [norm_of(frame, manifest, "weight") for frame in frames(kept())]
    assert len(found) == 20
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_logged_tensor_does_not_keep_its_graph_alive() -> None:
    model, optimizer = linear_pair()
    monitor = gradwatch.watch(model, optimizer)
    activation = model(torch.ones(1, 2))
    alive = weakref.ref(activation)
    loss = (activation**2).sum()
    monitor.log(loss=loss)
    del activation, loss
    gc.collect()
    assert alive() is None
    monitor.finish()


@pytest.mark.parametrize(
    "value",
    [
        "high",
        None,
        [1.0],
        {},
        1j,
        np.zeros(2),
        torch.zeros(2),
        torch.zeros(0),
        torch.zeros((), device="meta"),
        10**400,
    ],
    ids=repr,
)
def test_a_value_that_is_no_number_cannot_be_logged(value: Any) -> None:
    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer) as monitor, pytest.raises(TypeError, match="loss"):
        monitor.log(loss=value)


@pytest.mark.parametrize("name", ["", "x" * 201])
def test_a_name_that_no_collector_takes_cannot_be_logged(name: str) -> None:
    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer) as monitor, pytest.raises(TypeError, match="names"):
        monitor.log(**{name: 1.0})


def test_a_non_finite_loss_or_gradient_is_an_event_of_its_frame(kept: Kept) -> None:
    model, optimizer = linear_pair()
    monitor = gradwatch.watch(model, optimizer)
    stepped(model, optimizer)
    monitor.log(loss=math.nan)
    (model(torch.ones(1, 2)).sum() * math.inf).backward()
    optimizer.step()
    monitor.finish()
    first, second = frames(kept())
    assert first.events == second.events == ("non_finite",)
    assert math.isnan(first.scalars["loss"])
    assert math.isnan(second.scalars["total_norm"])
    row = second.row("nonfinite")
    assert row is not None
    assert row.tolist() == [4, 2]


def test_a_nan_is_recorded_at_once_however_rarely_frames_are_taken(kept: Kept) -> None:
    model, optimizer = linear_pair()
    monitor = gradwatch.watch(model, optimizer, norm_every=1000, detail_every=1000)
    for _ in range(20):
        stepped(model, optimizer)
    (model(torch.ones(1, 2)).sum() * math.nan).backward()
    optimizer.step()
    monitor.finish()
    assert [frame.step for frame in frames(kept())] == [*range(1, 11), 21]
    assert frames(kept())[-1].events == ("non_finite",)


@pytest.mark.parametrize("frozen", ["a frozen first layer", "complex parameters"])
def test_looking_out_for_nan_copes_with(frozen: str, kept: Kept) -> None:
    dtype = torch.complex64 if frozen == "complex parameters" else torch.float32
    model = nn.Sequential(nn.Linear(2, 2, dtype=dtype), nn.Linear(2, 2, dtype=dtype))
    if frozen == "a frozen first layer":
        model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = gradwatch.watch(model, optimizer, norm_every=1000, detail_every=1000)
    for step in range(20):
        factor = math.nan if step == 19 else 1.0
        (model(torch.ones(1, 2, dtype=dtype)).abs().sum() * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    monitor.finish()
    assert monitor.dropped == {}
    assert frames(kept())[-1].step == 20


def test_freezing_unfreezing_and_adding_parameters_makes_new_manifests(kept: Kept) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = gradwatch.watch(model, optimizer)
    stepped(model, optimizer)
    model[0].requires_grad_(False)
    stepped(model, optimizer)
    model[0].requires_grad_(True)
    model.append(nn.Linear(2, 2))
    optimizer.add_param_group({"params": model[2].parameters()})
    stepped(model, optimizer)
    monitor.finish()
    one, two, three = manifests(kept())
    assert (one.version, two.version, three.version) == (1, 2, 3)
    assert [layer.trainable for layer in two.layers] == [False, False, True, True]
    assert [layer.name for layer in three.layers][4:] == ["2.weight", "2.bias"]
    assert [frame.manifest for frame in frames(kept())] == [1, 2, 3]
    assert [frame.layers for frame in frames(kept())] == [4, 4, 6]
    assert math.isnan(norm_of(frames(kept())[1], two, "0.weight"))
    assert norm_of(frames(kept())[2], three, "2.weight") > 0


def test_a_learning_rate_that_is_no_number_is_not_recorded(kept: Kept) -> None:
    model, optimizer = linear_pair()

    class Scheduled(torch.optim.Optimizer):
        """Takes its rate from a function of the step, as optax does."""

        def step(self, closure: Any = None) -> None:
            optimizer.step()

    scheduled = Scheduled(model.parameters(), {"lr": lambda step: 0.1 / step})
    with gradwatch.watch(model, scheduled, overhead_budget=0) as monitor:
        for _ in range(8):
            model(torch.ones(2, model.in_features)).sum().backward()
            scheduled.step()
    assert monitor.dropped == {}
    assert ["lr" in frame.scalars for frame in frames(kept())] == [False] * 8


def test_an_optimizer_that_could_not_be_watched_goes_without_a_word(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("of a model's own")

    monkeypatch.setattr("gradwatch.watching.Inventory", fail)
    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer):
        del optimizer
        gc.collect()
    told = capfd.readouterr().err
    assert "cannot watch SGD: RuntimeError: of a model's own" in told
    assert "ignored" not in told


def test_layers_outside_the_optimizer_are_in_the_manifest_and_marked(kept: Kept) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer):
        stepped(model, optimizer)
    (manifest,) = manifests(kept())
    assert [layer.optimized for layer in manifest.layers] == [False, False, True, True]


def test_a_parameter_of_no_model_is_named_after_its_optimizer(kept: Kept) -> None:
    model, _ = linear_pair()
    temperature = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.01)
    with gradwatch.watch(model, optimizer):
        (model(torch.ones(1, 2)).sum() * temperature).backward()
        optimizer.step()
    (manifest,) = manifests(kept())
    assert manifest.layers[2].name == "SGD.parameter_2"


def test_a_step_without_any_gradient_is_told_as_one(kept: Kept) -> None:
    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer):
        optimizer.step()
        stepped(model, optimizer)
    silent, learning = frames(kept())
    assert np.isnan(silent.matrix()).all()
    assert np.isfinite(learning.row("norm")).all()


@pytest.mark.parametrize("moment", ["before the first step", "while training"])
def test_watched_models_and_optimizers_copy_pickle_and_save(moment: str) -> None:
    model, optimizer = linear_pair(momentum=0.9)
    with gradwatch.watch(model, optimizer) as monitor:
        if moment == "while training":
            stepped(model, optimizer)
        twin = copy.deepcopy(model)
        assert torch.equal(pickle.loads(pickle.dumps(model)).weight, model.weight)
        copy.deepcopy(optimizer)
        pickle.dumps(optimizer)
        file = io.BytesIO()
        torch.save({"model": model, "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        optimizer.load_state_dict(loaded["optimizer"])
        stepped(twin, torch.optim.SGD(twin.parameters(), lr=0.1))  # is nobody's business
        stepped(model, optimizer)
    assert monitor.dropped == {}


def test_a_copied_optimizer_is_not_watched(kept: Kept) -> None:
    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer):
        stepped(model, optimizer)
        both = copy.deepcopy((model, optimizer))
        stepped(*both)
    assert len(frames(kept())) == 1


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_workers_that_load_data_send_nothing(method: str, collector: Collector) -> None:
    model, optimizer = linear_pair()
    dataset = TensorDataset(torch.ones(8, 2))
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=method)
    with gradwatch.watch(model, optimizer, url=collector.url):
        for (inputs,) in loader:
            optimizer.zero_grad()
            model(inputs).sum().backward()
            optimizer.step()
    assert collector.steps == [1, 2, 3, 4]
    assert len(collector.ends) == 1
    assert collector.repeated == 0


def test_a_fault_while_measuring_is_counted_and_training_goes_on(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class UnspeakableError(RuntimeError):
        def __str__(self) -> str:
            raise RuntimeError

        __repr__ = __str__

    def fail(*_: object) -> None:
        raise UnspeakableError

    model, optimizer = linear_pair()
    monitor = gradwatch.watch(model, optimizer)
    stepped(model, optimizer)
    with monkeypatch.context() as broken:
        broken.setattr(Meter, "details", fail)
        before = model.weight.detach().clone()
        stepped(model, optimizer)
        assert not torch.equal(model.weight, before)
    stepped(model, optimizer)
    monitor.finish()
    assert monitor.dropped == {"agent_error": 1}
    assert [frame.step for frame in frames(kept())] == [1, 3]
    assert "could not record a step of SGD: UnspeakableError" in capfd.readouterr().err


def test_a_parameter_that_cannot_be_read_does_not_stop_the_job() -> None:
    class Hostile(nn.Parameter):
        @property
        def grad(self) -> Tensor | None:  # pyright: ignore
            if hostile:
                raise RuntimeError("no")
            return Tensor.grad.__get__(self)  # pyright: ignore

        @grad.setter
        def grad(self, value: Tensor | None) -> None:
            Tensor.grad.__set__(self, value)  # pyright: ignore

    hostile = False
    model, _ = linear_pair()
    model.weight = Hostile(model.weight.detach())

    class Quiet(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            steps.append(1)

    steps: list[int] = []
    optimizer = Quiet(model.parameters(), {})
    with gradwatch.watch(model, optimizer) as monitor:
        hostile = True
        for _ in range(30):
            optimizer.step()
        assert len(steps) == 30
        assert 1 <= monitor.dropped["agent_error"] <= 5


def test_disabled_it_does_nothing_at_all(monkeypatch: pytest.MonkeyPatch, kept: Kept) -> None:
    monkeypatch.setenv("GRADWATCH_DISABLED", "1")
    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer) as monitor:
        monitor.log(loss=stepped(model, optimizer))
        monitor.clip_grad_norm_(model.parameters(), 1.0)
    assert monitor.run_id == ""
    assert monitor.dropped == {}
    assert kept() == []
    assert not optimizer._optimizer_step_pre_hooks


def test_the_first_line_says_where_the_run_is_kept(
    capfd: pytest.CaptureFixture[str], spool: Any
) -> None:
    model, optimizer = linear_pair()
    gradwatch.watch(model, optimizer, name="mine").finish()
    said = capfd.readouterr().err
    assert "no collector configured" in said
    assert "'mine'" in said
    assert str(spool) in said
    assert said.count("\n") == 1


def test_a_block_that_raises_ends_its_run_as_failed(kept: Kept) -> None:
    model, optimizer = linear_pair()
    monitor = gradwatch.watch(model, optimizer)
    stepped(model, optimizer)
    with pytest.raises(ZeroDivisionError), monitor:
        _ = 1 / 0
    (end,) = [record for record in kept() if isinstance(record, RunEnd)]
    assert (end.status, end.reason) == ("failed", "ZeroDivisionError: division by zero")


def test_an_exception_that_cannot_describe_itself_is_still_the_scripts_own(kept: Kept) -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    model, optimizer = linear_pair()
    with pytest.raises(MuteError), gradwatch.watch(model, optimizer):
        raise MuteError
    (end,) = [record for record in kept() if isinstance(record, RunEnd)]
    assert (end.status, end.reason) == ("failed", "MuteError")


def test_where_no_thread_can_be_started_the_job_goes_on_unrecorded(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(monitor_module, "_given_up", False)
    monkeypatch.setattr(threading.Thread, "start", refused)
    model, optimizer = linear_pair()
    with gradwatch.watch(model, optimizer) as monitor:
        monitor.log(loss=stepped(model, optimizer))
    assert monitor.run_id == ""
    assert not optimizer._optimizer_step_pre_hooks
    assert "nothing is recorded" in capfd.readouterr().err


def test_a_model_whose_layers_have_no_shape_yet_is_recorded_from_its_first_step(
    kept: Kept,
) -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    (manifest,) = manifests(kept())
    shapes = {layer.name: layer.shape for layer in manifest.layers}
    assert shapes["0.weight"] == (3, 4)


def test_layers_of_any_name_are_recorded(kept: Kept) -> None:
    model = nn.Module()
    names = ["\ud800", "a\0b", "x" * 600 + "1", "x" * 600 + "2", "\n"]
    for name in names:
        model._parameters[name] = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer) as monitor:
        torch.stack(list(model.parameters())).sum().backward()
        optimizer.step()
    assert monitor.dropped == {}
    (manifest,) = manifests(kept())
    recorded = [layer.name for layer in manifest.layers]
    assert len(set(recorded)) == len(names)
    assert max(map(len, recorded)) <= 500


def test_a_configuration_that_cannot_be_printed_is_no_fault(collector: Collector) -> None:
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    model, optimizer = linear_pair()
    gradwatch.watch(model, optimizer, url=collector.url, config={"it": Mute()}).finish()
    (run,) = collector.runs.values()
    assert run.config == {"it": "Mute"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_a_lock_that_nobody_holds() -> None:
    with activations._listener._lock, concurrent.futures.ThreadPoolExecutor(1) as threads:

        def child() -> int:
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                with activations._listener._lock:
                    os._exit(7)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        assert threads.submit(child).result() == 7


@pytest.mark.parametrize(
    ("model", "optimizer", "told"),
    [
        (None, "good", "Module first, not NoneType"),
        ("net", "good", "Module first, not str"),
        ("good", None, "optimizer second, not NoneType"),
        ("good", [3], "optimizer second, not int"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(model: Any, optimizer: Any, told: str) -> None:
    good = linear_pair()
    with pytest.raises(TypeError, match=told):
        gradwatch.watch(
            good[0] if model == "good" else model, good[1] if optimizer == "good" else optimizer
        )


def test_a_status_that_does_not_exist_is_named() -> None:
    with (
        gradwatch.watch(*linear_pair()) as monitor,
        pytest.raises(ValueError, match="not 'done'"),
    ):
        monitor.finish("done")


def test_a_setting_out_of_range_is_named_before_anything_starts() -> None:
    model, optimizer = linear_pair()
    with pytest.raises(SettingError, match="norm_every"):
        gradwatch.watch(model, optimizer, norm_every=0)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_configuration_of_any_kind_arrives_as_plain_values(collector: Collector) -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    config = {
        "lr": 0.1,
        "big": 2**80,
        "nan": math.nan,
        "path": b"/data/\xff".decode("utf-8", "surrogateescape"),
        "deep": endless,
        "kind": nn.Linear,
        "array": np.float32(0.5),
        "sizes": (1, 2),
        3: True,
    }
    model, optimizer = linear_pair()
    with gradwatch.watch(
        model,
        optimizer,
        url=collector.url,
        config=config,  # pyright: ignore
        name="n" * 300,
        tags=["a", ""],
    ):
        stepped(model, optimizer)
    (run,) = collector.runs.values()
    assert run.config["lr"] == 0.1
    assert run.config["big"] == str(2**80)
    assert run.config["nan"] == "nan"
    assert run.config["path"] == "/data/?"
    assert run.config["kind"] == str(nn.Linear)
    assert run.config["array"] == "0.5"
    assert run.config["sizes"] == [1, 2]
    assert run.config["3"] is True
    assert run.name == "n" * 200
    assert run.tags == ["a"]
    assert collector.steps == [1]
