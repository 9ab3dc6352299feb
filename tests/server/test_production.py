"""Celery for real: workers, beats and Redis are killed, and the work is done nevertheless."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.orm import Session
from synthetic_runs import dense, detail, healthy, manifest, new_run, vanishing

from gradwatch.client import Client
from gradwatch.transport import Transport, Verdict
from gradwatch.wire.codec import encode_batch
from gradwatch.wire.frame import RunInfo
from gradwatch_server import leases
from gradwatch_server.beat import LEASE
from gradwatch_server.database import migrate, open_database, writing
from gradwatch_server.file_broker import SCHEME
from gradwatch_server.models import Alert, FindingRow, FrameRow, Run

pytestmark = pytest.mark.slow

CELERY = [sys.executable, "-m", "celery", "--app", "gradwatch_server.tasks"]
WORKER = [*CELERY, "worker", "--loglevel", "info"]
LEASED = ["--scheduler", "gradwatch_server.beat:LeasedScheduler", "--pidfile=", "--loglevel=info"]
# "no tick twice" is said of each message: its task, and the number that the beat gave it.
RECEIVED = re.compile(r"Task (\S+)\[(\S+/\d+)\] received")


class Cluster:
    """Processes over one database and one broker."""

    def __init__(self, folder: Path, database: str, broker: str, **settings: str) -> None:
        self.engine: Engine = open_database(database)
        migrate(self.engine)
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environ = os.environ | {
            "GRADWATCH_DATABASE_URL": database,
            "GRADWATCH_BROKER_URL": broker,
            "GRADWATCH_DATA_DIR": str(folder),
            "GRADWATCH_JUDGE_EVERY_S": "0.5",
            "GRADWATCH_NOTIFY_LOCAL": "allow",
            "OMP_NUM_THREADS": "1",
            **settings,
        }

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with self.log(name).open("ab") as output:
            process = subprocess.Popen(
                command,
                env=self._environ,
                cwd=self._folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def worker(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        return self.start(name, [*WORKER, "--hostname", f"{name}@here", *options])

    def beat(self, name: str) -> subprocess.Popen[bytes]:
        return self.start(name, [*CELERY, "beat", *LEASED])

    def collector(self, name: str, port: int) -> str:
        self.start(name, [sys.executable, "-m", "gradwatch_server", "--port", str(port)])
        return f"http://127.0.0.1:{port}"

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def said(self, name: str, words: str) -> bool:
        path = self.log(name)
        return path.exists() and words in path.read_text()

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                kill(process)
        self.engine.dispose()
        # Shown by pytest where a test fails.
        for path in self._folder.glob("*.log"):
            print(f"== {path.name}\n{path.read_text()[-3000:]}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and the children that it has forked."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


StartCluster = Callable[..., Cluster]


@pytest.fixture
def start_cluster(tmp_path: Path) -> Generator[StartCluster]:
    made: list[Cluster] = []

    def start(database: str, broker: str, **settings: str) -> Cluster:
        made.append(Cluster(tmp_path, database, broker, **settings))
        return made[-1]

    yield start
    for cluster in made:
        cluster.stop()


@pytest.fixture
def production(start_cluster: StartCluster, postgres: Any, redis: Any) -> Callable[..., Cluster]:
    """PostgreSQL and Redis."""
    return lambda **settings: start_cluster(postgres.new_database(), redis.url, **settings)


@pytest.fixture(params=["files", "redis"])
def cluster_of(request: pytest.FixtureRequest, start_cluster: StartCluster, tmp_path: Path) -> Any:
    """One machine without a server, and production."""
    if request.param == "redis":
        return request.getfixturevalue("production")
    # No URL at all: what `gradwatch up` has.
    return lambda **settings: start_cluster(f"sqlite:///{tmp_path / 'g.db'}", "", **settings)


def send(url: str, run: RunInfo, records: list[Any]) -> None:
    """As an agent does: again and again until it is stored."""
    transport = Transport(url)
    for deliver in (
        lambda: transport.introduce(run),
        lambda: transport.deliver(run.id, encode_batch(records)),
    ):
        deadline = time.monotonic() + 60
        while (outcome := deliver()).verdict is not Verdict.STORED:
            assert outcome.verdict is Verdict.RETRY, outcome
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert outcome.rejected == 0


def rows(engine: Engine, kind: type[Any]) -> list[Any]:
    with Session(engine, expire_on_commit=False) as session:
        return list(session.scalars(select(kind)))


def test_an_alert_whose_worker_is_killed_while_it_sends_arrives_nevertheless(
    cluster_of: Any, webhook: Any, free_port: Any, wait_until: Any
) -> None:
    cluster: Cluster = cluster_of(GRADWATCH_NOTIFY=webhook.url)
    url = cluster.collector("collector", free_port())
    webhook.hold = threading.Event()
    first = cluster.worker("first", "--pool", "solo")
    cluster.beat("beat")
    lost = detail(3, [0.01] * 4, broken=1)
    send(url, new_run(), [manifest(dense(4)), *healthy(range(3)), lost])
    wait_until(lambda: webhook.received, "the first attempt")
    kill(first)
    webhook.hold.set()
    (alert,) = rows(cluster.engine, Alert)
    assert (alert.state, alert.attempts) == ("pending", 1)
    # The lease of the dead ends; nobody waits for that in a test.
    with writing(cluster.engine) as session:
        session.execute(update(Alert).values(next_try_at=0.0))
    cluster.worker("second", "--pool", "solo")
    wait_until(lambda: rows(cluster.engine, Alert)[0].state == "sent", "the second attempt")
    (alert,) = rows(cluster.engine, Alert)
    assert alert.attempts == 2
    assert len(webhook.received) == 2


def test_a_run_whose_worker_is_killed_in_the_midst_of_judging_is_judged_nevertheless(
    production: Any, free_port: Any, wait_until: Any
) -> None:
    cluster: Cluster = production()
    url, run = cluster.collector("collector", free_port()), new_run()
    send(url, run, [manifest(dense(10)), *vanishing(range(60))])
    taken = select(Run.leased_until).where(Run.key == run.id)
    with Session(cluster.engine) as blocker:
        # Findings cannot be inserted: the worker has judged, and waits to write.
        blocker.execute(text("LOCK TABLE findings IN SHARE MODE"))
        first = cluster.worker("first", "--concurrency", "2")
        cluster.beat("beat")

        def judging() -> bool:
            with Session(cluster.engine) as session:
                waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
                return session.scalar(taken) > 0 and session.scalar(text(waiting)) > 0

        wait_until(judging, "a worker in the midst of it")
        kill(first)
        blocker.rollback()
    assert not rows(cluster.engine, FindingRow)
    with writing(cluster.engine) as session:
        session.execute(update(Run).values(leased_until=0.0))
    cluster.worker("second", "--concurrency", "2")
    wait_until(lambda: Client(url).run(run.id).judged, "the judgement by another worker")
    assert [finding.kind for finding in rows(cluster.engine, FindingRow)] == ["vanishing"]


def test_a_forked_child_that_is_killed_is_replaced_and_its_work_done(
    production: Any, webhook: Any, free_port: Any, wait_until: Any
) -> None:
    cluster: Cluster = production(GRADWATCH_NOTIFY=webhook.url)
    url = cluster.collector("collector", free_port())
    webhook.hold = threading.Event()
    worker = cluster.worker("worker", "--concurrency", "1")
    cluster.beat("beat")
    send(url, new_run(), [manifest(dense(4)), detail(0, [0.01] * 4, broken=1)])
    wait_until(lambda: webhook.received, "the first attempt")
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
    webhook.hold.set()
    with writing(cluster.engine) as session:
        session.execute(update(Alert).values(next_try_at=0.0))
    wait_until(lambda: rows(cluster.engine, Alert)[0].state == "sent", "the second attempt")
    assert worker.poll() is None


def test_redis_that_is_restarted_in_the_midst_costs_ticks_and_no_work(
    production: Any, redis: Any, webhook: Any, free_port: Any, wait_until: Any
) -> None:
    cluster: Cluster = production(GRADWATCH_NOTIFY=webhook.url)
    url = cluster.collector("collector", free_port())
    worker = cluster.worker("worker", "--concurrency", "2")
    beat = cluster.beat("beat")
    client, before, meanwhile, after = Client(url), new_run(), new_run(), new_run()
    faulty = [manifest(dense(10)), *vanishing(range(60))]
    webhook.hold = threading.Event()
    send(url, before, faulty)
    wait_until(lambda: webhook.received, "a worker that is sending")
    redis.stop()
    # Taken at once: the collector does not need the broker.
    send(url, meanwhile, [*faulty, detail(60, [0.01] * 10, broken=1)])
    webhook.hold.set()
    webhook.hold = None
    time.sleep(1)
    redis.start()
    send(url, after, faulty)
    for run in (before, meanwhile, after):
        wait_until(lambda run=run: client.run(run.id).judged, "a judgement after the restart")
    assert len({finding.run_id for finding in rows(cluster.engine, FindingRow)}) == 3

    def sent() -> bool:
        alerts = rows(cluster.engine, Alert)
        return len(alerts) >= 4 and all(alert.state == "sent" for alert in alerts)

    wait_until(sent, "all alerts")
    assert len(webhook.received) == len(rows(cluster.engine, Alert))
    assert (worker.poll(), beat.poll()) == (None, None), "one of them did not live through it"


def test_one_beat_ticks_another_takes_over_and_no_tick_is_sent_twice(
    production: Any, wait_until: Any
) -> None:
    cluster: Cluster = production()
    workers = ["worker-0", "worker-1"]
    for name in workers:
        cluster.worker(name, "--pool", "solo")
    beats = {name: cluster.beat(name) for name in ("beat-0", "beat-1")}

    def ticks() -> Counter[tuple[str, str]]:
        found = (RECEIVED.findall(cluster.log(name).read_text()) for name in workers)
        return Counter(tick for ticks in found for tick in ticks)

    wait_until(lambda: len(ticks()) >= 10, "ten ticks")
    wait_until(
        lambda: any(cluster.said(name, "standing by") for name in beats), "a beat that stands by"
    )
    (ticking,) = [name for name in beats if cluster.said(name, "this beat ticks now")]
    (idle,) = beats.keys() - {ticking}
    assert not cluster.said(idle, "Sending due task")
    holder = leases.holder_of(cluster.engine, LEASE)

    kill(beats[ticking])
    killed_at = time.monotonic()
    before = len(ticks())
    wait_until(lambda: cluster.said(idle, "Sending due task"), "the second beat's first tick", 60)
    assert time.monotonic() - killed_at < 60
    assert leases.holder_of(cluster.engine, LEASE) not in (None, holder)
    wait_until(lambda: len(ticks()) >= before + 6, "ticks of the second beat")
    assert set(ticks().values()) == {1}
    # A beat that ends in order is followed at once, not when its lease ends.
    third = "beat-2"
    cluster.beat(third)
    wait_until(lambda: cluster.said(third, "standing by"), "a third beat")
    beats[idle].terminate()
    wait_until(lambda: cluster.said(third, "this beat ticks now"), "its turn", 8)
    wait_until(lambda: cluster.said(third, "Sending due task"), "its tick")
    time.sleep(1)
    assert set(ticks().values()) == {1}


def test_several_collectors_and_workers_at_once_store_judge_and_tell_once(
    production: Any, webhook: Any, free_port: Any, wait_until: Any
) -> None:
    cluster: Cluster = production(GRADWATCH_NOTIFY=webhook.url)
    urls = [cluster.collector(f"collector-{n}", free_port()) for n in range(2)]
    for number in range(2):
        cluster.worker(f"worker-{number}", "--concurrency", "2")
        cluster.beat(f"beat-{number}")
    runs = [new_run() for _ in range(4)]
    batches = [vanishing(range(start, start + 15)) for start in range(0, 60, 15)]

    def feed(run: RunInfo, first: int) -> None:
        # Each batch goes to both collectors, as it does when an answer was lost.
        for number, frames in enumerate(batches):
            for url in (urls[(first + number) % 2], urls[(first + number + 1) % 2]):
                send(url, run, [manifest(dense(10)), *frames])

    feeders = [threading.Thread(target=feed, args=(run, number)) for number, run in enumerate(runs)]
    for feeder in feeders:
        feeder.start()
    for feeder in feeders:
        feeder.join(60)
        assert not feeder.is_alive()
    clients = [Client(url) for url in urls]
    for run in runs:
        for client in clients:
            wait_until(lambda run=run, client=client: client.run(run.id).judged, "judgements")
            assert [finding.kind for finding in client.findings(run.id)] == ["vanishing"]
    with Session(cluster.engine) as session:
        assert session.scalar(select(func.count()).select_from(FrameRow)) == 60 * len(runs)
    wait_until(lambda: len(webhook.received) >= len(runs), "the alerts")
    time.sleep(1)
    told = Counter(
        message["message"].split("Run: ")[1].split("\n")[0] for message in webhook.received
    )
    assert len(told) == len(runs)
    assert set(told.values()) == {1}


FORK = """
import os, sys
from celery.signals import worker_process_init
from gradwatch_server import tasks
parents = tasks._engine()
with parents.connect():
    pass
if os.fork() == 0:
    worker_process_init.send(sender=None)
    mine = tasks._engine()
    with mine.connect():
        pass
    os._exit(0 if mine is not parents and mine is tasks._engine() else 1)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_process_that_a_worker_forks_has_an_engine_of_its_own(tmp_path: Path) -> None:
    environ = os.environ | {"GRADWATCH_DATA_DIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", FORK], env=environ).returncode == 0


def test_the_broker_without_a_server_is_the_default() -> None:
    from gradwatch_server.settings import Settings
    from gradwatch_server.tasks import make_celery

    assert make_celery(Settings()).conf.broker_url == f"{SCHEME}://"
