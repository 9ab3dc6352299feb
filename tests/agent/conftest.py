"""Each test of the agent starts without a run, a setting or a spool, and leaves none behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gradwatch import monitor, notice
from gradwatch.wire.codec import decode_batch
from gradwatch.wire.frame import Record

from .scripted_collector import Collector

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool of the test's own, which every watch uses; no run is left going at the end."""
    for name in list(os.environ):
        if name.startswith("GRADWATCH_") or name in LAUNCHERS:
            monkeypatch.delenv(name)
    folder = tmp_path / "spool"
    monkeypatch.setenv("GRADWATCH_SPOOL", str(folder))
    notice._said.clear()
    yield folder
    if monitor._current is not None:
        monitor._current.finish("finished")


@pytest.fixture
def collector() -> Iterator[Collector]:
    served = Collector()
    yield served
    served.stop()


@pytest.fixture
def kept(spool: Path) -> Callable[[], list[Record]]:
    """What was put on disk, in order, once the run is finished."""

    def read() -> list[Record]:
        return [
            item.record
            for segment in sorted(spool.glob("*/*.batch"))
            for item in decode_batch(segment.read_bytes())[0]
        ]

    return read
