"""The flight recorder: the steps before the first NaN, sampled all along and sent with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import flight as recorder
from gradwatch.flight import FlightRecorder
from gradwatch.wire.frame import Flight, Frame, Manifest, Record

Kept = Callable[[], list[Record]]


def train(breaks_at: int, steps: int, scale: float = 1.0, **settings: object) -> gradwatch.Monitor:
    """A job whose loss is NaN at one step, and whose gradients grow with every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    given = {"overhead_budget": 0, **settings}
    monitor = gradwatch.watch(model, optimizer, **given)  # pyright: ignore
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 40)).mean() * step * scale
        if step == breaks_at:
            loss = loss * float("nan")
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss)
    monitor.finish()
    return monitor


def flights(records: list[Record]) -> list[Flight]:
    return [record for record in records if isinstance(record, Flight)]


def test_the_last_fifty_steps_before_a_nan_are_sent_once(kept: Kept) -> None:
    train(breaks_at=71, steps=80)
    (flight,) = flights(kept())
    assert flight.step == 71
    assert flight.steps == tuple(range(21, 71))
    flight.check()
    assert not np.isnan(flight.of("absmax")).any()
    assert len(flight.scalars["loss"]) == 50


def test_a_job_that_is_well_sends_none(kept: Kept) -> None:
    train(breaks_at=0, steps=60)
    assert flights(kept()) == []


def test_its_norms_and_scalars_are_those_of_the_frames(kept: Kept) -> None:
    train(breaks_at=31, steps=33, detail_every=1000)
    (flight,) = flights(kept())
    frames = {record.step: record for record in kept() if isinstance(record, Frame)}
    for place, step in enumerate(flight.steps):
        np.testing.assert_array_equal(flight.of("norm")[place], frames[step].row("norm"))
        assert flight.scalars["loss"][place] == frames[step].scalars["loss"]
        assert flight.scalars["total_norm"][place] == frames[step].scalars["total_norm"]


def test_its_other_statistics_are_those_of_a_small_gradient() -> None:
    recording = FlightRecorder(budget=0)
    parameters = [nn.Parameter(torch.zeros(7, 5)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad = torch.randn(7, 5, dtype=torch.float32)
    parameters[0].grad[0, 0] = 0.0
    recording.sample(4, 1, parameters)
    flight = recording.flight("SGD", 0, layers=2, step=5, frames=())
    assert flight is not None
    exact = parameters[0].grad.double()
    hand = {
        "mean_abs": exact.abs().mean(),
        "absmax": exact.abs().max(),
        "std": exact.std(correction=0),
        "zero_fraction": (exact == 0).double().mean(),
    }
    for name, value in hand.items():
        assert flight.of(name)[0, 0] == pytest.approx(float(value), rel=1e-6), name
        assert np.isnan(flight.of(name)[0, 1]), "it has no gradient"
    assert np.isnan(flight.of("norm")).all(), "no frame was given"


def test_a_loss_scale_that_gradients_still_carry_is_taken_out() -> None:
    recording = FlightRecorder(budget=0)
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0 * 1024)
    recording.sample(1, 1, [parameter], scale=torch.tensor(1024.0))
    flight = recording.flight("SGD", 0, layers=1, step=2, frames=())
    assert flight is not None
    assert flight.of("absmax").item() == 3.0


def test_a_sample_of_a_wide_matrix_sees_all_of_its_columns() -> None:
    recording = FlightRecorder(budget=0)
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.zeros(64, 64)
    parameter.grad[:, 1::2] = 1.0
    recording.sample(1, 1, [parameter])
    flight = recording.flight("SGD", 0, layers=1, step=2, frames=())
    assert flight is not None
    assert flight.of("zero_fraction").item() == pytest.approx(0.5, abs=0.05)


def test_steps_of_an_earlier_manifest_are_left_out() -> None:
    recording = FlightRecorder(budget=0)
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    for step in range(1, 7):
        few = step < 4
        recording.sample(step, 1 if few else 2, parameters[:2] if few else parameters)
    flight = recording.flight("SGD", 0, layers=3, step=7, frames=())
    assert flight is not None
    assert (flight.manifest, flight.steps) == (2, (4, 5, 6))


def test_memory_and_record_are_bounded_with_very_many_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder, "MAX_BYTES", 10 * 4 * 6 * 2000)
    recording = FlightRecorder(budget=0)
    parameters = [nn.Parameter(torch.zeros(100)) for _ in range(2000)]
    for parameter in parameters:
        parameter.grad = torch.ones(100)
    for step in range(1, 101):
        recording.sample(step, 1, parameters)
    assert len(recording._kept) == recorder.KEPT
    assert all(item.elements.numel() <= 64 * 512 * 1.1 for _, item in recording._kept)
    flight = recording.flight("SGD", 0, layers=2000, step=101, frames=())
    assert flight is not None
    assert flight.steps == tuple(range(91, 101))


def test_it_keeps_within_its_share_of_the_budget(kept: Kept) -> None:
    """A step of a few hundred microseconds leaves it next to nothing: the first ten, then few."""
    monitor = train(breaks_at=200, steps=201, overhead_budget=0.001)
    (flight,) = flights(kept())
    sampled = ~np.isnan(flight.of("absmax")).all(axis=1)
    assert sampled.sum() < 40
    assert monitor.dropped == {}


def test_the_finding_read_in_the_job_shows_the_steps_before(kept: Kept) -> None:
    monitor = train(breaks_at=41, steps=45)
    finding = next(found for found in monitor.findings if found.kind == "non_finite")
    assert finding.evidence["steps recorded before"] == "40, from 1 to 40"
    loss = str(finding.evidence["loss before"]).split()
    assert float(loss[-3]) == pytest.approx(40 * float(loss[0]), rel=1e-2)
    manifest = next(record for record in kept() if isinstance(record, Manifest))
    largest = str(finding.evidence["largest norm just before"])
    assert any(f" in {layer.name}, " in largest for layer in manifest.layers)


def test_a_replica_under_ddp_records_none() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, given: Tensor) -> Tensor:
            return self.module(given)

    model = DistributedDataParallel(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        patch.setenv("WORLD_SIZE", "2")
        with gradwatch.watch(model, optimizer) as monitor:
            for _ in range(3):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
            assert monitor._job is not None
            (watch,) = monitor._job._by_name.values()
    assert not watch.recorder._kept
