"""Agents that send without pause to a collector that is killed at random, and what came of it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Engine, Select, select, update
from sqlalchemy.orm import Session
from synthetic_runs import dense, detail, manifest, new_run

from collector_process import CollectorProcess
from gradwatch.transport import Outcome, Transport, Verdict
from gradwatch.wire.codec import encode_batch, encode_record
from gradwatch.wire.frame import RunInfo
from gradwatch_server.database import open_database, writing
from gradwatch_server.folding import fold_due
from gradwatch_server.merge import MERGED
from gradwatch_server.models import FrameRow, Optimizer, Run, Stretch, StretchDue
from gradwatch_server.packing import digest
from gradwatch_server.tiers import stretch_steps, unpack_columns

LAYERS = 20
FRAMES_A_BATCH = 10
# The ranks of each run.
WORLDS = (1, 1, 2)
PROGRESS_DEADLINE_S = 120.0
FOLDING = """
import os, sys
from gradwatch_server.database import open_database
from gradwatch_server.folding import fold_due
engine = open_database(os.environ["GRADWATCH_DATABASE_URL"])
while True:
    try:
        fold_due(engine, 1.0)
    except Exception as error:
        print(error, file=sys.stderr)
"""


class Counts(NamedTuple):
    """What came of it."""

    kills: int
    batches: int
    retries: int  # of requests: no answer, or told to come back
    acknowledged: int  # frames
    missing: int  # acknowledged and not stored
    altered: int  # stored with other content than was sent
    double: int  # counted more than once
    unmerged: int  # steps of which all ranks were stored, without exactly one merged frame
    folded: int  # stretches
    misfolded: int  # stretches that do not hold each of their frames once


class Agent(threading.Thread):
    """One rank of a run: sends batch after batch, each until it is acknowledged."""

    def __init__(self, url: str, run: RunInfo, rank: int) -> None:
        super().__init__(daemon=True)
        self.run_info = run
        self.rank = rank
        self.acknowledged: dict[int, bytes] = {}
        self.batches = 0
        self.retries = 0
        self.refused: Outcome | None = None
        self.enough = threading.Event()
        self._transport = Transport(url)

    def run(self) -> None:
        layers = encode_batch([manifest(dense(LAYERS), rank=self.rank)])
        self._until_stored(lambda: self._transport.introduce(self.run_info))
        self._until_stored(lambda: self._deliver(layers))
        step = 0
        while not self.enough.is_set() and self.refused is None:
            frames = {
                number: detail(number, [0.01 + number] * LAYERS, rank=self.rank)
                for number in range(step, step + FRAMES_A_BATCH)
            }
            body = encode_batch(list(frames.values()))
            self._until_stored(lambda body=body: self._deliver(body))
            self.acknowledged |= {
                number: digest(encode_record(frame)) for number, frame in frames.items()
            }
            self.batches += 1
            step += FRAMES_A_BATCH

    def _deliver(self, body: bytes) -> Outcome:
        return self._transport.deliver(self.run_info.id, body)

    def _until_stored(self, send: Callable[[], Outcome]) -> None:
        while (outcome := send()).verdict is not Verdict.STORED:
            if outcome.verdict is not Verdict.RETRY:
                self.refused = outcome
                return
            self.retries += 1
            time.sleep(0.02)


def kill_at_random(
    database_url: str, folder: Path, kills: int, seed: int, on_kill: Callable[[], None]
) -> Counts:
    """Kill the collector so often while agents send and a worker, killed with it, folds.

    Most kills come once every agent has had an answer, some while the collector is starting.
    Raises RuntimeError when an agent is refused, or nothing goes on.
    """
    chance = random.Random(seed)
    with CollectorProcess(database_url, folder) as collector:
        collector.wait_ready()
        runs = [new_run(world_size=ranks) for ranks in WORLDS]
        agents = [Agent(collector.url, run, rank) for run in runs for rank in range(run.world_size)]
        for agent in agents:
            agent.start()
        worker = _fold_on(database_url, folder)
        try:
            for _ in range(kills):
                if chance.random() < 0.8:
                    _wait_for_progress(agents, collector)
                time.sleep(chance.uniform(0, 0.5))
                collector.kill()
                worker.kill()
                worker.wait()
                on_kill()
                collector.start()
                worker = _fold_on(database_url, folder)
            _wait_for_progress(agents, collector)
            for agent in agents:
                agent.enough.set()
            for agent in agents:
                agent.join(PROGRESS_DEADLINE_S)
                if agent.is_alive():
                    raise RuntimeError(f"an agent gets no answer:\n{collector.log.read_text()}")
        finally:
            worker.kill()
            worker.wait()
    engine = open_database(database_url)
    try:
        return _count(engine, agents, kills)
    finally:
        engine.dispose()


def _fold_on(database_url: str, folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "worker.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", FOLDING],
            env=os.environ | {"GRADWATCH_DATABASE_URL": database_url},
            stderr=output,
        )


def _wait_for_progress(agents: list[Agent], collector: CollectorProcess) -> None:
    before = [agent.batches for agent in agents]
    deadline = time.monotonic() + PROGRESS_DEADLINE_S
    while any(agent.batches <= seen for agent, seen in zip(agents, before, strict=True)):
        refused = [agent.refused for agent in agents if agent.refused]
        if refused or time.monotonic() > deadline:
            raise RuntimeError(f"refused: {refused}\n{collector.log.read_text()}")
        time.sleep(0.01)


def _count(engine: Engine, agents: list[Agent], kills: int) -> Counts:
    with writing(engine) as session:
        # What a killed worker had claimed is not to be waited for here.
        session.execute(update(StretchDue).values(leased_until=0.0))
    while fold_due(engine, PROGRESS_DEADLINE_S):
        pass
    missing = altered = double = unmerged = folded = misfolded = 0
    with Session(engine) as session:
        for agent in agents:
            rows = session.execute(
                _frames_of(agent.run_info.id).where(FrameRow.rank == agent.rank)
            ).all()
            stored = {row.step: row.digest for row in rows}
            sent = agent.acknowledged
            missing += len(sent.keys() - stored.keys())
            altered += sum(stored[step] != sent[step] for step in sent.keys() & stored.keys())
            double += len(rows) - len(stored)
        for run in {agent.run_info.id: agent.run_info for agent in agents}.values():
            own = [agent for agent in agents if agent.run_info is run]
            optimizer = session.scalars(select(Optimizer).join(Run).where(Run.key == run.id)).one()
            sent = sum(len(agent.acknowledged) for agent in own)
            double += max(0, optimizer.frames - sent)
            missing += max(0, sent - optimizer.frames)
            speaking = session.execute(
                _frames_of(run.id).where(FrameRow.rank == optimizer.speaker)
            ).all()
            if optimizer.speaker == MERGED:
                whole = set.intersection(*(set(agent.acknowledged) for agent in own))
                steps = [row.step for row in speaking]
                unmerged += len(whole - set(steps)) + len(steps) - len(set(steps))
            told = {row.step for row in speaking}
            for row in session.scalars(
                select(Stretch).where(Stretch.optimizer_id == optimizer.id, Stretch.tier == 1)
            ):
                folded += 1
                inside = sum(row.start <= step < row.start + stretch_steps(1) for step in told)
                finite = unpack_columns(row.body).statistics["norm"].finite
                misfolded += bool((finite.sum(axis=0) != inside).any())
    return Counts(
        kills,
        sum(agent.batches for agent in agents),
        sum(agent.retries for agent in agents),
        sum(len(agent.acknowledged) for agent in agents),
        missing,
        altered,
        double,
        unmerged,
        folded,
        misfolded,
    )


def _frames_of(run_key: str) -> Select[int, bytes]:
    return (
        select(FrameRow.step, FrameRow.digest)
        .join(Optimizer, FrameRow.optimizer_id == Optimizer.id)
        .join(Run, Optimizer.run_id == Run.id)
        .where(Run.key == run_key)
    )
