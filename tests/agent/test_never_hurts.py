"""Whatever goes wrong around it, the job trains and ends as if the agent were not there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import spool as spool_module
from gradwatch.wire.frame import Frame, Manifest, Record, RunEnd

from .scripted_collector import Answer, Collector

Kept = Callable[[], list[Record]]


def train(steps: int = 40, **settings: object) -> tuple[list[bytes], gradwatch.Monitor | None]:
    """A small job. Its losses and last weights to the bit, and the monitor when it is watched."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = gradwatch.watch(model, optimizer, **settings) if settings else None  # pyright: ignore
    seen: list[bytes] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 6)).square().mean()
        loss.backward()
        if monitor is not None:
            monitor.clip_grad_norm_(model.parameters(), 1.0)
            monitor.log(loss=loss)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append(loss.detach().numpy().tobytes())
    if monitor is not None:
        monitor.finish()
    return seen + [each.detach().numpy().tobytes() for each in model.parameters()], monitor


# -- The collector and the network


ANSWERS: dict[str, Answer] = {
    "401": Answer(401),
    "413": Answer(413),
    "429": Answer(429, headers=(("Retry-After", "3600"),)),
    "500": Answer(500),
    "garbage": Answer(200, os.urandom(2000)),
    "nothing": Answer(cut=True),
    "each answer late": Answer(200, delay_s=0.5),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_a_collector_that_answers(what: str, collector: Collector) -> None:
    collector.always = ANSWERS[what]
    alone, _ = train()
    watched, monitor = train(url=collector.url)
    assert watched == alone
    assert monitor is not None
    assert set(monitor.dropped) <= {"rejected"}, "what could not be sent is on disk"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "http://no-such-host.invalid:8470"], ids=["closed port", "no DNS"]
)
def test_a_collector_that_is_not_there(url: str, kept: Kept) -> None:
    alone, _ = train()
    watched, monitor = train(url=url)
    assert watched == alone
    assert monitor is not None
    assert monitor.dropped == {}
    steps = {record.step for record in kept() if isinstance(record, Frame)}
    assert steps == set(range(1, 41))


# -- The disk


