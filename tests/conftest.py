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
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

START_DEADLINE_S = 60.0
PG_USER = "gradwatch"
INITDB = ("-E", "UTF8", "--no-locale", "--no-sync")


def _missing(program: str, package: str) -> None:
    reason = f"{program} is not installed: apt install {package}"
    if os.environ.get("GRADWATCH_REQUIRE_SERVICES") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def _program(name: str, package: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        _missing(name, package)
    return str(found)


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


@contextlib.contextmanager
def _folder_for_postgres() -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder that the server's user may write, and how to start a process as that user."""
    # Not pytest's own folder: root's is closed to the user that PostgreSQL insists on.
    folder = Path(tempfile.mkdtemp(prefix="gradwatch-postgres-"))
    options: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:
        try:
            shutil.chown(folder, "postgres", "postgres")
        except LookupError:
            _missing("PostgreSQL's user", "postgresql")
        options |= {"user": "postgres", "group": "postgres", "extra_groups": []}
    try:
        yield folder, options
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _postgres_programs() -> Path:
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if folders:
        return max(folders, key=lambda path: int(path.parent.name))
    return Path(_program("postgres", "postgresql")).parent


class Postgres:
    """A PostgreSQL server of the tests' own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._databases = 0

    def url(self, database: str) -> str:
        return f"postgresql://{PG_USER}@127.0.0.1:{self.port}/{database}"

    def answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True

    def new_database(self) -> str:
        """The URL of a database that is empty."""
        import psycopg

        self._databases += 1
        name = f"test_{self._databases}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def drop_connections(self, url: str) -> None:
        """Lock everybody out of one database, as if it had gone."""
        import psycopg

        name = url.rsplit("/", 1)[-1]
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
            )

    def let_in_again(self, url: str) -> None:
        import psycopg

        name = url.rsplit("/", 1)[-1]
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())


@pytest.fixture(scope="session")
def postgres() -> Generator[Postgres]:
    """A PostgreSQL server with no data in it."""
    programs = _postgres_programs()
    port = _free_port()
    with _folder_for_postgres() as (folder, options):
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", PG_USER, "-A", "trust", *INITDB],
            check=True,
            capture_output=True,
            **options,
        )
        command = [str(programs / "postgres"), "-D", str(folder / "data"), "-p", str(port)]
        command += ["-h", "127.0.0.1", "-k", str(folder)]
        # The tests kill collectors, never the database or the machine.
        for setting in ("fsync=off", "full_page_writes=off", "max_connections=200"):
            command += ["-c", setting]
        log = folder / "log"
        # Nothing is to be kept: SIGTERM would wait for clients, SIGINT would write what is dirty.
        with _running(command, log, stop=signal.SIGQUIT, **options) as process:
            server = Postgres(port)

            def ready() -> bool:
                assert process.poll() is None, log.read_text()
                return server.answers()

            _wait_until(ready, "PostgreSQL's start")
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
