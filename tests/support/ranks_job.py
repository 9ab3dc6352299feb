"""A job of several ranks under DDP. Run by torchrun, with FAULT naming what is wrong with it.

norms: all optimizers but rank 0's were built without the layer norm. sleeps: the last rank lags
from step 12 on. healthy: nothing. hangs: after some steps, for ever.
"""

from __future__ import annotations

import os
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch

STEPS = 60
LAG_S = 0.15  # far beyond what a busy machine does to a step


def main() -> None:
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, last = torch.distributed.get_rank(), torch.distributed.get_world_size() - 1
    fault = os.environ["FAULT"]
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 1))
    model = DistributedDataParallel(net)
    norm = {id(each) for each in net[1].parameters()}
    left_out = norm if fault == "norms" and rank else set[int]()
    optimizer = torch.optim.SGD([p for p in net.parameters() if id(p) not in left_out], lr=0.05)
    monitor = gradwatch.watch(model, optimizer, name=fault, overhead_budget=0, detail_every=20)
    for step in range(1, STEPS + 1):
        if fault == "sleeps" and rank == last and step >= 12:
            time.sleep(LAG_S)
        if fault == "hangs" and step == 15:
            print("hangs", flush=True)
            time.sleep(600)
        x = torch.randn(16, 8)
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())
    monitor.finish()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
