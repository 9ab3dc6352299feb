"""Batches wait for one commit, in a queue that is bounded, and nothing stops the thread."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from synthetic_runs import dense, detail, healthy, manifest, new_run

from gradwatch.wire.codec import encode_batch
from gradwatch.wire.frame import Receipt
from gradwatch_server import writer as writing
from gradwatch_server.arrivals import arrive
from gradwatch_server.database import migrate, open_database
from gradwatch_server.ingest import UnknownRunError, introduce
from gradwatch_server.models import FrameRow
from gradwatch_server.writer import BusyError, Writer

AGENTS = 8


class BusyDatabase:
    """Keeps the writer waiting, as a database does that another process has locked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Event()
        self._free = threading.Event()
        store = writing.store

        def slow(*arguments: Any) -> Any:
            self.entered.set()
            assert self._free.wait(30)
            return store(*arguments)

        monkeypatch.setattr(writing, "store", slow)

    def free(self) -> None:
        self._free.set()


@pytest.fixture
def busy(monkeypatch):
    database = BusyDatabase(monkeypatch)
    yield database
    database.free()


def test_eight_agents_at_once_lose_nothing(collector):
    def train(number: int) -> str:
        run = new_run(name=f"agent {number}")
        collector.store(run, [manifest(dense(4))])
        for start in range(0, 200, 20):
            assert collector.post(run, healthy(range(start, start + 20))).receipt.stored == 20
        return run.id

    with ThreadPoolExecutor(AGENTS) as pool:
        runs = list(pool.map(train, range(AGENTS)))
    shown = {view.info.id: view for view in collector.client.runs().runs}
    assert {shown[run].optimizers[0].frames for run in runs} == {200}
    with Session(collector.engine) as session:
        assert session.scalar(select(func.count()).select_from(FrameRow)) == AGENTS * 200


def test_eight_ranks_of_one_run_lose_nothing(collector):
    run = new_run(world_size=AGENTS)

    def train(rank: int) -> None:
        collector.store(run, [manifest(dense(4), rank=rank)])
        for step in range(20):
            frame = msgspec.structs.replace(detail(step, [0.1] * 4), rank=rank)
            assert collector.post(run, [frame]).receipt.stored == 1

    with ThreadPoolExecutor(AGENTS) as pool:
        list(pool.map(train, range(AGENTS)))
    assert collector.client.run(run.id).optimizers[0].frames == AGENTS * 20


def test_a_full_queue_tells_agents_to_come_back(collector, busy, monkeypatch):
    run = new_run()
    collector.put(run)
    limit = 3
    monkeypatch.setattr(collector.app.state.context.writer._queue, "maxsize", limit)
    with ThreadPoolExecutor(limit + 1) as pool:
        first = pool.submit(collector.post, run, [manifest(dense(4))])
        assert busy.entered.wait(10)
        waiting = [pool.submit(collector.post, run, healthy([1])) for _ in range(limit)]
        while collector.app.state.context.writer.waiting < limit:
            pass
        answer = collector.post(run, healthy([2]))
        busy.free()
        assert answer.problem.status == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert first.result().status == 200
        assert {item.result().status for item in waiting} == {200}


@pytest.fixture
def engine(database_url):
    found = open_database(database_url)
    migrate(found)
    yield found
    found.dispose()


@pytest.fixture
def run(engine):
    info = new_run()
    with Session(engine) as session, session.begin():
        introduce(session, info)
    return info


def batch(*records: Any) -> Any:
    arrivals = arrive(encode_batch(records))
    assert not arrivals.rejected
    return arrivals.records


def test_one_bad_batch_spares_those_that_share_its_commit(engine, run, busy):
    writer = Writer(engine, [], lambda: None)
    first = writer.submit(run.id, batch(manifest(dense(4))))
    assert busy.entered.wait(10)
    unknown = writer.submit(new_run().id, batch(manifest(dense(4))))
    following = writer.submit(run.id, batch(*healthy([1])))
    busy.free()
    assert first.result(30) == Receipt(stored=0, repeated=0)
    assert following.result(30).stored == 1
    with pytest.raises(UnknownRunError):
        unknown.result(30)
    writer.close()


def test_an_agent_that_hangs_up_does_not_stop_the_writer(engine, run, busy):
    writer = Writer(engine, [], lambda: None)
    first = writer.submit(run.id, batch(manifest(dense(4))))
    assert busy.entered.wait(10)
    gone: Future[Receipt] = writer.submit(run.id, batch(*healthy([1])))
    assert gone.cancel()
    assert not first.cancel()
    busy.free()
    assert writer.submit(run.id, batch(*healthy([2]))).result(30).stored == 1
    writer.close()


def test_a_worker_that_cannot_be_woken_does_not_stop_the_writer(engine, run):
    def broken() -> None:
        raise RuntimeError("no broker")

    writer = Writer(engine, ["json://127.0.0.1:9"], broken)
    nan = batch(manifest(dense(2)), detail(1, [0.1, 0.1], broken=[1, 1]))
    assert writer.submit(run.id, nan).result(30).stored == 1
    assert writer.submit(run.id, batch(*healthy([2], layers=2))).result(30).stored == 1
    writer.close()


def test_closing_commits_what_was_taken(engine, run, busy):
    writer = Writer(engine, [], lambda: None)
    taken = [writer.submit(run.id, batch(manifest(dense(4))))]
    taken += [writer.submit(run.id, batch(*healthy([step]))) for step in range(20)]
    busy.free()
    writer.close()
    assert sum(item.result(0).stored for item in taken) == 20


def test_a_writer_of_a_full_queue_refuses_at_once(engine, run, busy, monkeypatch):
    monkeypatch.setattr(writing, "QUEUE_LIMIT", 1)
    writer = Writer(engine, [], lambda: None)
    writer.submit(run.id, batch(manifest(dense(4))))
    assert busy.entered.wait(10)
    writer.submit(run.id, batch(*healthy([1])))
    with pytest.raises(BusyError):
        writer.submit(run.id, batch(*healthy([2])))
    busy.free()
    writer.close()
