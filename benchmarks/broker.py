"""What Celery's brokers keep when a worker is killed, and how soon a task starts on each.

Each broker gets a real worker (solo pool, acks_late, as the service runs it) in a process of its
own. Tasks append lines to a file; a worker is killed by SIGKILL and another is started.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradwatch_server.file_broker import POLL_S, SCHEME

START_DEADLINE_S = 30.0
# A task that did not come back by then is lost: Redis is set to give it back after 5 s.
LOST_AFTER_S = 15.0
VISIBILITY_S = 5
BURST_DEADLINE_S = 60.0
SENDERS = 4

# One module for worker and senders; where they meet comes by the environment.
MODULE = """
import json, os, sys, time
from celery import Celery
import gradwatch_server.file_broker

app = Celery("bench", broker=os.environ["BENCH_BROKER"])
app.conf.update(task_ignore_result=True, task_acks_late=True, task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1, broker_connection_retry_on_startup=True,
    broker_transport_options=json.loads(os.environ["BENCH_OPTIONS"]))

def note(*words):
    with open(os.environ["BENCH_LOG"], "a") as log:
        log.write(" ".join(map(str, words)) + "\\n")

@app.task(name="stamp")
def stamp(name, sent_at):
    note(name, time.time() - sent_at)

@app.task(name="hold")
def hold(name, flag, seconds):
    note(name, "began")
    while os.path.exists(flag):
        time.sleep(0.02)
    note(name, "done")

if __name__ == "__main__":
    for number in range(int(sys.argv[2])):
        stamp.delay(f"{sys.argv[1]}-{number}", time.time())
