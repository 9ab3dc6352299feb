"""Train the zoo's jobs under the real agent and keep their frames, to be judged again at will.

A fixture is one folder a job and seed: what the agent would have sent, as it keeps it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed
from rich.console import Console
from rich.progress import track
from torch.multiprocessing.spawn import spawn

import gradwatch
from gradwatch.replay import Recording, read_spool

from .faulty import FAULTY
from .healthy import HEALTHY
from .merging import together
from .ranks import RANKED
from .scenario import Scenario
from .scoring import Told, follow

T = TypeVar("T")

FOLDER = Path(__file__).parents[2] / ".gradwatch" / "zoo"
ZOO: dict[str, Scenario] = {scenario.name: scenario for scenario in (*FAULTY, *HEALTHY, *RANKED)}
SEEDS = 5
DETAIL_EVERY = 20  # as a job of steps this short would have


class Key(NamedTuple):
    """One training of one scenario."""

    name: str
    seed: int

    def path(self, folder: Path = FOLDER) -> Path:
        return folder / f"{self.name.replace(' ', '_').replace('/', 'per')}-{self.seed}"


def train(key: Key, folder: Path = FOLDER) -> float:
    """Train one job and keep its frames. Returns the seconds that it took."""
    started = time.perf_counter()
    spool = Path(tempfile.mkdtemp(prefix="zoo-"))
    ranks = ZOO[key.name].ranks
    try:
        with _environment(GRADWATCH_SPOOL=str(spool), GRADWATCH_URL=""), _silence():
            if ranks == 1:
                _train(key)
            else:
                with tempfile.TemporaryDirectory() as meeting:
                    spawn(_train_rank, (key, ranks, meeting), ranks)
        path = key.path(folder)
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if ranks == 1:
            (kept,) = spool.iterdir()
            shutil.move(kept, path)
        else:
            shutil.copytree(spool, path)
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    return time.perf_counter() - started


def _train_rank(rank: int, key: Key, ranks: int, meeting: str) -> None:
    """One rank's part of a job, in a process of its own."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=ranks
    )
    try:
        with _silence():
            _train(key)
    finally:
        torch.distributed.destroy_process_group()


def _train(key: Key) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(key.seed)
    monitors: list[gradwatch.Monitor] = []

    def watch(model: Any, optimizer: Any, **_: object) -> gradwatch.Monitor:
        monitors.append(
            gradwatch.watch(model, optimizer, overhead_budget=0.0, detail_every=DETAIL_EVERY)
        )
        return monitors[-1]

    # Seeded by text, so that two scenarios of one seed vary apart.
    ZOO[key.name].train(watch, random.Random(f"{key.name} {key.seed}"))
    for monitor in monitors:
        monitor.finish()
    for monitor in monitors:
        if monitor.dropped:
            raise RuntimeError(f"{key}: frames were dropped: {dict(monitor.dropped)}")


def load(key: Key, folder: Path = FOLDER) -> Recording:
    """The frames of a job that was trained before."""
    if ZOO[key.name].ranks == 1:
        return read_spool(key.path(folder))
    return together([read_spool(each) for each in sorted(key.path(folder).iterdir())])


def judged(key: Key) -> Told:
    """When each kind was told of one kept job first."""
    return follow(load(key), at=[each.onset for each in ZOO[key.name].expected])


def in_parallel(
    make: Callable[[Key], T], keys: Sequence[Key], what: str, processes: int = 2
) -> Iterator[tuple[Key, T]]:
    """What `make` makes of each key, in processes, with a progress bar on standard error.

    Raises what `make` raised.
    """
    console = Console(file=sys.stderr)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(make, key): key for key in keys}
        for done in track(as_completed(running), what, len(keys), console=console):
            yield running[done], done.result()


def train_missing(
    seeds: int, processes: int = 2, again: bool = False, pattern: str = "*"
) -> list[Key]:
    """Train scenarios of such names with seeds 0 to seeds - 1, those that are kept left out."""
    keys = [Key(name, seed) for seed in range(seeds) for name in fnmatch.filter(ZOO, pattern)]
    missing = [key for key in keys if again or not key.path().exists()]
    if missing:
        for _ in in_parallel(train, missing, "Training", processes):
            pass
    return keys


@contextlib.contextmanager
def _environment(**values: str) -> Generator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _silence() -> contextlib.redirect_stderr[io.StringIO]:
    """The agent tells where it keeps each run: here that is told by the progress bar."""
    return contextlib.redirect_stderr(io.StringIO())
