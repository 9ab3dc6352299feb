"""How a training script ends under `gradwatch run`, when it leaves a process group behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# A thread of the group's is in Python until the exit handlers let it go.
AT_EXIT = """
    import atexit, gc, threading, time

    held, ending = threading.Event(), threading.Event()

    def hold(future):
        if threading.current_thread() is not threading.main_thread():
            held.set()
            ending.wait()

    def let_go():
        ending.set()
        time.sleep(0.5)  # for what is left to do in that thread

    atexit.register(let_go)
    atexit.register(gc.collect)  # before that: what is in a circle goes now, if it may
"""
# Nothing in here is referred to from elsewhere, as a function that is an exit handler would be.
SCRIPT = """
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    import at_exit

    torch.set_num_threads(1)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    model = DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    while not at_exit.held.wait(0.02):
        # Called in the group's thread, unless the work is done already.
        work = torch.distributed.all_reduce(torch.ones(1), async_op=True)
        work.get_future().then(at_exit.hold)
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_process_group_that_a_script_leaves_lives_until_its_exit_handlers_are_done(
    tmp_path: Path,
) -> None:
    """The end of the group waits for its threads with Python's lock held: for ever, if one of them
    waits for that lock."""
    for name, source in (("at_exit.py", AT_EXIT), ("train.py", SCRIPT)):
        (tmp_path / name).write_text(textwrap.dedent(source))
    done = subprocess.run(
        [sys.executable, "-m", "gradwatch", "run", str(tmp_path / "train.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
