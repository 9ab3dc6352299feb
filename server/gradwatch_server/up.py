"""`gradwatch up`: collector, worker and dashboard on this machine, started and stopped together."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from types import FrameType

import click
import urllib3

from gradwatch_server.__main__ import DEFAULT_PORT, check_channels, load_settings
from gradwatch_server.file_broker import forget_messages
from gradwatch_server.settings import Settings, default_data_dir

DASHBOARD_PORT = 8471
START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 10.0
# A part that dies more often than this is broken, not unlucky.
MAX_RESTARTS = 5
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
CELERY = [sys.executable, "-m", "celery", "--app", "gradwatch_server.tasks"]
WORKER_OPTIONS = [
    # The solo pool takes a wake-up at once; docs/broker.md has the measurements.
    *("--pool", "solo", "--loglevel", "warning"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat"),
]
BEAT_OPTIONS = ["--loglevel", "warning"]


@click.command()
@click.option("--port", type=int, help=f"The collector's port [{DEFAULT_PORT}, or a free one].")
@click.option(
    "--dashboard-port", type=int, help=f"The dashboard's port [{DASHBOARD_PORT}, or a free one]."
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Folder of the database [{default_data_dir()}].",
)
@click.option(
    "--notify",
    multiple=True,
    metavar="URL",
    help="Send alerts to this Apprise URL, as json://host/path, slack://... or mailto://...; "
    "may be repeated.",
)
def up(
    port: int | None, dashboard_port: int | None, data: Path | None, notify: tuple[str, ...]
) -> None:
    """Start collector, worker and dashboard on this machine.

    Everything listens on loopback only and is kept in one folder. Ctrl-C stops it; what was
    recorded stays. For a team, see deploy/.
    """
    settings = load_settings()
    channels = [*notify, *settings.channels]
    check_channels(channels)
    folder = (data or settings.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        held.enter_context(_one_at_a_time(folder))
        # Never before the lock: these may be another service's.
        (folder / "addresses.json").unlink(missing_ok=True)
        forget_messages(folder / "broker")
        with _starting_alone():
            port = port or free_port(DEFAULT_PORT)
            if dashboard_port is None:
                dashboard_port = free_port(DASHBOARD_PORT if port != DASHBOARD_PORT else 0)
            url, dashboard_url = (f"http://127.0.0.1:{number}" for number in (port, dashboard_port))
            environ = _environment(settings, folder, channels, dashboard_url)
            parts = {
                "collector": [sys.executable, "-m", "gradwatch_server", "--port", str(port)],
                "worker": [*CELERY, "worker", *WORKER_OPTIONS],
                # Apart from the worker: `worker --beat` leaves its beat ticking when killed.
                "beat": [*CELERY, "beat", *BEAT_OPTIONS, "--schedule", str(folder / "beat")],
                "dashboard": _dashboard_command(url, dashboard_port),
            }
            running = held.enter_context(Parts(parts, environ, folder / "logs"))
            running.wait_for("collector", f"{url}/readyz")
            running.wait_for("dashboard", f"{dashboard_url}/_stcore/health")
        if running.stopping:
            return
        # Whoever started this service reads here where it is, once everything answers.
        addresses = {"collector": url, "dashboard": dashboard_url}
        (folder / "addresses.json").write_text(json.dumps(addresses))
        click.echo(
            f"\n  dashboard   {dashboard_url}\n"
            f"  collector   {url}   (API: {url}/docs, Prometheus: {url}/metrics)\n"
            f"  data        {folder}\n\n"
            f"  watch a script:  GRADWATCH_URL={url} gradwatch run train.py\n\n"
            "Ctrl-C stops everything."
        )
        running.watch()


def _environment(
    settings: Settings, folder: Path, channels: list[str], dashboard_url: str
) -> dict[str, str]:
    """What every part is told."""
    return {
        **os.environ,
        "GRADWATCH_DATA_DIR": str(folder),
        "GRADWATCH_NOTIFY": " ".join(channels),
        # Whoever starts this service is on this machine, and so may be what he wants told.
        "GRADWATCH_NOTIFY_LOCAL": "allow",
        "GRADWATCH_DASHBOARD_URL": dashboard_url,
        # The dashboard must be let in where a token is asked for.
        **({"GRADWATCH_TOKEN": settings.server_token} if settings.server_token else {}),
        # The same small machine trains: the service's own arithmetic needs no thread pool.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _dashboard_command(url: str, port: int) -> list[str]:
    """The dashboard is another package, started by its own entry: no import of it here."""
    if importlib.util.find_spec("streamlit") is None:
        raise click.ClickException(
            "the dashboard needs streamlit, which is not installed: "
            "pip install 'gradwatch[server,dashboard]'"
        )
    return [sys.executable, "-m", "gradwatch_dashboard", "--url", url, "--port", str(port)]


def free_port(wanted: int) -> int:
    """`wanted` when nobody has it, else one that is free."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return probe.getsockname()[1]
    raise click.ClickException("this machine has no free port")


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Generator[None]:
    """Refuse a second service over the same database: its beat would tick twice."""
    with (folder / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise click.ClickException(
                f"gradwatch is up already on {folder}; use that one, or name another --data folder"
            ) from None
        yield


@contextlib.contextmanager
def _starting_alone() -> Generator[None]:
    """Two services that start at once must not find the same ports free, or one's parts would
    answer for the other's."""
    with (Path(tempfile.gettempdir()) / f"gradwatch-start-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Parts:
    """Processes that live and die together, each with a log file."""

    def __init__(
        self, commands: Mapping[str, list[str]], environ: Mapping[str, str], logs: Path
    ) -> None:
        self._commands = commands
        self._environ = environ
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._restarts = dict.fromkeys(commands, 0)
        self.stopping = False

    def __enter__(self) -> Parts:
        self._logs.mkdir(parents=True, exist_ok=True)
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._stop)
        for name in self._commands:
            self._start(name)
        return self

    def __exit__(self, *_: object) -> None:
        # The worker first: it must not find the database's owner gone.
        for process in reversed(self._processes.values()):
            process.terminate()
        deadline = time.monotonic() + STOP_DEADLINE_S
        for process in self._processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def wait_for(self, name: str, url: str) -> None:
        """Wait until a part answers; raise with its log when it dies or does not."""
        deadline = time.monotonic() + START_DEADLINE_S
        while not self.stopping and time.monotonic() < deadline:
            if _answers(url):
                return
            if self._processes[name].poll() is not None:
                break
            time.sleep(0.1)
        if not self.stopping:
            raise click.ClickException(f"the {name} did not start:\n{self._tail(name)}")

    def watch(self) -> None:
        """Until told to stop: start again what died, a few times."""
        while not self.stopping:
            for name, process in list(self._processes.items()):
                if process.poll() is not None and not self.stopping:
                    self._revive(name, process.returncode)
            time.sleep(0.2)

    def _revive(self, name: str, status: int) -> None:
        self._restarts[name] += 1
        if self._restarts[name] > MAX_RESTARTS:
            raise click.ClickException(f"the {name} keeps dying:\n{self._tail(name)}")
        click.echo(f"the {name} ended with status {status}; starting it again", err=True)
        self._start(name)

    def _start(self, name: str) -> None:
        with self._log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._commands[name],
                env=dict(self._environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches the whole group: only this process may hear it, to stop in order.
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _tail(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-15:])

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self.stopping = True


def _die_with_parent() -> None:
    """In the child: ask the kernel for SIGTERM when this service is killed without a word."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _answers(url: str) -> bool:
    try:
        return urllib3.request("GET", url, retries=False, timeout=2.0).status == 200
    except urllib3.exceptions.HTTPError:
        return False
