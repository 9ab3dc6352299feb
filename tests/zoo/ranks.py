"""Jobs of several ranks, over gloo on one machine: drifting, lagging and healthy ones.

`train` runs in every rank's own process, with torch.distributed initialised. Models start from the
same seed on every rank; data is drawn by `batches`, of each rank its own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from random import Random
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from gradwatch.demo.scenarios import Watch

from .scenario import FAST, Scenario, Train, expect
from .training import Block, Data, digit_data, he, mlp

STEPS = 100
STRAGGLER_STEPS = 60
DRIFT_WITHIN = 20
NAN_STEP = 61
USUAL_STEPS = 8
SLEEP_S = 0.004  # the least that a rank lags: what a busy machine does to short steps is not it


def batches(size: int = 32, seed: int = 0) -> Iterator[Data]:
    """Random digits, others on each rank."""
    x, y = digit_data()
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    while True:
        rows = torch.randint(len(x), (size,), generator=generator)
        yield x[rows], y[rows]


def some_net(chance: Random) -> nn.Module:
    width, depth = chance.choice([32, 64]), chance.randrange(2, 5)
    if chance.random() < 0.5:
        return mlp([64, *[width] * depth, 10], initialise=he)
    return nn.Sequential(
        nn.Linear(64, width),
        *(Block(width) for _ in range(depth)),
        nn.LayerNorm(width),
        nn.Linear(width, 10),
    )


def some_optimizer(chance: Random, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if chance.random() < 0.5:
        return torch.optim.AdamW(parameters, lr=chance.choice([3e-4, 1e-3]))
    return torch.optim.SGD(parameters, lr=chance.choice([0.02, 0.05]), momentum=0.9)


def fit(
    watch: Watch,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    data: Iterator[Data],
    *,
    before: Callable[[int], object] = lambda _: None,
    after_backward: Callable[[int], object] = lambda _: None,
    after_step: Callable[[int], object] = lambda _: None,
    forward: Callable[[int], nn.Module] | None = None,
    unsynced: Callable[[int], bool] = lambda _: False,
) -> None:
    """The usual loop. forward: what is called in place of the model; unsynced: by step, whether
    DDP is told not to average."""
    with watch(model, optimizer) as monitor:
        for step in range(1, steps + 1):
            before(step)
            x, y = next(data)
            called = model if forward is None else forward(step)
            quiet = (
                model.no_sync()
                if isinstance(model, DistributedDataParallel) and unsynced(step)
                else nullcontext()
            )
            optimizer.zero_grad()
            with quiet:
                loss = F.cross_entropy(called(x), y)
                loss.backward()
            after_backward(step)
            optimizer.step()
            monitor.log(loss=loss.detach())
            after_step(step)


def ddp(chance: Random) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    model = DistributedDataParallel(some_net(chance))
    return model, some_optimizer(chance, list(model.parameters()))


# --- one rank that poisons the average of all ---


def nan_on_one_rank(watch: Watch, chance: Random) -> None:
    """From step 61 on a row of the last rank's batches holds NaN."""
    model, optimizer = ddp(chance)
    last = dist.get_rank() == dist.get_world_size() - 1

    def data() -> Iterator[Data]:
        for step, (x, y) in enumerate(batches(), start=1):
            if last and step >= NAN_STEP:
                x[chance.randrange(len(x))] = float("nan")
            yield x, y

    fit(watch, model, optimizer, STEPS, data())


# --- replicas that drift ---


def no_sync_left_on(watch: Watch, chance: Random) -> None:
    model, optimizer = ddp(chance)
    fit(watch, model, optimizer, STEPS, batches(), unsynced=lambda _: True)


def no_sync_left_on_later(watch: Watch, chance: Random) -> None:
    model, optimizer = ddp(chance)
    fit(watch, model, optimizer, STEPS, batches(), unsynced=lambda step: step > 63)


def wrapper_bypassed(watch: Watch, chance: Random) -> None:
    """The inner module is called, and watched, so DDP never hears of a backward pass."""
    model, optimizer = ddp(chance)
    fit(watch, model.module, optimizer, STEPS, batches())


def one_rank_keeps_its_own(watch: Watch, chance: Random) -> None:
    """Averaged by hand; from some step on one rank leaves the average out."""
    model = some_net(chance)
    optimizer = some_optimizer(chance, list(model.parameters()))
    last = dist.get_world_size() - 1

    def average(step: int) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            mean = parameter.grad / dist.get_world_size()
            dist.all_reduce(mean)
            if step <= 40 or dist.get_rank() != last:
                parameter.grad.copy_(mean)

    fit(watch, model, optimizer, STEPS, batches(), after_backward=average)


def norms_of(model: nn.Module) -> list[nn.Parameter]:
    return [
        p
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for p in module.parameters()
    ]


def norms_updated_on_one_rank(watch: Watch, chance: Random) -> None:
    """DDP; every optimizer but rank 0's was built without the layer norms."""
    width = chance.choice([32, 64])
    net = nn.Sequential(
        nn.Linear(64, width), Block(width), Block(width), nn.LayerNorm(width), nn.Linear(width, 10)
    )
    model = DistributedDataParallel(net)
    left_out = {id(p) for p in norms_of(net)} if dist.get_rank() else set[int]()
    optimizer = some_optimizer(chance, [p for p in model.parameters() if id(p) not in left_out])
    fit(watch, model, optimizer, STEPS, batches())


