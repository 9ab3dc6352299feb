"""Who this process is within a training job: run, rank and world size, without any collective."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# What launchers set for every process: torchrun, Slurm, Open MPI. First found wins.
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
WORLD_VARIABLES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


class Identity(NamedTuple):
    """This process's place in its job."""

    run: str
    rank: int
    world_size: int


def identify(
    run_id: str = "", environ: Mapping[str, str] = os.environ, earlier_runs: int = 0
) -> Identity:
    """The identity of this process. All ranks of one launch get the same run.

    earlier_runs: how many runs this process has recorded before; the same on every rank.
    A launch on several machines is told apart by its rendezvous id (torchrun --rdzv-id) or its
    Slurm job; where there is none, set GRADWATCH_RUN_ID to the same value on every rank.
    """
    rank = _first_int(environ, RANK_VARIABLES, 0)
    world_size = max(1, _first_int(environ, WORLD_VARIABLES, 1))
    if run_id and not earlier_runs:
        return Identity(run_id, rank, world_size)
    if world_size == 1 and not run_id:
        return Identity(uuid.uuid4().hex, 0, 1)
    launch = (
        [run_id]
        if run_id
        else [
            environ.get(name, "")
            for name in (
                "TORCHELASTIC_RUN_ID",
                "TORCHELASTIC_RESTART_COUNT",
                "MASTER_ADDR",
                "MASTER_PORT",
                "SLURM_JOB_ID",
                "SLURM_STEP_ID",
            )
        ]
    )
    if earlier_runs:
        launch.append(str(earlier_runs))
    one_machine = environ.get("MASTER_ADDR", "") in LOOPBACK or not any(launch)
    if not run_id and (one_machine or _first_int(environ, ("LOCAL_WORLD_SIZE",), 0) == world_size):
        # On one machine the launcher is every rank's parent, and no two launches share it.
        launch.append(f"{os.getppid()}@{_started(os.getppid())}")
    return Identity(hashlib.sha256("\0".join(launch).encode()).hexdigest()[:32], rank, world_size)


def _first_int(environ: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    for name in names:
        text = environ.get(name, "")
        if text.isdigit():
            return int(text)
    return default


def _started(pid: int) -> str:
    """When a process started, in clock ticks, where the system tells; process ids come again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""
