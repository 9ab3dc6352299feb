"""Where the first NaN began: named by tracing, without changing the job that is traced."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gradwatch
from gradwatch import shadows, tracer
from gradwatch.wire.frame import Origin, Record

from .test_watch import convolutional, mlp, recurrent, transformer

Kept = Callable[[], list[Record]]
Loss = Callable[[nn.Module, Tensor, bool], Tensor]
BREAKS_AT = 6


class Distance(nn.Module):
    """How far apart the two halves of a batch are, after a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = self.project(inputs).chunk(2)
        return torch.sqrt((first - second).pow(2).sum(1))


class Softmax(nn.Module):
    """By hand, as textbooks write it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        powers = torch.exp(self.head(inputs))
        return powers / powers.sum(1, keepdim=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        query = self.query(inputs)
        scores = (query @ query.T).masked_fill(mask, float("-inf"))
        return self.out(torch.softmax(scores, dim=1) @ query)


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def log_of_output(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
    return torch.log(model(inputs) + (-5.0 if breaks else 5.0)).mean()


def log_of_zero(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
    return torch.log(model(inputs).abs() * (0.0 if breaks else 1.0)).mean()


def batch_statistic(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
    output = model(inputs) * (0.0 if breaks else 1.0)
    return ((output - output.mean()) / output.std()).pow(3).mean()


def identical_pairs(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
    return model(torch.cat([inputs[:4], inputs[:4]]) if breaks else inputs).mean()


def large_logits(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
    return model(inputs * (1e4 if breaks else 1.0))[:, 0].mean()


def masked_rows(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
    mask = torch.ones(8, 8, dtype=torch.bool).triu(1)
    mask[3] |= breaks
    return model(inputs, mask).mean()


# Rows F10 to F15 of the zoo: what makes them break, and what must be named.
FAULTS: dict[str, tuple[Callable[[], nn.Module], Loss, str, str, str]] = {
    "log": (regression, log_of_output, "operation", "log", ""),
    "log of zero": (regression, log_of_zero, "operation", "log", ""),
    "division": (regression, batch_statistic, "operation", "division", ""),
    "sqrt": (Distance, identical_pairs, "gradient", "sqrt", "Distance"),
    "exp": (Softmax, large_logits, "operation", "exp", "Softmax"),
    "attention": (Attention, masked_rows, "operation", "softmax", "Attention"),
}


def origins(records: list[Record]) -> list[Origin]:
    return [record for record in records if isinstance(record, Origin)]


def train(
    model: nn.Module,
    loss_of: Loss,
    breaks: Callable[[int], bool] = lambda step: step >= BREAKS_AT,
    steps: int = BREAKS_AT + 8,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    **keywords: Any,
) -> list[bytes]:
    """A job that goes on after its NaN, as most do. Losses and weights, to the bit."""
    torch.manual_seed(1)
    stepper = optimizer(model.parameters(), lr=1e-2)  # pyright: ignore[reportCallIssue]
    watching = gradwatch.watch(model, stepper, **keywords) if keywords.pop("watched", 1) else None
    seen: list[bytes] = []
    for step in range(1, steps + 1):
        inputs = torch.randn(8, 4)
        stepper.zero_grad()
        loss = loss_of(model, inputs, breaks(step))
        loss.backward()
        if watching is not None:
            watching.log(loss=loss)
        stepper.step()
        seen.append(loss.detach().numpy().tobytes())
    if watching is not None:
        watching.finish()
    return seen + [weight.detach().numpy().tobytes() for weight in model.parameters()]


@pytest.mark.parametrize("always", [True, False], ids=["traced from the start", "traced after it"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_operation_is_named_with_the_range_of_its_inputs(
    fault: str, always: bool, kept: Kept
) -> None:
    make, loss_of, kind, operation, module = FAULTS[fault]
    train(make(), loss_of, locate_nan=always)
    (origin,) = origins(kept())
    assert (origin.kind, origin.operation, origin.module_class) == (kind, operation, module)
    assert origin.source.startswith("test_locate.py:")
    assert origin.operands
    assert not any(math.isnan(operand.low) for operand in origin.operands)
    if always:
        assert origin.step == BREAKS_AT
        assert not origin.replayed


def test_the_range_is_that_of_the_traced_step(kept: Kept) -> None:
    train(Softmax(), large_logits, locate_nan=True)
    (origin,) = origins(kept())
    (operand,) = origin.operands
    assert operand.shape == (8, 3)
    assert operand.high > 89  # exp overflows float32 from 88.7 on
    assert "exp in Softmax at test_locate.py" in origin.place


def test_weights_that_are_lost_already_are_replaced_by_those_of_before(kept: Kept) -> None:
    model = regression()
    train(model, log_of_zero)
    assert not any(weight.isfinite().any() for weight in model.parameters())
    (origin,) = origins(kept())
    assert origin.replayed
    assert origin.step > BREAKS_AT
    assert origin.operands[0].low == origin.operands[0].high == 0.0


@pytest.mark.parametrize("always", [True, False])
def test_a_nan_in_one_batch_is_found_in_the_data(always: bool, kept: Kept) -> None:
    def once(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
        if breaks:
            inputs[2, 1] = float("nan")
        return model(inputs).mean()

    train(regression(), once, breaks=lambda step: step == BREAKS_AT, locate_nan=always)
    (origin,) = origins(kept())
    assert origin.step == BREAKS_AT
    if always:
        assert (origin.kind, origin.operation) == ("input", "linear")
        assert origin.source.endswith(" in once")
    else:
        assert (origin.kind, origin.operation) == ("batch", "inputs")
        assert origin.note == "1 of its 8 rows held NaN or Inf: 2"


def test_data_from_outside_of_torch_is_named_with_what_used_it(kept: Kept) -> None:
    def from_numpy(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
        array = inputs.numpy().copy()
        array[5, 0] = float("nan") if breaks else 0.0
        return model(torch.from_numpy(array)).mean()

    train(regression(), from_numpy, locate_nan=True)
    (origin,) = origins(kept())
    assert (origin.kind, origin.operation) == ("input", "linear")
    assert (origin.module, origin.module_class) == ("0", "Linear")
    assert origin.place.startswith("the data given to linear in 0 (Linear)")


def test_what_never_comes_again_is_said_to_be_the_batch(kept: Kept) -> None:
    def once(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
        return model(inputs).mean() * (inputs.sum() * 0 / 0 if breaks else 1.0)

    train(regression(), once, breaks=lambda step: step == BREAKS_AT)
    (origin,) = origins(kept())
    assert origin.kind == "nothing"
    assert "locate_nan=True" in origin.note


def test_a_job_that_is_well_is_never_traced(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer.Tracer, "start", lambda self: pytest.fail("traced"))
    train(regression(), log_of_output, breaks=lambda step: False)
    assert origins(kept()) == []


def test_masks_of_minus_infinity_are_no_fault(kept: Kept) -> None:
    train(Attention(), masked_rows, breaks=lambda step: False, locate_nan=True)
    assert origins(kept()) == []


def with_labels(make: Callable[[], nn.Module]) -> tuple[Callable[[], nn.Module], Loss]:
    def loss_of(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
        wide = torch.cat([inputs, inputs[:, :2]], dim=1)
        loss = nn.functional.cross_entropy(model(wide), torch.arange(8) % 3)
        return torch.log(loss * 0) if breaks else loss

    return make, loss_of


@pytest.mark.parametrize("breaks_at", [BREAKS_AT, 1000], ids=["after a NaN", "always"])
@pytest.mark.parametrize("make", [mlp, convolutional, recurrent, transformer])
def test_traced_steps_are_the_same_to_the_bit(
    make: Callable[[], nn.Module], breaks_at: int
) -> None:
    build, loss_of = with_labels(make)

    def job(**keywords: Any) -> list[bytes]:
        torch.manual_seed(3)
        state = train(build(), loss_of, breaks=lambda step: step >= breaks_at, **keywords)
        return [*state, torch.get_rng_state().numpy().tobytes()]

    assert job(locate_nan=breaks_at > 100) == job(watched=False)


def test_dropout_draws_the_same_numbers_beside_and_in_the_step(kept: Kept) -> None:
    build, loss_of = with_labels(mlp)
    torch.manual_seed(3)
    train(build(), loss_of)
    (origin,) = origins(kept())
    assert origin.replayed
    assert origin.operation == "log"
    assert "Linear" not in origin.place


def test_steps_are_traced_through_checkpointing(kept: Kept) -> None:
    def loss_of(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
        output = checkpoint(model, inputs * (1e4 if breaks else 1.0), use_reentrant=False)
        assert isinstance(output, Tensor)
        return output[:, 0].mean()

    train(Softmax(), loss_of)
    (origin,) = origins(kept())
    assert (origin.operation, origin.module_class) == ("exp", "Softmax")


def test_modes_of_the_script_within_a_traced_step_change_nothing(kept: Kept) -> None:
    def loss_of(model: nn.Module, inputs: Tensor, breaks: bool) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            loss = large_logits(model, inputs, breaks)
        assert counter.get_total_flops() == 2 * 8 * 4 * 3
        return loss

    train(Softmax(), loss_of)
    (origin,) = origins(kept())
    assert origin.operation == "exp"


def test_a_mode_that_is_entered_in_a_traced_step_outlives_it() -> None:
    model = Softmax()
    optimizer = torch.optim.Adam(model.parameters())
    watching = gradwatch.watch(model, optimizer, locate_nan=True)
    counted: list[int] = []
    for step in range(6):
        counter = FlopCounterMode(display=False)
        with counter:
            large_logits(model, torch.randn(8, 4), step > 2).backward()
            optimizer.step()
        optimizer.zero_grad()
        counted.append(counter.get_total_flops())
    watching.finish()
    assert len(set(counted)) == 1
    assert counted[0] > 0
    assert tracer.modes_on_stack() == 0


def test_a_compiled_model_is_left_alone(kept: Kept) -> None:
    model = Softmax()
    compiled = torch.compile(model, backend="aot_eager")
    assert isinstance(compiled, nn.Module)
    before = dict(counters["graph_break"])
    train(compiled, large_logits, locate_nan=True)
    assert dict(counters["graph_break"]) == before
    (origin,) = origins(kept())
    assert origin.kind == "nothing"
    assert "TORCH_COMPILE_DISABLE=1" in origin.note
    torch.compiler.reset()
    counters.clear()


def test_memory_beside_the_job_is_bounded(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows, "MAX_SHADOW_BYTES", 64)
    train(regression(), log_of_zero)
    (origin,) = origins(kept())
    assert origin.kind == "nothing"
    assert "MB" in origin.note


def test_a_fault_of_the_tracer_never_reaches_the_job(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no")

    expected = train(Softmax(), large_logits, watched=False)
    monkeypatch.setattr(tracer.Tracer, "_note", fails)
    torch.manual_seed(0)
    model = Softmax()
    torch.manual_seed(0)
    assert len(train(model, large_logits, locate_nan=True)) == len(expected)
    assert tracer.modes_on_stack() == 0


def test_an_exception_in_the_loop_leaves_no_mode_behind_once_finished(spool: Path) -> None:
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = gradwatch.watch(model, optimizer, locate_nan=True)
    assert tracer.modes_on_stack() == 1
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3))
    watching.finish("failed")
    assert tracer.modes_on_stack() == 0


@pytest.mark.slow
def test_under_ddp_the_rank_is_named_where_it_began(spool: Path, kept: Kept) -> None:
    script = Path(__file__).parent / "ddp_nan.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch = [*launcher, "--standalone", str(script)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {origin.rank: origin for origin in origins(kept())}
    assert found[0].kind == "nothing"
    assert (found[1].kind, found[1].operation, found[1].step) == ("operation", "log", 7)


def test_new_tensors_of_the_script_may_lie_on_another_device_by_default(kept: Kept) -> None:
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.ones(2, 4)
    torch.set_default_device("meta")  # as scripts do with "cuda"
    try:
        with gradwatch.watch(model, optimizer, locate_nan=True) as monitor:
            for breaks in (False, True):
                optimizer.zero_grad()
                log_of_output(model, inputs, breaks).backward()
                optimizer.step()
    finally:
        torch.set_default_device(None)
    assert monitor.dropped == {}
    (origin,) = [record for record in kept() if isinstance(record, Origin)]
    assert origin.operation == "log"