"""


@dataclass
class Outcome:
    """What one broker did. Seconds; None where the task was lost or the broker did not start."""

    broker: str
    start_median_s: float | None = None
    start_max_s: float | None = None
    burst_sent: int = 0
    burst_done: int = 0
    burst_s: float | None = None
    worker_survived_burst: bool | None = None
    killed_task_back_after_s: float | None = None
    waiting_sent: int = 0
    waiting_done: int = 0
    left_behind: int = 0


class Bench:
    """One broker with its worker, tasks and log."""

    def __init__(
        self, folder: Path, url: str, options: dict[str, Any], left: Callable[[], int]
    ) -> None:
        self.left_behind = left
        self._folder = folder
        self._log = folder / "log"
        self._log.touch()
        (folder / "bench_tasks.py").write_text(MODULE)
        self._environ = {
            **os.environ,
            "BENCH_BROKER": url,
            "BENCH_OPTIONS": json.dumps(options),
            "BENCH_LOG": str(self._log),
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "1",
        }
        self.worker: subprocess.Popen[bytes] | None = None

    def start_worker(self) -> None:
        with (self._folder / "worker.log").open("ab") as output:
            self.worker = subprocess.Popen(
                [
                    *(sys.executable, "-m", "celery", "--app", "bench_tasks", "worker"),
                    *("--pool", "solo", "--loglevel", "warning"),
                    *("--without-gossip", "--without-mingle", "--without-heartbeat"),
                ],
                env=self._environ,
                cwd=self._folder,
                stdout=output,
                stderr=output,
            )

    def kill_worker(self) -> None:
        if self.worker:
            self.worker.kill()
            self.worker.wait()

    def send(self, code: str) -> None:
        """Run a line of Python beside the tasks."""
        subprocess.run(
            [sys.executable, "-c", f"from bench_tasks import *\n{code}"],
            env=self._environ,
            cwd=self._folder,
            check=True,
            timeout=START_DEADLINE_S,
            stderr=subprocess.DEVNULL,
        )

    def sender(self, name: str, count: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "bench_tasks.py", name, str(count)]
        return subprocess.Popen(command, env=self._environ, cwd=self._folder)

    def lines(self, beginning: str) -> list[str]:
        return [line for line in self._log.read_text().splitlines() if line.startswith(beginning)]

    def wait_for(self, beginning: str, count: int, deadline_s: float) -> float | None:
        """Seconds until the log has so many lines; None when it does not in time."""
        began = time.monotonic()
        while time.monotonic() - began < deadline_s:
            if len(self.lines(beginning)) >= count:
                return time.monotonic() - began
            time.sleep(0.02)
        return None

    @contextmanager
    def flag(self, name: str) -> Generator[Path]:
        """A file that holds a task until it is removed."""
        path = self._folder / name
        path.touch()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def measure(name: str, bench: Bench, burst: int, tasks: int) -> Outcome:
    """All figures of one broker."""
    found = Outcome(name, burst_sent=burst, waiting_sent=tasks)
    bench.start_worker()
    bench.send("stamp.delay('first', time.time())")
    if bench.wait_for("first", 1, START_DEADLINE_S) is None:
        return found

    # Apart, so that each finds an idle worker.
    bench.send(
        f"for n in range({tasks}): stamp.delay(f'apart-{{n}}', time.time()); time.sleep(0.3)"
    )
    bench.wait_for("apart", tasks, START_DEADLINE_S)
    if waits := [float(line.split()[1]) for line in bench.lines("apart")]:
        found.start_median_s, found.start_max_s = statistics.median(waits), max(waits)

    began = time.monotonic()
    senders = [bench.sender(f"burst-{n}", burst // SENDERS) for n in range(SENDERS)]
    for sender in senders:
        sender.wait(BURST_DEADLINE_S)
    found.burst_sent = burst // SENDERS * SENDERS
    if bench.wait_for("burst", found.burst_sent, BURST_DEADLINE_S) is not None:
        found.burst_s = time.monotonic() - began
    found.burst_done = len({line.split()[0] for line in bench.lines("burst")})
    found.worker_survived_burst = bench.worker is not None and bench.worker.poll() is None

    bench.kill_worker()
    bench.start_worker()
    with bench.flag("held") as flag:
        bench.send(f"hold.delay('held', {str(flag)!r}, 1)")
        if bench.wait_for("held began", 1, START_DEADLINE_S) is not None:
            bench.send(f"for n in range({tasks}): stamp.delay(f'waiting-{{n}}', time.time())")
            bench.kill_worker()
            bench.start_worker()
            found.killed_task_back_after_s = bench.wait_for("held began", 2, LOST_AFTER_S)
    bench.wait_for("waiting", tasks, START_DEADLINE_S)
    found.waiting_done = len({line.split()[0] for line in bench.lines("waiting")})
    time.sleep(1)
    bench.kill_worker()
    found.left_behind = bench.left_behind()
    return found


@contextmanager
def files_of_kombu(folder: Path) -> Generator[Bench]:
    queue = folder / "queue"
    queue.mkdir()
    options = {"data_folder_in": str(queue), "data_folder_out": str(queue)}
    options |= {"control_folder": str(folder / "control"), "polling_interval": POLL_S}
    yield Bench(folder, "filesystem://", options, lambda: len(list(queue.glob("*.msg"))))


@contextmanager
def rows_of_sqlite(folder: Path) -> Generator[Bench]:
    import sqlite3

    path = folder / "broker.db"

    def rows() -> int:
        with sqlite3.connect(path) as connection:
            return connection.execute("SELECT count(*) FROM kombu_message").fetchone()[0]

    # It does not start with a polling interval set.
    yield Bench(folder, f"sqla+sqlite:///{path}", {}, rows)


@contextmanager
def files_of_ours(folder: Path) -> Generator[Bench]:
    queue = folder / "queue"
    options = {"folder": str(queue), "polling_interval": POLL_S}
    yield Bench(folder, f"{SCHEME}://", options, lambda: len(list(queue.rglob("*.*"))))


@contextmanager
def redis(folder: Path) -> Generator[Bench]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--dir", str(folder)]
    command += ["--save", "", "--appendonly", "no"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    options = {"visibility_timeout": VISIBILITY_S}
    options |= {"unacked_restore_interval": 1, "unacked_restore_throttle": 1}

    def messages() -> int:
        words = ["redis-cli", "-p", port, "llen", "celery"]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    try:
        yield Bench(folder, f"redis://127.0.0.1:{port}/0", options, messages)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


BROKERS = {
    "filesystem:// (kombu's)": files_of_kombu,
    "sqla+sqlite:// (kombu's)": rows_of_sqlite,
    f"{SCHEME}:// (ours)": files_of_ours,
    "redis://": redis,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--burst", type=int, default=400, help="tasks sent at once (default 400)")
    parser.add_argument("--tasks", type=int, default=10, help="tasks timed apart (default 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args()
    outcomes: list[Outcome] = []
    unmeasured: list[str] = []
    for number, (name, broker) in enumerate(BROKERS.items(), start=1):
        if broker is redis and not shutil.which("redis-server"):
            unmeasured.append(name)
            continue
        if not given.json:
            print(f"{number} of {len(BROKERS)}: {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder, broker(Path(folder)) as bench:
            try:
                outcomes.append(measure(name, bench, given.burst, given.tasks))
            finally:
                bench.kill_worker()
    if given.json:
        figures: dict[str, object] = {item.broker: asdict(item) for item in outcomes}
        print(json.dumps(figures | dict.fromkeys(unmeasured)))
        return
    columns = ("broker", "starts in (max)", "burst", "worker", "killed task", "waiting", "left")
    rows = [_row(item) for item in outcomes]
    rows += [[name, "not measured: no redis-server", *[""] * 5] for name in unmeasured]
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
    for row in [columns, *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print(
        f"\nKilled task: began again within {LOST_AFTER_S:g} s of a SIGKILL in its midst, or lost."
    )
    print(f"Waiting: of the tasks queued behind it. Redis: visibility_timeout {VISIBILITY_S} s.")


def _row(found: Outcome) -> list[str]:
    def seconds(value: float | None, otherwise: str) -> str:
        return otherwise if value is None or math.isnan(value) else f"{value:.2f} s"

    middle, largest = (seconds(v, "-") for v in (found.start_median_s, found.start_max_s))
    back = found.killed_task_back_after_s
    return [
        found.broker,
        f"{middle} ({largest})",
        f"{found.burst_done}/{found.burst_sent} in {seconds(found.burst_s, 'never')}",
        {True: "lives", False: "died", None: "-"}[found.worker_survived_burst],
        "lost" if back is None else f"after {back:.1f} s",
        f"{found.waiting_done}/{found.waiting_sent}",
        str(found.left_behind),
    ]


if __name__ == "__main__":
    main()
