"""Two ranks under DDP over gloo, most of whose steps nothing is recorded of.

    python quiet_ranks.py healthy|lags|drifts

Run with GRADWATCH_SPOOL set. lags: the second rank sleeps at each step. drifts: gradients are not
averaged. Each rank prints how many of its steps were more than counted.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch import flight, watching

STEPS = 100
LAG_S = 0.05  # far beyond what a busy machine does to a step


def work(rank: int, fault: str, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    looked_at = 0
    observe = watching.OptimizerWatch._observe

    def noted(*given: object) -> None:
        nonlocal looked_at
        looked_at += 1
        observe(*given)  # type: ignore[arg-type]

    watching.OptimizerWatch._observe = noted  # type: ignore[method-assign]
    # On any machine: nothing that is due as time passes, and no comparison that is put off for
    # what it costs.
    flight.SHARE, watching.DETAIL_SHARE, watching.COMPARE_SHARE = 1e-9, 1e-9, 0.0
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(rank)
    with gradwatch.watch(model, optimizer, norm_every=1000, detail_every=20):
        for _ in range(STEPS):
            if fault == "lags" and rank == 1:
                time.sleep(LAG_S)
            optimizer.zero_grad()
            with model.no_sync() if fault == "drifts" else contextlib.nullcontext():
                x = torch.randn(16, 8)
                (model(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
            optimizer.step()
    print(f"looked at {looked_at}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (sys.argv[1], f"{folder}/store"), nprocs=2)
