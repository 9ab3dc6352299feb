"""A collector killed at any instant loses nothing that it acknowledged, and keeps nothing twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from synthetic_runs import dense, detail, manifest, new_run

from gradwatch.transport import Transport, Verdict
from gradwatch.wire.codec import encode_batch, encode_record
from gradwatch.wire.frame import RunInfo
from gradwatch_server.database import open_database
from gradwatch_server.models import FrameRow, Optimizer, Run
from gradwatch_server.packing import digest

pytestmark = pytest.mark.slow

AGENTS = 4
KILLS = 4
FRAMES_A_BATCH = 10


class Agent(threading.Thread):
    """Sends batch after batch, each until it is acknowledged."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.run_info: RunInfo = new_run()
        self.acknowledged: dict[int, bytes] = {}
        self.retries = 0
        self.enough = threading.Event()
        self._transport = Transport(url)

    def run(self) -> None:
        self._until_stored(lambda: self._transport.introduce(self.run_info))
        first = encode_batch([manifest(dense(20))])
        self._until_stored(lambda: self._transport.deliver(self.run_info.id, first))
        step = 0
        while not self.enough.is_set():
            steps = range(step, step + FRAMES_A_BATCH)
            frames = {number: detail(number, [0.01 + number] * 20) for number in steps}
            body = encode_batch(list(frames.values()))
            self._until_stored(lambda body=body: self._transport.deliver(self.run_info.id, body))
            self.acknowledged |= {
                number: digest(encode_record(item)) for number, item in frames.items()
            }
            step += FRAMES_A_BATCH

    def _until_stored(self, send: Any) -> None:
        while (outcome := send()).verdict is not Verdict.STORED:
            assert outcome.verdict is Verdict.RETRY, outcome
            self.retries += 1
            time.sleep(0.02)
        assert outcome.rejected == 0


def start(url: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "gradwatch_server", "--port", str(port)],
            env=os.environ | {"GRADWATCH_DATABASE_URL": url},
            stdout=output,
            stderr=output,
        )


def test_no_acknowledged_frame_is_missing_and_none_is_double(
    database_url, tmp_path, free_port, wait_until
):
    port, log = free_port(), tmp_path / "collector.log"
    agents = [Agent(f"http://127.0.0.1:{port}") for _ in range(AGENTS)]
    collector = start(database_url, port, log)
    chance = random.Random(8)
    try:
        for agent in agents:
            agent.start()
        for _ in range(KILLS):
            before = [len(agent.acknowledged) for agent in agents]
            wait_until(
                lambda before=before: all(
                    len(agent.acknowledged) > seen
                    for agent, seen in zip(agents, before, strict=True)
                ),
                "progress of all agents",
            )
            time.sleep(chance.uniform(0, 0.3))
            collector.send_signal(signal.SIGKILL)
            collector.wait()
            collector = start(database_url, port, log)
        for agent in agents:
            agent.enough.set()
        for agent in agents:
            agent.join(60)
            assert not agent.is_alive(), log.read_text()
    finally:
        collector.terminate()
        collector.wait()

    engine = open_database(database_url)
    with Session(engine) as session:
        for agent in agents:
            rows = session.execute(
                select(FrameRow.step, FrameRow.digest)
                .join(Optimizer, FrameRow.optimizer_id == Optimizer.id)
                .join(Run, Optimizer.run_id == Run.id)
                .where(Run.key == agent.run_info.id)
            ).all()
            assert len(rows) == len(agent.acknowledged) > 0
            assert {row.step: row.digest for row in rows} == agent.acknowledged
            counted = session.scalar(
                select(Optimizer.frames).join(Run).where(Run.key == agent.run_info.id)
            )
            assert counted == len(rows)
    engine.dispose()
    assert sum(agent.retries for agent in agents) > 0
