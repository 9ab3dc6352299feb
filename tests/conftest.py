"""Services that tests start for themselves: their own processes, on free ports, gone afterwards.

Nothing here ever touches a service that happens to run on the machine. Without a service's
programs its tests are skipped, saying which Debian package is missing; where
GRADWATCH_REQUIRE_SERVICES=1 is set, as in CI, they fail instead.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from postgres_server import MissingError, Postgres, postgres_server

START_DEADLINE_S = 60.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: begun last, one would keep the other processes waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _missing(reason: str) -> NoReturn:
    if os.environ.get("GRADWATCH_REQUIRE_SERVICES") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def _program(name: str, package: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        _missing(f"{name} is not installed: apt install {package}")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until(true: Callable[[], bool], what: str, deadline_s: float = START_DEADLINE_S) -> None:
    """Wait until something holds; fail the test when it does not in time."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        if true():
            return
        time.sleep(0.05)
    pytest.fail(f"{what} did not happen within {deadline_s:g} s")


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Gives the number of a port that nobody has."""
    return _free_port


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Waits until something holds; fails the test when it does not in time."""
    return _wait_until


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _running(
    command: list[str], log: Path, stop: int = signal.SIGTERM, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, **options
        )
    try:
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def postgres() -> Generator[Postgres]:
    """A PostgreSQL server with no data in it."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(postgres_server())
        except MissingError as error:
            _missing(str(error))
        yield server


class Redis:
    """A Redis server of the tests' own, which they may stop and start again."""

    def __init__(self, program: str, folder: Path) -> None:
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._program = program
        self._folder = folder
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self._folder), "--save", "", "--appendonly", "no"]
        self._stack.enter_context(_running(command, self._folder / "log"))
        _wait_until(lambda: _accepts(self.port), "Redis' start")

    def stop(self) -> None:
        self._stack.close()


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Generator[Redis]:
    """A Redis server with no data in it."""
    program = _program("redis-server", "redis-server")
    server = Redis(program, tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def promtool() -> str:
    """The path of Prometheus' checker."""
    return _program("promtool", "prometheus")


StartPrometheus = Callable[[Path], str]


@pytest.fixture
def start_prometheus(tmp_path_factory: pytest.TempPathFactory) -> Generator[StartPrometheus]:
    """Starts a Prometheus server with a configuration file; gives its URL."""
    program = _program("prometheus", "prometheus")
    with contextlib.ExitStack() as stack:

        def start(config: Path) -> str:
            folder = tmp_path_factory.mktemp("prometheus")
            port = _free_port()
            command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
            command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
            stack.enter_context(_running(command, folder / "log"))
            url = f"http://127.0.0.1:{port}"

            def ready() -> bool:
                try:
                    with urllib.request.urlopen(f"{url}/-/ready", timeout=2) as answer:
                        return answer.status == 200
                except OSError:
                    return False

            _wait_until(ready, "Prometheus' start")
            return url

        yield start
