"""Jobs of several ranks over gloo, from their steps to the findings of a collector."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from gradwatch_server.models import Run
from gradwatch_server.ranks import merge_due
from gradwatch_server.rules import read_rules
from gradwatch_server.stalls import judge_silence

SCRIPT = Path(__file__).parents[1] / "support" / "ranks_job.py"
pytestmark = pytest.mark.slow


def start(collector: Any, fault: str, ranks: int, spool: Path) -> subprocess.Popen[str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("GRADWATCH_")}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), str(SCRIPT)),
        ],
        env={
            **kept,
            "FAULT": fault,
            "GRADWATCH_URL": collector.url,
            "GRADWATCH_SPOOL": str(spool),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def judged(collector: Any, fault: str, ranks: int, spool: Path) -> dict[str, Any]:
    """The findings of a job that ran to its end, by kind."""
    process = start(collector, fault, ranks, spool)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    merge_due(collector.engine, timeout_s=-1.0)
    collector.judge()
    (run,) = collector.client.runs().runs
    assert run.info.world_size == ranks
    return {finding.kind: finding for finding in run.findings}


def test_norms_that_one_optimizer_alone_updates_are_named_with_its_rank(collector, tmp_path):
    found = judged(collector, "norms", 3, tmp_path)
    assert set(found) == {"rank_drift"}
    drift = found["rank_drift"]
    assert (drift.state, drift.severity, drift.first_step) == ("open", "critical", 2)
    assert set(drift.layers) == {"1.weight", "1.bias"}
    assert drift.evidence["rank that stands apart"] == 0


def test_a_rank_that_lags_is_named(collector, tmp_path):
    found = judged(collector, "sleeps", 2, tmp_path)
    assert set(found) == {"straggler"}
    assert found["straggler"].evidence["slow rank"] == 1
    assert found["straggler"].first_step in (20, 40)


def test_a_healthy_job_has_neither(collector, tmp_path):
    assert judged(collector, "healthy", 2, tmp_path) == {}


def test_a_job_that_is_killed_is_told_though_nothing_says_so(collector, tmp_path):
    process = start(collector, "hangs", 1, tmp_path)
    assert process.stdout is not None
    deadline = time.monotonic() + 200
    while "hangs" not in process.stdout.readline():
        assert process.poll() is None
        assert time.monotonic() < deadline
    while not heard(collector):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kill(process)
    rules = read_rules("[stalled_run]\nafter_s = 0.5\npauses = 1")
    while not judge_silence(collector.engine, [], rules):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (run,) = collector.client.runs().runs
    (finding,) = [each for each in run.findings if each.kind == "stalled_run"]
    assert (run.status, finding.state) == ("running", "open")
    assert finding.first_step >= 1


def kill(process: subprocess.Popen[str]) -> None:
    """A launcher and its ranks, each of which is the leader of a session of its own."""
    listed = [
        path.read_text().split() for path in Path(f"/proc/{process.pid}/task").glob("*/children")
    ]
    for rank in (int(each) for some in listed for each in some):
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, 9)
    os.killpg(process.pid, 9)
    process.wait()


def heard(collector: Any) -> bool:
    with Session(collector.engine) as session:
        return any(session.scalars(select(Run.heard_at)))
