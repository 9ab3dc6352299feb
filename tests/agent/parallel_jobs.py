"""Jobs of several ranks over gloo, each recorded as a run of its name, one after the other.

    python parallel_jobs.py RANKS

Run with GRADWATCH_SPOOL set. Prints, as JSON, what one process would have computed by hand in
float64 for each of them: the norm of each layer's gradient at each step.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import gradwatch

STEPS = 14  # the first ten are all recorded at full detail
RATE = 0.1
CLIP = 0.05
BATCH = 6
Job = Callable[[nn.Module, int, int], None]


def make_model(name: str) -> nn.Module:
    """Of sizes that two and three ranks do not share evenly; the last layer has one output."""
    torch.manual_seed(3)
    hidden = 8 if name == "tensor parallel" else 7  # which must be even for these
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def batch(step: int) -> Tensor:
    return torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step))


def by_hand(name: str, clip: float | None) -> list[dict[str, float]]:
    """Norms of what plain SGD applies. With `clip`, "" is the total norm before clipping."""
    model = make_model(name).double()
    found: list[dict[str, float]] = []
    for step in range(STEPS):
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(
            model(batch(step).double()).square().mean(), list(named.values())
        )
        total = float(torch.cat([each.flatten() for each in gradients]).norm())
        factor = 1.0 if clip is None else min(1.0, clip / (total + 1e-6))
        norms = {key: float(g.norm()) * factor for key, g in zip(named, gradients, strict=True)}
        found.append(norms if clip is None else {"": total, **norms})
        with torch.no_grad():
            for parameter, gradient in zip(named.values(), gradients, strict=True):
                parameter -= RATE * factor * gradient
    return found


def train(name: str, model: nn.Module, share: Callable[[Tensor], Tensor], clip: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    settings: dict[str, Any] = {"name": name, "overhead_budget": 0, "detail_every": 4}
    with gradwatch.watch(model, optimizer, **settings) as monitor:
        for step in range(STEPS):
            optimizer.zero_grad()
            model(share(batch(step))).square().mean().backward()
            if clip:
                monitor.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()


def mine(rank: int, ranks: int) -> Callable[[Tensor], Tensor]:
    return lambda whole: whole.chunk(ranks)[rank]


def ddp(model: nn.Module, rank: int, ranks: int) -> None:
    train("ddp", DistributedDataParallel(model), mine(rank, ranks), clip=False)


def sharded(model: nn.Module, ranks: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(model[0], mesh=mesh)  # pyright: ignore
    fully_shard(model, mesh=mesh)
    return model


def fsdp2(model: nn.Module, rank: int, ranks: int) -> None:
    train("fsdp2", sharded(model, ranks), mine(rank, ranks), clip=False)


def fsdp2_clipped(model: nn.Module, rank: int, ranks: int) -> None:
    train("fsdp2 clipped", sharded(model, ranks), mine(rank, ranks), clip=True)


def tensor_parallel(model: nn.Module, rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    train("tensor parallel", parallelize_module(model, mesh, plan), lambda whole: whole, clip=False)


def pipeline(model: nn.Module, rank: int, ranks: int) -> None:
    """Each of two ranks has one half of the layers, and its own optimizer for them."""
    stage = nn.ModuleDict({"0": model[0]} if rank == 0 else {"2": model[2]})  # pyright: ignore
    optimizer = torch.optim.SGD(stage.parameters(), lr=RATE)
    with gradwatch.watch(stage, optimizer, name="pipeline", overhead_budget=0, detail_every=4):
        for step in range(STEPS):
            optimizer.zero_grad()
            if rank == 0:
                hidden = torch.tanh(stage["0"](batch(step)))
                torch.distributed.send(hidden.detach(), 1)
                gradient = torch.empty_like(hidden)
                torch.distributed.recv(gradient, 1)
                hidden.backward(gradient)
            else:
                hidden = torch.empty(BATCH, 7)
                torch.distributed.recv(hidden, 0)
                hidden.requires_grad_()
                stage["2"](hidden).square().mean().backward()
                assert hidden.grad is not None
                torch.distributed.send(hidden.grad, 0)
            optimizer.step()


JOBS: dict[int, dict[str, tuple[Job, float | None]]] = {
    2: {
        "ddp": (ddp, None),
        "fsdp2": (fsdp2, None),
        "fsdp2 clipped": (fsdp2_clipped, CLIP),
        "tensor parallel": (tensor_parallel, None),
        "pipeline": (pipeline, None),
    },
    3: {"fsdp2": (fsdp2, None), "fsdp2 clipped": (fsdp2_clipped, CLIP)},
}


def work(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
    )
    for name, (job, _) in JOBS[ranks].items():
        job(make_model(name), rank, ranks)
    torch.distributed.destroy_process_group()


def main() -> None:
    ranks = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (ranks, f"{folder}/store"), nprocs=ranks)
    print(json.dumps({name: by_hand(name, clip) for name, (_, clip) in JOBS[ranks].items()}))


if __name__ == "__main__":
    main()
