"""Right values in every kind of training job of one process.

What a frame says is compared with the gradient that was applied, taken by other means: the loss is
differentiated once more in float64 by `torch.autograd.grad`, or the weights are compared before
and after a step of plain SGD.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch.reduce import norms_of
from gradwatch.wire.frame import Frame, Manifest, Record

Kept = Callable[[], list[Record]]
Norms = dict[str, float]


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def inputs(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def loss_of(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return model(batch.to(next(model.parameters()).dtype)).float().square().mean()  # pyright: ignore


def by_hand(model: nn.Module, batch: Tensor, loss: Callable[..., Tensor] = loss_of) -> Norms:
    """Norm of each layer's gradient, in float64 from end to end."""
    exact = copy.deepcopy(model).double()
    named = [(name, each) for name, each in exact.named_parameters() if each.requires_grad]
    batch = batch.double() if batch.is_floating_point() else batch
    found = torch.autograd.grad(loss(exact, batch), [each for _, each in named], allow_unused=True)
    return {
        name: float(gradient.to_dense().norm())
        for (name, _), gradient in zip(named, found, strict=True)
        if gradient is not None
    }


def of_gradients(model: nn.Module) -> Norms:
    """Norm of each layer's gradient as it stands, summed in float64."""
    named = [(name, each.grad) for name, each in model.named_parameters()]
    wide = [(name, each.detach().to_dense()) for name, each in named if each is not None]
    return {
        name: float((each.to(torch.complex128) if each.is_complex() else each.double()).norm())
        for name, each in wide
    }


def frames(records: Sequence[Record], optimizer: str | None = None) -> list[Frame]:
    found = [record for record in records if isinstance(record, Frame)]
    return sorted(
        (frame for frame in found if optimizer in (None, frame.optimizer)), key=lambda it: it.step
    )


def norms(records: Sequence[Record], optimizer: str | None = None) -> list[Norms]:
    """Of each frame that measured any, the norm of every layer that had a gradient."""
    layers = {
        (record.optimizer, record.version): [layer.name for layer in record.layers]
        for record in records
        if isinstance(record, Manifest)
    }
    found: list[Norms] = []
    for frame in frames(records, optimizer):
        row = frame.row("norm")
        if row is not None:
            named = zip(layers[frame.optimizer, frame.manifest], row.tolist(), strict=True)
            found.append({name: norm for name, norm in named if not np.isnan(norm)})
    return found


