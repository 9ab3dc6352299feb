"""A job of 300 tensors at 10 steps a second that prints what watching it takes of memory.

`footprint.py STEPS [SETTINGS]`, SETTINGS as JSON. It trains for a while unwatched first. Memory is
the largest resident size from the import of gradwatch to the end, beside that right before. With
2.04 M elements this is about the largest model whose gradients are still copied whole.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(116, 116), nn.Tanh()) for _ in range(150)))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)


def train(steps: int) -> None:
    for _ in range(steps):
        started = time.monotonic()
        optimizer.zero_grad()
        model(torch.randn(32, 116)).square().mean().backward()
        optimizer.step()
        time.sleep(max(0.0, 0.1 - (time.monotonic() - started)))


def resident_mb(which: str) -> float:
    """This process's resident memory: VmRSS now, VmHWM the largest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {which} in /proc/self/status")


train(20)
before_mb = resident_mb("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the largest size begins anew
import gradwatch  # noqa: E402  # what its import takes is to be seen

monitor = gradwatch.watch(model, optimizer, **json.loads("".join(sys.argv[2:]) or "{}"))
imported_mb = resident_mb("VmRSS")
train(20)  # the first steps are recorded in full
began = time.time()
train(int(sys.argv[1]))
ended = time.time()
monitor.finish()
print(
    json.dumps(
        {
            "from": began,
            "to": ended,
            "memory_mb": resident_mb("VmHWM") - before_mb,
            "imports_mb": imported_mb - before_mb,
        }
    )
)
