"""What is sampled of activations: right values, at the right layer, and no effect on the job."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch import activations
from gradwatch.activations import ENDS, RUN, RUNS, ActivationTaps, Ends, Modules, ends_of, sampled
from gradwatch.layers import named_layers
from gradwatch.wire.frame import Frame, Manifest, Record

Kept = Callable[[], list[Record]]
Shares = Mapping[str, float]

FORWARDS = {kind: kind.forward for kind in (*ENDS, *activations.FED)}


@pytest.fixture(autouse=True)
def left_as_it_was() -> Iterator[None]:
    yield
    assert {kind: kind.forward for kind in FORWARDS} == FORWARDS


def tapped(model: nn.Module, step: Callable[[], object]) -> dict[str, float]:
    """Share at the flat ends of each layer that was sampled in one step."""
    layers = list(named_layers([model]))
    taps = ActivationTaps()
    taps.open(layers, lambda: Modules(model.named_modules()))
    step()
    outputs = taps.close()
    if outputs is None:
        return {}
    names = [layer.name for layer in layers]
    found = dict(zip(names, outputs.saturated().tolist(), strict=True))
    return {name: share for name, share in found.items() if not np.isnan(share)}


def by_hand(output: Tensor, ends: Ends) -> float:
    """Share of all elements, in float64."""
    values = output.detach().double().numpy()
    return float(((values <= ends.low) | (values >= ends.high)).mean())


class Chain(nn.Sequential):
    """A Sequential that remembers what its parts put out."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen: list[Tensor] = []
        for module in self:
            x = module(x)
            self.seen.append(x.detach().clone())
        return x


def steep(layer: nn.Linear | nn.Conv2d, factor: float) -> nn.Linear | nn.Conv2d:
    with torch.no_grad():
        layer.weight *= factor
    return layer


