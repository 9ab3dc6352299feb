"""`gradwatch up` as a user starts it: the real command, its processes and its signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import dense, manifest, new_run, vanishing

from gradwatch.client import Client
from gradwatch.transport import Transport, Verdict
from gradwatch.wire.codec import encode_batch

pytestmark = pytest.mark.slow

UP = [sys.executable, "-m", "gradwatch", "up"]


class Service:
    """A running `gradwatch up`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, log: Path) -> None:
        self.process = process
        self.folder = folder
        self.log = log

    @property
    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return (self.folder / "addresses.json").exists()

    @property
    def addresses(self) -> dict[str, str]:
        return json.loads((self.folder / "addresses.json").read_text())

    def parts(self) -> dict[str, int]:
        """Pid of each part that is alive, by what its command line says."""
        words = {"gradwatch_server": "collector", "streamlit": "dashboard"}
        words |= {"worker": "worker", "beat": "beat"}
        found: dict[str, int] = {}
        for pid in of_folder(self.folder):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            for word, name in words.items():
                if word in command and pid != self.process.pid:
                    found[name] = pid
        return found


def of_folder(folder: Path) -> list[int]:
    """Pids of processes that were started for this data folder."""
    mark = f"GRADWATCH_DATA_DIR={folder}".encode()
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


StartUp = Callable[..., Service]


@pytest.fixture
def start_up(tmp_path: Path, wait_until: Any) -> Generator[StartUp]:
    with ExitStack() as stack:

        def start(*arguments: str, name: str = "data", wait: bool = True, **env: str) -> Service:
            folder, log = tmp_path / name, tmp_path / f"{name}.log"
            with log.open("w") as output:
                process = subprocess.Popen(
                    [*UP, "--data", str(folder), *arguments],
                    stdout=output,
                    stderr=output,
                    text=True,
                    env=os.environ | env,
                    # A shell that runs tests in the background ignores SIGINT, and children too.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            service = Service(process, folder, log)
            if wait:
                wait_until(lambda: service.ready, "the service's start")
            return service

        yield start


def test_it_serves_judges_revives_and_ends_without_a_trace(start_up, wait_until, free_port):
    port, dashboard_port = free_port(), free_port()
    service = start_up("--port", str(port), "--dashboard-port", str(dashboard_port))
    url = f"http://127.0.0.1:{port}"
    assert service.addresses == {
        "collector": url,
        "dashboard": f"http://127.0.0.1:{dashboard_port}",
    }
    assert set(service.parts()) == {"collector", "worker", "beat", "dashboard"}

    client, run = Client(url), new_run()
    transport = Transport(url)
    assert transport.introduce(run).verdict is Verdict.STORED
    batch = encode_batch([manifest(dense(10)), *vanishing(range(60))])
    assert transport.deliver(run.id, batch).verdict is Verdict.STORED
    # Nobody asks for a judgement: the beat's tick does.
    wait_until(lambda: client.run(run.id).judged, "a judgement", 20)
    assert [finding.kind for finding in client.findings(run.id)] == ["vanishing"]

    second = subprocess.run(
        [*UP, "--data", str(service.folder)], capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 1
    assert "is up already" in second.stderr
    assert service.ready, "the refused service took the addresses of the one that runs"

    before = service.parts()
    for name in ("worker", "beat", "collector"):
        os.kill(before[name], signal.SIGKILL)

    def revived() -> bool:
        now = service.parts()
        return now.keys() == before.keys() and len(now.items() & before.items()) == 1

    wait_until(revived, "the return of all parts", 20)
    wait_until(client.ready, "the collector's return", 20)
    other = new_run()
    wait_until(lambda: transport.introduce(other).verdict is Verdict.STORED, "the database")
    assert transport.deliver(other.id, batch).verdict is Verdict.STORED
    wait_until(lambda: client.run(other.id).judged, "a judgement by the new worker", 30)

    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(20) == 0, service.log.read_text()
    assert of_folder(service.folder) == []
    assert not list((service.folder / "broker").rglob("*.part"))


def test_ports_that_are_taken_are_replaced_and_a_kill_leaves_no_orphan(start_up, wait_until):
    with ExitStack() as stack:
        ours: set[str] = set()
        for port in (8470, 8471):
            taken = stack.enter_context(socket.socket())
            try:
                taken.bind(("127.0.0.1", port))
            except OSError:
                continue  # somebody else has it, and may let go of it at any moment
            taken.listen()
            ours.add(str(port))
        service = start_up()
        ports = {address.rsplit(":", 1)[1] for address in service.addresses.values()}
        assert not ports & ours
        assert len(ports) == 2
        service.process.kill()
        service.process.wait()
        wait_until(lambda: of_folder(service.folder) == [], "the end of all parts", 20)


def test_a_port_that_was_asked_for_and_is_taken_is_named(start_up, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        service = start_up("--port", port, wait=False)
        assert service.process.wait(60) == 1
    assert "the collector did not start" in service.log.read_text()
    assert "address already in use" in service.log.read_text()
    assert of_folder(service.folder) == []


def test_a_channel_that_runs_code_is_refused_before_anything_starts(tmp_path):
    done = subprocess.run(
        [*UP, "--data", str(tmp_path / "data"), "--notify", "exec://touch"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "'exec'" in done.stderr
    assert not (tmp_path / "data").exists()


def test_stopped_while_it_starts_it_ends_at_once(start_up, wait_until):
    service = start_up(wait=False)
    wait_until(lambda: len(of_folder(service.folder)) >= 3, "the parts")
    started = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(20) == 0
    assert time.monotonic() - started < 15
    assert of_folder(service.folder) == []