class TensorParallel(nn.Module):
    """Two blocks, split over ranks, with a layer norm that every rank holds before each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(64, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.head = nn.Linear(width, 10)
        plan: dict[str, ParallelStyle] = {f"ups.{n}": ColwiseParallel() for n in range(2)}
        plan |= {f"downs.{n}": RowwiseParallel() for n in range(2)}
        parallelize_module(self, init_device_mesh("cpu", (dist.get_world_size(),)), plan)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(x)


def same_batches(seed: int = 0, size: int = 32) -> Iterator[Data]:
    """Random digits, the same on every rank, as tensor parallelism wants them."""
    x, y = digit_data()
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(x), (size,), generator=generator)
        yield x[rows], y[rows]


def tensor_parallel_norms(watch: Watch, chance: Random) -> None:
    """Tensor parallelism; from step 51 on all ranks but one put the old layer norms back."""
    model = TensorParallel(chance.choice([16, 32]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    lucky = chance.randrange(dist.get_world_size())
    kept: list[Tensor] = []

    def keep(step: int) -> None:
        kept[:] = [p.detach().clone() for p in norms_of(model)]

    def put_back(step: int) -> None:
        if dist.get_rank() != lucky and step > 50:
            with torch.no_grad():
                for parameter, old in zip(norms_of(model), kept, strict=True):
                    parameter.copy_(old)

    fit(watch, model, optimizer, STEPS, same_batches(), before=keep, after_step=put_back)


def norms_split_by_hand(watch: Watch, chance: Random) -> None:
    """Tensor parallelism by hand, on plain tensors; one rank's optimizer lacks the layer norms."""
    model = SplitByHand(chance.choice([16, 32]))
    left_out = {id(p) for p in norms_of(model)} if dist.get_rank() else set[int]()
    optimizer = some_optimizer(chance, [p for p in model.parameters() if id(p) not in left_out])
    fit(watch, model, optimizer, STEPS, same_batches())


class _Sum(torch.autograd.Function):
    """Adds up over ranks; its gradient is the same on each."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *gradient: Tensor) -> Tensor:
        return gradient[0]


class _Copy(torch.autograd.Function):
    """The same on every rank; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *gradient: Tensor) -> Tensor:
        total = gradient[0].clone()
        dist.all_reduce(total)
        return total


class SplitByHand(nn.Module):
    """A block whose inner layer is split over ranks, each drawing its own part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(64, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        torch.manual_seed(1000 + dist.get_rank())
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        inner = torch.relu(self.up(_Copy.apply(self.norm(x))))
        return self.head(x + _Sum.apply(self.down(inner)))


# --- a rank that lags ---


def one_rank_sleeps(watch: Watch, chance: Random) -> None:
    """Before each batch one rank sleeps five times a usual step."""
    model, optimizer = ddp(chance)
    slow = Lag(chance.randrange(dist.get_world_size()))
    fit(watch, model, optimizer, STRAGGLER_STEPS, batches(), before=slow)


def one_rank_sleeps_before_its_step(watch: Watch, chance: Random) -> None:
    """The same between the backward pass and the step, as clipping or logging would."""
    model, optimizer = ddp(chance)
    slow = Lag(chance.randrange(dist.get_world_size()))
    fit(watch, model, optimizer, STRAGGLER_STEPS, batches(), after_backward=slow)


class Lag:
    """Sleeps on one rank, at each step but the first ones, five times as long as those took."""

    def __init__(self, rank: int) -> None:
        self._mine = dist.get_rank() == rank
        self._times: list[float] = []
        self._called_at = 0.0

    def __call__(self, step: int) -> None:
        if 1 < step <= USUAL_STEPS:
            self._times.append(time.perf_counter() - self._called_at)
        elif self._mine and step > USUAL_STEPS:
            time.sleep(max(5 * median(self._times), SLEEP_S))
        self._called_at = time.perf_counter()


# --- healthy, though a naive rule would cry ---


def healthy_ddp(watch: Watch, chance: Random) -> None:
    model, optimizer = ddp(chance)
    fit(watch, model, optimizer, STEPS, batches())


def uneven_data(watch: Watch, chance: Random) -> None:
    """One rank's batches are half as large again; the last of each epoch is short."""
    model, optimizer = ddp(chance)
    large = batches(48 if dist.get_rank() == 0 else 32)
    short = batches(7)
    data = (next(short) if step % 20 == 0 else next(large) for step in itertools.count(1))
    fit(watch, model, optimizer, STEPS, data)


def pauses(watch: Watch, chance: Random) -> None:
    """Rank 0 evaluates every 20 steps and writes a checkpoint every 50, while the others wait."""
    model, optimizer = ddp(chance)
    x, y = digit_data()

    def evaluate(step: int) -> None:
        if dist.get_rank() == 0 and step % 20 == 0:
            with torch.no_grad():
                F.cross_entropy(model.module(x), y)
            time.sleep(0.1)
        if dist.get_rank() == 0 and step % 50 == 0:
            time.sleep(0.3)

    fit(watch, model, optimizer, STEPS, batches(), after_step=evaluate)