def assert_same(found: Sequence[Norms], expected: Sequence[Norms], rtol: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys(), f"at step {step}"
        for name, norm in other.items():
            assert one[name] == pytest.approx(norm, rel=rtol, abs=1e-12), f"{name} at step {step}"


@contextmanager
def applied(model: nn.Module, into: list[Norms], rate: float = 1.0) -> Iterator[None]:
    """Around a step of plain SGD: what moved the weights, by how they moved."""
    before = {name: each.detach().double() for name, each in model.named_parameters()}
    yield
    moved = {name: each.detach().double() for name, each in model.named_parameters()}
    into.append({name: float((before[name] - moved[name]).norm()) / rate for name in before})


ALWAYS: dict[str, Any] = {"overhead_budget": 0, "detail_every": 3}


# -- Loss scaling


@pytest.mark.parametrize("unscaled", [False, True], ids=["as it is", "unscaled by the script"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_under_a_grad_scaler_gradients_are_told_without_its_scale(
    fused: bool, unscaled: bool, kept: Kept
) -> None:
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    expected: list[Norms] = []
    with gradwatch.watch(model, optimizer, **ALWAYS):
        for step in range(8):
            expected.append(by_hand(model, inputs(step)))
            optimizer.zero_grad()
            scaler.scale(loss_of(model, inputs(step))).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert_same(norms(kept()), expected)
    scales = [frame.scalars["grad_scale"] for frame in frames(kept())]
    assert scales == [2.0**power for power in (10, 10, 11, 11, 12, 12, 13, 13)]
    assert all("amp_skipped" not in frame.scalars for frame in frames(kept()))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_overflows_is_recorded_as_skipped_and_is_no_nan(
    fused: bool, kept: Kept
) -> None:
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    # 2^127 times these losses is more than float32 can hold; four halvings by 2^40 it is not.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-40)
    told: list[gradwatch.Finding] = []
    steps = 8
    overflowed: list[int] = []
    expected: list[Norms] = []
    with gradwatch.watch(model, optimizer, on_finding=told.append, **ALWAYS) as monitor:
        for step in range(1, steps + 1):
            large = 1e9 if step in (1, 2, 5) else 1.0
            if step == 5:
                scaler.update(2.0**127)
            optimizer.zero_grad()
            loss = loss_of(model, inputs(step))
            scaler.scale(loss * large).backward()
            if all(torch.isfinite(each.grad).all() for each in model.parameters()):  # pyright: ignore
                expected.append(by_hand(model, inputs(step)))
                expected[-1] = {name: norm * large for name, norm in expected[-1].items()}
            else:
                overflowed.append(step)
            scaler.step(optimizer)
            scaler.update()
            monitor.log(loss=loss)
    seen = frames(kept())
    assert [frame.step for frame in seen] == list(range(1, steps + 1))
    skipped = [frame for frame in seen if "amp_skipped" in frame.events]
    assert [frame.step for frame in skipped] == overflowed
    assert 5 in overflowed
    for frame in skipped:
        assert frame.columns == ()
        assert frame.scalars["amp_skipped"] == 1.0
        assert np.isfinite(frame.scalars["loss"])
        assert frame.scalars["grad_scale"] > 2.0**40
    assert_same(norms(kept()), expected)
    assert all("non_finite" not in frame.events for frame in seen)
    assert [finding for finding in told if finding.kind == "non_finite"] == []


def test_a_job_whose_every_step_overflows_is_seen(kept: Kept) -> None:
    model = regression()
    optimizer = torch.optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    with gradwatch.watch(model, optimizer) as monitor:
        for step in range(30):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, inputs(step)) * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()
    assert any(isinstance(record, Manifest) for record in kept())
    assert sum(frame.scalars.get("amp_skipped", 0) for frame in frames(kept())) == 30
    assert monitor.dropped == {}


def test_the_scaler_is_left_as_it_was_once_the_run_is_finished() -> None:
    before = torch.amp.GradScaler.step
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer):
        assert torch.amp.GradScaler.step is not before
    assert torch.amp.GradScaler.step is before


def test_a_scaler_steps_optimizers_that_nobody_watches_as_ever() -> None:
    model, other = regression(), regression()
    watched = torch.optim.SGD(model.parameters(), lr=0.1)
    unwatched = torch.optim.SGD(other.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with gradwatch.watch(model, watched):
        scaler.scale(loss_of(other, inputs(1))).backward()
        before = copy.deepcopy(other.state_dict())
        scaler.step(unwatched)
    assert any(not torch.equal(before[name], each) for name, each in other.state_dict().items())


# -- Low precision


@pytest.mark.parametrize("how", ["bfloat16 autocast", "bfloat16", "float16"])
def test_in_low_precision_norms_are_summed_in_float32_at_least(how: str, kept: Kept) -> None:
    dtype = torch.float16 if how == "float16" else torch.bfloat16
    autocast = torch.autocast("cpu", torch.bfloat16) if "autocast" in how else nullcontext()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 512), nn.Tanh(), nn.Linear(512, 512))
    if "autocast" not in how:
        model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    expected: list[Norms] = []
    with gradwatch.watch(model, optimizer, **ALWAYS):
        for step in range(6):
            optimizer.zero_grad()
            with autocast:
                loss = loss_of(model, inputs(step)) * 300
            loss.backward()
            expected.append(of_gradients(model))
            optimizer.step()
    assert_same(norms(kept()), expected, rtol=2e-5)