def full(path: Path, content: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("how", ["full from the start", "full after a while", "read-only"])
def test_a_disk_that_is(
    how: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if how == "read-only":
        monkeypatch.setenv("GRADWATCH_SPOOL", "/proc/gradwatch")  # nobody can write there
    elif how == "full from the start":
        monkeypatch.setattr(spool_module, "_write", full)
    else:
        written = [0]
        real = spool_module._write

        def sometimes(path: Path, content: bytes) -> None:
            written[0] += 1
            (real if written[0] < 3 else full)(path, content)

        monkeypatch.setattr(spool_module, "_write", sometimes)
    alone, _ = train()
    watched, monitor = train(overhead_budget=0)
    assert watched == alone
    assert monitor is not None
    assert monitor.dropped["disk"] > 0
    assert set(monitor.dropped) == {"disk"}
    said = capfd.readouterr().err
    assert said.count("cannot keep frames in") == 1, said


# -- The end of the process


class Ending(NamedTuple):
    """How a script goes on after its loop, and what is to be seen of it."""

    code: str
    status: int = 0
    printed: str = ""
    error: str = ""


ENDINGS: dict[str, Ending] = {
    "an exception in the loop": Ending(
        "raise ValueError('bad batch')", 1, error="ValueError: bad batch"
    ),
    "sys.exit": Ending("sys.exit(3)", 3),
    "os._exit": Ending("time.sleep(1.6); os._exit(4)", 4),
    "SIGTERM": Ending(
        "time.sleep(1.6); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -signal.SIGTERM
    ),
    "a step at exit": Ending(
        "import atexit; atexit.register(lambda: (optimizer.step(), print('stepped')))",
        printed="stepped",
    ),
    "a thread that goes on stepping": Ending(
        "import threading\n"
        "def go():\n"
        "    for _ in range(50): optimizer.step(); time.sleep(0.01)\n"
        "    print('done')\n"
        "threading.Thread(target=go).start()",
        printed="done",
    ),
}
LOOP = """
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
if watched:
    import gradwatch
    gradwatch.watch(model, optimizer, overhead_budget=0)
for step in range(12):
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
print(model.weight.tolist(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDINGS)
def test_a_watched_job_ends_as_it_would_alone(
    how: str, tmp_path: Path, kept: Kept, capsys: pytest.CaptureFixture[str]
) -> None:
    ending = ENDINGS[how]
    exec(LOOP, {"torch": torch, "watched": False})
    alone = capsys.readouterr().out
    script = tmp_path / "train.py"
    script.write_text(
        f"import os, signal, sys, time\nimport torch\nwatched = True\n{LOOP}\n{ending.code}\n"
    )
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == ending.status
    assert done.stdout.split() == [*alone.split(), *ending.printed.split()]
    said = [line for line in done.stderr.splitlines() if not line.startswith("gradwatch: ")]
    assert said[-1:] == ([ending.error] if ending.error else []), done.stderr
    steps = [record.step for record in kept() if isinstance(record, Frame)]
    assert steps[:11] == list(range(1, 12))
    ends = [record.status for record in kept() if isinstance(record, RunEnd)]
    killed = how in ("os._exit", "SIGTERM")
    assert ends == ([] if killed else ["failed" if ending.error else "finished"])


# -- Models of unusual size


@pytest.mark.slow
def test_ten_thousand_layers_are_recorded(kept: Kept) -> None:
    parameters = {f"layer_{place}": nn.Parameter(torch.ones(2)) for place in range(10_000)}
    model = nn.ParameterDict(parameters)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer) as monitor:
        for step in range(1, 13):
            for place, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full((2,), float(step * (place + 1)))
            optimizer.step()
    assert monitor.dropped == {}
    (manifest,) = {r.version: r for r in kept() if isinstance(r, Manifest)}.values()
    assert len(manifest.layers) == 10_000
    frame = next(r for r in kept() if isinstance(r, Frame) and r.step == 7)
    expected = 7 * np.arange(1, 10_001) * np.sqrt(2)
    np.testing.assert_allclose(frame.row("norm"), expected, rtol=1e-6)


def test_layers_of_a_billion_elements_on_no_device_are_in_the_manifest_alone(kept: Kept) -> None:
    model = nn.ModuleDict(
        {
            "real": nn.Linear(4, 3),
            "frozen": nn.Linear(40_000, 25_000, device="meta").requires_grad_(False),
            "empty": nn.Linear(40_000, 25_000, device="meta"),
        }
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, overhead_budget=0, detail_every=2) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model["real"](torch.ones(1, 4)).sum().backward()
            model["empty"](torch.ones(1, 40_000, device="meta")).sum().backward()
            optimizer.step()
    assert monitor.dropped == {}
    (manifest,) = {r.version: r for r in kept() if isinstance(r, Manifest)}.values()
    shapes = {layer.name: layer.shape for layer in manifest.layers}
    assert shapes["empty.weight"] == shapes["frozen.weight"] == (25_000, 40_000)
    for frame in (record for record in kept() if isinstance(record, Frame)):
        row = dict(zip(shapes, frame.row("norm"), strict=True))  # pyright: ignore
        assert row["real.weight"] > 0
        assert np.isnan(row["empty.weight"])
        assert np.isnan(row["frozen.weight"])


# -- A fault in the agent's own thread


def test_a_thread_of_the_agent_that_is_slow_drops_frames_and_never_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gradwatch import outlet
    from gradwatch.pending import PendingFrame

    real = PendingFrame.frame

    def slow(self: PendingFrame, rank: int) -> Frame | None:
        time.sleep(0.05)
        return real(self, rank)

    monkeypatch.setattr(PendingFrame, "frame", slow)
    monkeypatch.setattr(outlet, "QUEUE_LIMIT", 4)
    alone, _ = train()
    watched, monitor = train(overhead_budget=0)
    assert watched == alone
    assert monitor is not None
    assert monitor.dropped["queue_full"] > 0
    assert set(monitor.dropped) == {"queue_full"}