def accumulation(watch: Watch, chance: Random) -> None:
    """Four backward passes a step, of which the last one alone is averaged."""
    model, optimizer = ddp(chance)
    data = batches(8)

    def three_more(_: int) -> None:
        with model.no_sync():
            for _ in range(3):
                x, y = next(data)
                F.cross_entropy(model(x), y).backward()

    with watch(model, optimizer) as monitor:
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            three_more(step)
            x, y = next(data)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss.detach())


def sharded(watch: Watch, chance: Random) -> None:
    """FSDP2: each rank has its own rows of every layer, with norms of their own."""
    model = some_net(chance)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    fit(watch, model, some_optimizer(chance, list(model.parameters())), STEPS, batches())


def tensor_parallel(watch: Watch, chance: Random) -> None:
    model = TensorParallel(chance.choice([16, 32]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    fit(watch, model, optimizer, STEPS, same_batches())


def split_by_hand(watch: Watch, chance: Random) -> None:
    model = SplitByHand(chance.choice([16, 32]))
    fit(watch, model, some_optimizer(chance, list(model.parameters())), STEPS, same_batches())


def pipeline(watch: Watch, chance: Random) -> None:
    """Stages that look alike: the same names, shapes and first weights, and other layers."""
    rank, last, width = dist.get_rank(), dist.get_world_size() - 1, 64
    stage = nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)
    )
    optimizer = some_optimizer(chance, list(stage.parameters()))
    data, size = same_batches(), 32
    with watch(stage, optimizer) as monitor:
        for _ in range(STEPS):
            x, y = next(data)
            optimizer.zero_grad()
            if rank > 0:
                x = torch.empty(size, width)
                dist.recv(x, rank - 1)
                x.requires_grad_()
            out = stage(x)
            if rank == last:
                loss = F.cross_entropy(out[:, :10], y)
                loss.backward()
                monitor.log(loss=loss.detach())
            else:
                dist.send(out.detach(), rank + 1)
                gradient = torch.empty_like(out)
                dist.recv(gradient, rank + 1)
                out.backward(gradient)
            if rank > 0:
                assert x.grad is not None
                dist.send(x.grad, rank - 1)
            optimizer.step()


def experts(watch: Watch, chance: Random) -> None:
    """What all ranks hold is averaged by hand; the expert of each rank is its own."""
    shared = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
    expert = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    model = nn.ModuleDict({"shared": shared, "expert": expert})
    optimizer = some_optimizer(chance, list(model.parameters()))
    data = batches()
    with watch(model, optimizer) as monitor:
        for _ in range(STEPS):
            x, y = next(data)
            optimizer.zero_grad()
            loss = F.cross_entropy(expert(shared(x)), y)
            loss.backward()
            for parameter in shared.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
            optimizer.step()
            monitor.log(loss=loss.detach())


def drift(name: str, train: Train, ranks: int, onset: int = 1) -> Scenario:
    return Scenario(
        name, train, (expect("rank_drift", onset=onset, within=DRIFT_WITHIN),), ranks=ranks
    )


def lag(name: str, train: Train, ranks: int) -> Scenario:
    return Scenario(name, train, (expect("straggler", within=FAST),), ranks=ranks)


RANKED: tuple[Scenario, ...] = (
    Scenario(
        "F32 NaN on one rank",
        nan_on_one_rank,
        (expect("non_finite", onset=NAN_STEP, within=0),),
        ranks=2,
    ),
    drift("F30 no_sync left on", no_sync_left_on, 2),
    drift("F30 no_sync from step 64", no_sync_left_on_later, 3, onset=64),
    drift("F30 wrapper bypassed", wrapper_bypassed, 2),
    drift("F30 one rank by itself", one_rank_keeps_its_own, 3, onset=41),
    drift("F42 norms of one optimizer", norms_updated_on_one_rank, 3),
    drift("F42 norms under tensor parallelism", tensor_parallel_norms, 2, onset=51),
    drift("F42 norms, split by hand", norms_split_by_hand, 2),
    lag("F31 one of two sleeps", one_rank_sleeps, 2),
    lag("F31 one of three sleeps", one_rank_sleeps, 3),
    lag("F31 sleeps before the step", one_rank_sleeps_before_its_step, 2),
    Scenario("H30 DDP", healthy_ddp, ranks=3),
    Scenario("H30 uneven data", uneven_data, ranks=2),
    Scenario("H31 pauses of rank 0", pauses, ranks=2),
    Scenario("H32 accumulation under DDP", accumulation, ranks=2),
    Scenario("H33 FSDP2", sharded, ranks=2),
    Scenario("H34 tensor parallelism", tensor_parallel, ranks=2),
    Scenario("H34 split by hand", split_by_hand, ranks=2),
    Scenario("H35 pipeline of twins", pipeline, ranks=2),
    Scenario("H36 an expert a rank", experts, ranks=2),
)
