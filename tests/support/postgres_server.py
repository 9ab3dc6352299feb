"""A PostgreSQL server of one's own: its own process, on a free port, gone afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

USER = "gradwatch"
INITDB = ("-U", USER, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
START_DEADLINE_S = 60.0
# What a power cut would spoil; whoever kills collectors, never the machine, is faster without.
UNSAFE = ("fsync=off", "full_page_writes=off")


class MissingError(RuntimeError):
    """PostgreSQL is not installed here. The message says what to install."""


class Postgres:
    """A server that listens on loopback and trusts everyone there."""

    def __init__(self, port: int, process: subprocess.Popen[Any]) -> None:
        self.port = port
        self.pid = process.pid
        self._databases = 0

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of a database that is empty."""
        self._databases += 1
        name = f"test_{self._databases}"
        self._execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop_connections(self, url: str) -> None:
        """Lock everybody out of one database, as if it had gone."""
        name = url.rsplit("/", 1)[-1]
        self._execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        self._execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )

    def let_in_again(self, url: str) -> None:
        self._execute(f"ALTER DATABASE {url.rsplit('/', 1)[-1]} ALLOW_CONNECTIONS true")

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())


@contextmanager
def postgres_server(safe: bool = False) -> Generator[Postgres]:
    """Start a server with no data in it; `safe` as in production, with every commit on disk.

    Raises MissingError where PostgreSQL is not installed, RuntimeError with its log when it does
    not start.
    """
    programs = _programs()
    with _folder() as (folder, options):
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", *INITDB],
            check=True,
            capture_output=True,
            **options,
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(programs / "postgres"), "-D", str(folder / "data"), "-p", str(port)]
        command += ["-h", "127.0.0.1", "-k", str(folder)]
        for setting in ("max_connections=200", *(() if safe else UNSAFE)):
            command += ["-c", setting]
        log = folder / "log"
        with log.open("ab") as output:
            process: subprocess.Popen[Any] = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, **options
            )
        server = Postgres(port, process)
        try:
            _wait_for(server, process, log)
            yield server
        finally:
            # Nothing is to be kept: SIGTERM would wait for clients, SIGINT write what is dirty.
            process.send_signal(signal.SIGQUIT)
            process.wait()


def _programs() -> Path:
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if folders:
        return max(folders, key=lambda path: int(path.parent.name))
    found = shutil.which("postgres")
    if found is None:
        raise MissingError("postgres is not installed: apt install postgresql")
    return Path(found).parent


@contextmanager
def _folder() -> Generator[tuple[Path, dict[str, Any]]]:
    """A folder that the server's user may write, and how to start a process as that user."""
    # Not pytest's own folder: root's is closed to the user that PostgreSQL insists on.
    folder = Path(tempfile.mkdtemp(prefix="gradwatch-postgres-"))
    options: dict[str, Any] = {"cwd": folder}
    try:
        if os.geteuid() == 0:
            try:
                shutil.chown(folder, "postgres", "postgres")
            except LookupError:
                raise MissingError("PostgreSQL's user is missing: apt install postgresql") from None
            options |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        yield folder, options
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(server: Postgres, process: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            psycopg.connect(server.url("postgres")).close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}") from None
        time.sleep(0.05)