@pytest.mark.parametrize("order", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_layer_of_millions_is_right(dtype: torch.dtype, order: str) -> None:
    """torch's own norm misses 2e-3 of it."""
    gradient = torch.randn(1 << 13, 1 << 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = sum(float(rows.double().square().sum()) for rows in gradient.split(256)) ** 0.5
    small = torch.full((3,), 2.0)
    given = gradient if order == "contiguous" else gradient.T
    np.testing.assert_allclose(norms_of([small, given, small])[1], exact, rtol=2e-5)
    np.testing.assert_allclose(norms_of([small, given, small])[::2], 12**0.5, rtol=1e-6)


# -- What the optimizer does with gradients, and when


def test_gradients_that_the_script_clips_are_told_as_they_are_applied(kept: Kept) -> None:
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    expected: list[Norms] = []
    with gradwatch.watch(model, optimizer, **ALWAYS):
        for step in range(6):
            optimizer.zero_grad()
            (loss_of(model, inputs(step)) * 100).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            with applied(model, expected):
                optimizer.step()
    assert_same(norms(kept()), expected, rtol=1e-4)
    totals = [frame.scalars["total_norm"] for frame in frames(kept())]
    np.testing.assert_allclose(totals, 0.5, rtol=1e-4)


def test_clipping_through_the_monitor_tells_both_norms_apart(kept: Kept) -> None:
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    expected: list[Norms] = []
    before: list[float] = []
    with gradwatch.watch(model, optimizer, **ALWAYS) as monitor:
        for step in range(14):
            whole = by_hand(model, inputs(step), lambda *given: loss_of(*given) * 100)
            before.append(float(np.sqrt(sum(norm**2 for norm in whole.values()))))
            optimizer.zero_grad()
            (loss_of(model, inputs(step)) * 100).backward()
            monitor.clip_grad_norm_(model.parameters(), 0.5)
            with applied(model, expected):
                optimizer.step()
    assert_same(norms(kept()), expected, rtol=1e-4)
    told = [frame.scalars["total_norm_before_clip"] for frame in frames(kept())]
    np.testing.assert_allclose(told, before, rtol=1e-5)


def test_optimizers_that_step_within_the_backward_pass(kept: Kept) -> None:
    """One optimizer a parameter, stepped by a hook that frees the gradient at once."""
    model = regression()
    optimizers = {each: torch.optim.SGD([each], lr=1.0) for each in model.parameters()}

    def step_now(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_now)
    expected: list[Norms] = []
    with gradwatch.watch(model, list(optimizers.values()), **ALWAYS):
        for step in range(4):
            with applied(model, expected):
                (loss_of(model, inputs(step)) * 10).backward()
    assert all(each.grad is None for each in model.parameters())
    names = ("SGD", "SGD-2", "SGD-3", "SGD-4")
    told = [norms(kept(), optimizer) for optimizer in names]
    together = [
        {k: v for part in parts for k, v in part.items()} for parts in zip(*told, strict=True)
    ]
    assert_same(together, expected, rtol=1e-4)


def test_a_gan_counts_the_steps_of_each_of_its_networks(kept: Kept) -> None:
    generator, critic = nn.Linear(6, 6), nn.Linear(6, 1)
    makes = torch.optim.SGD(generator.parameters(), lr=1.0)
    judges = torch.optim.Adagrad(critic.parameters(), lr=0.1)
    expected: dict[str, list[Norms]] = {"SGD": [], "Adagrad": []}
    with gradwatch.watch([generator, critic], [makes, judges], **ALWAYS):
        for step in range(9):
            judges.zero_grad()
            (critic(inputs(step)) - critic(generator(inputs(step)).detach())).mean().backward()
            found = of_gradients(critic)
            expected["Adagrad"].append({f"Linear.{name}": norm for name, norm in found.items()})
            judges.step()
            if step % 3 == 2:
                # The critic gets a gradient here too, which its optimizer never applies.
                makes.zero_grad()
                critic(generator(inputs(step))).mean().backward()
                expected["SGD"].append(of_gradients(generator))
                makes.step()
    assert_same(norms(kept(), "SGD"), expected["SGD"])
    assert_same(norms(kept(), "Adagrad"), expected["Adagrad"])
    assert [frame.step for frame in frames(kept(), "SGD")] == [1, 2, 3]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_layer_that_was_left_out_has_no_gradient_or_one_of_zeros(
    set_to_none: bool, kept: Kept
) -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected: list[Norms] = []
    with gradwatch.watch(model, optimizer, **ALWAYS):
        for step in range(6):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model["a" if step % 2 else "b"], inputs(step)).backward()
            expected.append(of_gradients(model))
            optimizer.step()
    assert_same(norms(kept()), expected)
    assert len(expected[5]) == (2 if set_to_none else 4)


def test_gradients_that_carry_a_graph_are_measured_and_let_go_of(kept: Kept) -> None:
    """A gradient penalty: `create_graph=True` leaves gradients that are functions themselves."""
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected: list[Norms] = []
    with gradwatch.watch(model, optimizer, **ALWAYS):
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, inputs(step)).backward(create_graph=True)
            assert all(
                each.grad is not None and each.grad.requires_grad for each in model.parameters()
            )
            expected.append(of_gradients(model))
            optimizer.step()
            for each in model.parameters():
                each.grad = None
    assert_same(norms(kept()), expected)


