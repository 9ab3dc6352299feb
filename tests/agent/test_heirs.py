"""Processes that a script starts under `gradwatch run` are watched as the script itself is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradwatch.wire.frame import Frame, Record, RunEnd

SCRIPT = """
import sys
import torch
import torch.multiprocessing as mp


def train(rank, lr, fail):
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    if fail:
        raise ValueError("no more data")
    sys.exit(0)


if __name__ == "__main__":
    how, fail = sys.argv[1], sys.argv[2] == "fail"
    context = mp.get_context(how)
    processes = [context.Process(target=train, args=(rank, 0.01, fail)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print([process.exitcode for process in processes])
"""


def ran(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "gradwatch", "run", "--overhead-budget", "0", str(script)]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
def test_processes_that_a_script_starts_are_recorded_to_their_end(
    how: str, tmp_path: Path, kept: Callable[[], list[Record]]
) -> None:
    ended = ran(tmp_path, how, "succeed")
    assert ended.stdout == "[0, 0]\n", ended.stderr
    assert "nothing was recorded" not in ended.stderr
    steps = sorted(record.step for record in kept() if isinstance(record, Frame))
    assert steps == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [end.status for end in kept() if isinstance(end, RunEnd)] == ["finished"] * 2


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_processes_that_fail_are_recorded_as_failed(
    how: str, tmp_path: Path, kept: Callable[[], list[Record]]
) -> None:
    ended = ran(tmp_path, how, "fail")
    assert ended.stdout == "[1, 1]\n", ended.stderr
    ends = [record for record in kept() if isinstance(record, RunEnd)]
    assert [end.status for end in ends] == ["failed"] * 2
    assert {end.reason for end in ends} == {"ValueError: no more data"}


DATA_SCRIPT = """
import sys

from torch.utils.data import DataLoader, Dataset


class Data(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, place):
        return int("gradwatch" in sys.modules)


if __name__ == "__main__":
    from gradwatch.heirs import hand_on, heirs

    hand_on()
    loader = DataLoader(Data(), num_workers=1, multiprocessing_context="spawn")
    print([int(item) for item in loader], heirs())
"""


def test_workers_that_load_data_are_left_alone(tmp_path: Path) -> None:
    script = tmp_path / "load.py"
    script.write_text(DATA_SCRIPT)
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.stdout == "[0, 0] 0\n", ended.stderr
