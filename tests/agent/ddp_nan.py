"""Two ranks of one job, of which the second makes a NaN from its sixth step on. Run by torchrun."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch

BREAKS_AT = 6


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
    optimizer = torch.optim.Adam(model.parameters())
    watching = gradwatch.watch(model, optimizer)
    for step in range(1, BREAKS_AT + 8):
        output = model(torch.randn(8, 4))
        broken = rank == 1 and step >= BREAKS_AT
        loss = torch.log(output.abs() * (0.0 if broken else 1.0) + (0.0 if broken else 1.0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    watching.finish()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