@pytest.mark.parametrize(
    "make", [nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardsigmoid, lambda: nn.Hardtanh(-0.5, 2.0)]
)
def test_the_share_of_a_small_output_is_that_of_all_its_elements(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = Chain(
        steep(nn.Linear(6, 16), 20), make(), steep(nn.Linear(16, 8), 5), make(), nn.Linear(8, 2)
    )
    found = tapped(model, lambda: model(torch.randn(32, 6)).sum().backward())
    ends = ends_of(model[1])
    assert ends is not None
    assert found == {
        "0.weight": pytest.approx(by_hand(model.seen[1], ends), abs=1e-6),
        "2.weight": pytest.approx(by_hand(model.seen[3], ends), abs=1e-6),
    }
    assert 0.1 < found["0.weight"] < 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_share_of_a_large_output_is_that_of_its_sample(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = Chain(
        steep(nn.Conv2d(3, 16, 3), 8), nn.BatchNorm2d(16), nn.Tanh(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(16 * 49, 2),
    ).to(memory_format=layout)  # fmt: skip
    with torch.no_grad():
        model[1].weight *= 3
    x = torch.randn(8, 3, 16, 16).contiguous(memory_format=layout)
    found = tapped(model, lambda: model(x).sum().backward())
    share = by_hand(model.seen[2], ENDS[nn.Tanh](None))
    error = (share * (1 - share) / (RUNS * RUN)) ** 0.5
    assert found == {"0.weight": pytest.approx(share, abs=5 * error)}
    assert 0.2 < share < 0.8


def test_all_micro_batches_of_a_step_count_and_what_only_evaluates_does_not() -> None:
    torch.manual_seed(0)
    model = Chain(steep(nn.Linear(4, 8), 10), nn.Tanh(), nn.Linear(8, 1))
    parts: list[Tensor] = []

    def step() -> None:
        for size in (1.0, 0.1, 0.0):
            model(size * torch.randn(16, 4)).sum().backward()
            parts.append(model.seen[1])
        with torch.no_grad():
            model(100 * torch.randn(16, 4))
        with torch.inference_mode():
            model(100 * torch.randn(16, 4))
        model.eval()
        model(100 * torch.randn(16, 4)).sum().backward()

    found = tapped(model, step)
    assert found == {
        "0.weight": pytest.approx(by_hand(torch.cat(parts), ENDS[nn.Tanh](None)), abs=1e-6)
    }


class OutOfOrder(nn.Module):
    """Registered last to first, with one activation for all and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.second = steep(nn.Linear(8, 8, bias=False), 30)
        self.first = nn.Linear(4, 8)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(0.01 * self.first(x))
        return self.head(self.act(100 * self.second(x) + x))


def test_an_output_belongs_to_the_layer_that_fed_it_whatever_the_order_of_registration() -> None:
    torch.manual_seed(0)
    model = OutOfOrder()
    found = tapped(model, lambda: model(torch.randn(64, 4)).sum().backward())
    assert set(found) == {"first.weight", "second.weight"}
    assert found["first.weight"] == 0
    assert found["second.weight"] > 0.1


def test_a_frozen_layer_is_not_taken_for_the_one_before_it() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    model[2].requires_grad_(False)
    with torch.no_grad():
        model[2].weight *= 1000
    found = tapped(model, lambda: model(torch.randn(64, 4)).sum().backward())
    assert found == {"0.weight": 0.0}


def test_the_activation_at_the_end_of_a_network_is_meant_to_reach_its_ends() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), steep(nn.Linear(8, 1), 1e4), nn.Flatten(0), nn.Sigmoid()
    )
    target = torch.ones(16)

    def step() -> None:
        nn.functional.binary_cross_entropy(model(torch.randn(16, 4)), target).backward()

    assert set(tapped(model, step)) == {"0.weight"}


def test_activations_without_flat_ends_have_none_and_functions_are_not_seen() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8))
            self.head = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)))

    model = Functional()
    found = tapped(model, lambda: model(torch.randn(16, 4)).sum().backward())
    assert found == {"body.0.weight": 0.0}
    assert ends_of(nn.ReLU6()) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_computes_twice_counts_as_what_it_is(reentrant: bool) -> None:
    torch.manual_seed(0)
    body = Chain(steep(nn.Linear(4, 16), 10), nn.Tanh(), steep(nn.Linear(16, 8), 5), nn.Tanh())
    model = nn.ModuleDict({"body": body, "head": nn.Linear(8, 1)})
    x = torch.randn(32, 4, requires_grad=True)

    def step() -> None:
        kept: Any = checkpoint(body, x, use_reentrant=reentrant)
        model["head"](kept).sum().backward()

    found = tapped(model, step)
    assert found["body.0.weight"] == pytest.approx(by_hand(body.seen[1], Ends(-0.98, 0.98)))
    # What a reentrant block hands on is cut off from what takes it.
    assert ("body.2.weight" in found) == (not reentrant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_weights_are_found_behind_their_casts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Chain(
        steep(nn.Linear(4, 16), 10), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Sigmoid(),
        nn.Linear(16, 1),
    )  # fmt: skip

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype):
            model(torch.randn(32, 4)).sum().backward()

    found = tapped(model, step)
    assert found == {
        "0.weight": pytest.approx(by_hand(model.seen[1], Ends(-0.98, 0.98)), abs=1e-6),
        "2.weight": 0.0,
    }


# -- Nothing of it stays, and nothing of it is seen


def test_no_activation_is_kept_alive() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    taps = ActivationTaps()
    taps.open(list(named_layers([model])), lambda: Modules(model.named_modules()))
    output = model[1](model[0](torch.randn(100, 64)))
    model[2](output)
    storage, tensor = StorageWeakRef(output.untyped_storage()), weakref.ref(output)
    del output
    gc.collect()
    assert tensor() is None
    assert storage.expired()
    assert taps.close() is not None


def test_a_sample_is_a_copy_of_bounded_size() -> None:
    for size in (1, RUNS * RUN, RUNS * RUN + 1, 10_000):
        whole = torch.randn(size)
        part = sampled(whole)
        assert part is not None
        assert part.untyped_storage().nbytes() <= 4 * RUNS * RUN
        assert part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        assert np.isin(part.numpy(), whole.numpy()).all()
    assert sampled(torch.randn(10, 10)[:, ::2]) is None, "it would be copied whole"


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Calling(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Counting, Calling])
def test_modes_of_the_script_see_its_own_operations_alone(mode: type[Counting]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(16, 4)

    def names() -> list[str]:
        model.zero_grad()
        with mode() as seen:
            model(x).sum().backward()
        return seen.names

    alone = names()
    beside: list[list[str]] = []
    tapped(model, lambda: beside.append(names()))
    assert beside == [alone]


def test_transforms_of_functions_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    state = dict(model.named_parameters())

    def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, state, (x,)).sum()

    x = torch.randn(16, 4)
    alone = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, x)
    beside: list[Any] = []

    def step() -> None:
        beside.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(state, x))
        model(x).sum().backward()

    assert set(tapped(model, step)) == {"0.weight"}
    for name, gradient in alone.items():
        assert torch.equal(beside[0][name], gradient)


@pytest.mark.parametrize("kind", [*ENDS, nn.ReLU6])
def test_while_taps_are_open_models_copy_pickle_save_script_and_export(
    kind: type[nn.Module],
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), kind(), nn.Linear(8, 1), nn.Tanh())
    x = torch.randn(16, 4)
    expected = model(x)

    def step() -> None:
        twins: list[Any] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        file = io.BytesIO()
        torch.save(model, file)
        assert b"gradwatch" not in file.getvalue()
        file.seek(0)
        twins.append(torch.load(file, weights_only=False))
        twins += [torch.jit.script(model), torch.jit.trace(model, x)]
        twins.append(torch.export.export(model, (x,)).module())
        for twin in twins:
            assert torch.equal(twin(x), expected)

    tapped(model, step)


def test_a_fault_of_ours_is_said_once_and_ends_the_sampling(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(output: Tensor) -> Tensor:
        raise RuntimeError("no")

    monkeypatch.setattr(activations, "sampled", failing)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    layers = list(named_layers([model]))
    taps = ActivationTaps()
    for _ in range(3):
        taps.open(layers, lambda: Modules(model.named_modules()))
        model(torch.randn(16, 4)).sum().backward()
        assert taps.close() is None
    assert capfd.readouterr().err.count("could not sample Tanh") == 1


# -- In a job


def train(
    model: nn.Module, steps: int, after: Callable[[int], object] = lambda step: None
) -> gradwatch.Monitor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, overhead_budget=0, detail_every=5) as monitor:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            model(torch.randn(32, 6)).pow(2).mean().backward()
            optimizer.step()
            after(step)
    return monitor


def shares(records: list[Record]) -> dict[int, Shares]:
    """By step, of the layers that have one."""
    names: dict[int, list[str]] = {}
    found: dict[int, Shares] = {}
    for record in records:
        if isinstance(record, Manifest):
            names[record.version] = [layer.name for layer in record.layers]
        if isinstance(record, Frame) and (row := record.row("saturated_fraction")) is not None:
            told = zip(names[record.manifest], row.tolist(), strict=True)
            found[record.step] = {name: share for name, share in told if not np.isnan(share)}
    return found


def test_detail_frames_tell_it_and_between_them_nothing_is_replaced(kept: Kept) -> None:
    torch.manual_seed(0)
    model = Chain(steep(nn.Linear(6, 16), 50), nn.Tanh(), nn.Linear(16, 3))
    seen: dict[int, float] = {}
    replaced: set[int] = set()

    def after(step: int) -> None:
        seen[step] = by_hand(model.seen[1], Ends(-0.98, 0.98))
        if nn.Tanh.forward is not FORWARDS[nn.Tanh]:
            replaced.add(step + 1)

    monitor = train(model, 31, after)
    assert monitor.dropped == {}
    told = shares(kept())
    # Which layers there are is known from the first step on.
    assert set(told) == replaced == {*range(2, 11), 15, 20, 25, 30}
    for step, layers in told.items():
        assert layers == {"0.weight": pytest.approx(seen[step], abs=1e-6)}


def test_two_optimizers_have_the_layers_of_their_own(kept: Kept) -> None:
    one, other = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
        for _ in range(2)
    )
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (one, other)]
    with (
        gradwatch.watch(one, optimizers[0], overhead_budget=0),
        gradwatch.watch(other, optimizers[1], overhead_budget=0),
    ):
        for _ in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
                (one(torch.randn(8, 6)) + other(torch.randn(8, 6))).sum().backward()
                optimizer.step()
    known = {
        (record.optimizer, record.step): np.isfinite(row).tolist()
        for record in kept()
        if isinstance(record, Frame) and (row := record.row("saturated_fraction")) is not None
    }
    assert set(known) == {(name, step) for name in ("SGD", "SGD-2") for step in (2, 3, 4)}
    assert all(row == [True, False, True, False, False, False] for row in known.values())


def compiled_job(watched: bool, how: str, kept: Kept) -> dict[str, Any]:
    """Counts of torch.compile over a job that compiles its model after it was watched."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch.manual_seed(0)
    model = OutOfOrder() if how != "plain method" else nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = gradwatch.watch(model, optimizer, overhead_budget=0) if watched else nullcontext()
    with watching:
        forward: Any = model
        for step in range(8):
            if step == (3 if how == "late" else 0):
                if "method" in how:
                    model.compile(backend="aot_eager")
                else:
                    forward = torch.compile(
                        model if how == "model" else model.forward, backend="aot_eager"
                    )
            optimizer.zero_grad()
            forward(torch.randn(16, 4)).sum().backward()
            optimizer.step()
    counts = {
        "graph breaks": sum(counters["graph_break"].values()),
        "graphs": counters["stats"]["unique_graphs"],
        "operations": counters["stats"]["calls_captured"],
        "recompilations": dict(counters["recompiles"]),
        "weights": [each.detach().tolist() for each in model.parameters()],
    }
    torch._dynamo.reset()
    counters.clear()
    if watched:
        # What is compiled from the third step on is not sampled any more at the one after it.
        assert max(shares(kept()), default=0) <= (3 if how == "late" else 0)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "function", "method", "plain method", "late"])
def test_what_is_compiled_is_not_sampled_and_compiles_as_without_us(how: str, kept: Kept) -> None:
    assert compiled_job(True, how, kept) == compiled_job(False, how, kept)