# -- What models are made of


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens), tokens.roll(1))


def test_a_tied_weight_has_one_gradient_the_sum_of_both_uses(kept: Kept) -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tokens = torch.arange(7)
    expected: list[Norms] = []
    with gradwatch.watch(model, optimizer, **ALWAYS):
        for _ in range(4):
            expected.append(by_hand(model, tokens, token_loss))
            optimizer.zero_grad()
            token_loss(model, tokens).backward()
            optimizer.step()
    assert_same(norms(kept()), expected)
    manifest = next(record for record in kept() if isinstance(record, Manifest))
    assert [(layer.name, layer.tied_to) for layer in manifest.layers] == [
        ("embed.weight", ("head.weight",))
    ]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = regression()
        self.reentrant = reentrant

    def forward(self, batch: Tensor) -> Tensor:
        batch = batch.requires_grad_()
        return checkpoint(self.inner, batch, use_reentrant=self.reentrant)  # pyright: ignore


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool, kept: Kept) -> None:
    model = Checkpointed(reentrant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected: list[Norms] = []
    with gradwatch.watch(model, optimizer, **ALWAYS):
        for step in range(6):
            plain = by_hand(model.inner, inputs(step))
            expected.append({f"inner.{name}": norm for name, norm in plain.items()})
            optimizer.zero_grad()
            loss_of(model, inputs(step)).backward()
            optimizer.step()
    assert_same(norms(kept()), expected)


def test_sparse_embedding_gradients_add_up_repeated_rows(kept: Kept) -> None:
    model = nn.Sequential(nn.Embedding(50, 4, sparse=True))
    optimizer = torch.optim.SparseAdam(list(model.parameters()))
    tokens = torch.tensor([3, 7, 7, 7, 41])
    expected: list[Norms] = []
    with gradwatch.watch(model, optimizer, **ALWAYS):
        for _ in range(5):
            optimizer.zero_grad()
            (model(tokens).square().sum() + model(tokens).sum()).backward()
            assert all(each.grad is not None and each.grad.is_sparse for each in model.parameters())
            expected.append(of_gradients(model))
            optimizer.step()
    assert_same(norms(kept()), expected)


def test_a_complex_parameter_is_told_by_its_magnitudes(kept: Kept) -> None:
    model = nn.Linear(6, 3, dtype=torch.complex64)
    optimizer = torch.optim.Adam(model.parameters())
    expected: list[Norms] = []
    with gradwatch.watch(model, optimizer, **ALWAYS):
        for step in range(5):
            optimizer.zero_grad()
            model(inputs(step).to(torch.complex64)).abs().square().mean().backward()
            expected.append(of_gradients(model))
            optimizer.step()
    assert_same(norms(kept()), expected)


class LowRank(nn.Module):
    """A frozen layer with a trained adapter beside it, as LoRA has it."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(batch) + self.up(self.down(batch))


@pytest.mark.parametrize("held", ["the adapters", "everything"])
def test_adapters_have_gradients_and_what_they_adapt_has_none(held: str, kept: Kept) -> None:
    model = nn.Sequential(LowRank(nn.Linear(6, 16)), nn.Tanh(), LowRank(nn.Linear(16, 3)))
    parameters = [each for each in model.parameters() if each.requires_grad or held == "everything"]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    expected: list[Norms] = []
    with gradwatch.watch(model, optimizer, **ALWAYS):
        for step in range(6):
            expected.append(by_hand(model, inputs(step)))
            optimizer.zero_grad()
            loss_of(model, inputs(step)).backward()
            optimizer.step()
    assert_same(norms(kept()), expected)
    manifest = next(record for record in kept() if isinstance(record, Manifest))
    trained = {layer.name: layer.trainable for layer in manifest.layers}
    assert trained["0.layer.weight"] is False
    assert trained["0.up.weight"] is True


# -- torch.compile


def compiled_job(watched: bool, what: str, backend: str, kept: Kept) -> Mapping[str, Any]:
    """Counts of torch.compile over a job that compiles its model or step, and what it computed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = regression()
    compiled = torch.compile(model, backend=backend) if what == "model" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def take_step() -> None:
        optimizer.step()

    if what == "optimizer":
        take_step = torch.compile(take_step, backend=backend)  # pyright: ignore
    expected: list[Norms] = []
    watching = gradwatch.watch(compiled, optimizer, **ALWAYS) if watched else nullcontext()  # pyright: ignore
    with watching:
        for step in range(8):
            expected.append(by_hand(model, inputs(step)))
            optimizer.zero_grad()
            loss_of(compiled, inputs(step)).backward()  # pyright: ignore
            take_step()
    if watched:
        assert_same(norms(kept()), expected)
    counters = torch._dynamo.utils.counters
    counts = {
        "graph breaks": sum(counters["graph_break"].values()),
        "graphs": counters["stats"]["unique_graphs"],
        "operations": counters["stats"]["calls_captured"],
        "recompilations": dict(counters["recompiles"]),
        "weights": [each.detach().clone() for each in model.parameters()],
    }
    torch._dynamo.reset()
    counters.clear()  # by which the agent knows that something was compiled
    return counts


def test_a_compiled_step_may_log_and_clip_at_one_break_each(kept: Kept) -> None:
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = list(model.parameters())  # of a generator torch.compile leaves its graph by itself
    with gradwatch.watch(model, optimizer, **ALWAYS) as monitor:

        def report(loss: torch.Tensor) -> torch.Tensor:
            doubled = 2 * loss
            monitor.log(loss=doubled)
            total = monitor.clip_grad_norm_(held, 0.5)
            return total + doubled

        compiled = torch.compile(report, backend="aot_eager")
        losses: list[float] = []
        totals: list[float] = []
        for step in range(6):
            optimizer.zero_grad()
            loss = loss_of(model, inputs(step))
            loss.backward()
            losses.append(2 * loss.item())
            totals.append(float(np.linalg.norm(list(of_gradients(model).values()))))
            assert float(compiled(loss.detach())) == pytest.approx(totals[-1] + losses[-1])
            optimizer.step()
    assert sum(counters["graph_break"].values()) == 2
    assert counters["stats"]["unique_graphs"] == 2  # before and after the two of them
    assert not counters["recompiles"]
    torch._dynamo.reset()
    counters.clear()
    logged = [frame.scalars for frame in frames(kept())]
    assert [told["loss"] for told in logged] == pytest.approx(losses)
    assert [told["total_norm_before_clip"] for told in logged] == pytest.approx(totals)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "backend"),
    [("model", "aot_eager"), ("model", "inductor"), ("optimizer", "aot_eager")],
)
def test_what_is_compiled_is_measured_without_a_graph_or_break_more(
    what: str, backend: str, kept: Kept
) -> None:
    plain, watched = (compiled_job(watching, what, backend, kept) for watching in (False, True))
    assert watched["graph breaks"] <= plain["graph breaks"]
    assert plain["graph breaks"] == 0 or what == "optimizer"
    for count in ("graphs", "operations", "recompilations"):
        assert watched[count] == plain[count], count
    for one, other in zip(watched["weights"], plain["weights"], strict=True):
        assert torch.equal(one, other)
