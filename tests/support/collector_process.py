"""A collector in a process of its own, as production runs it, that may be killed and started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import urllib3

START_DEADLINE_S = 60.0


class CollectorProcess:
    """`python -m gradwatch_server` over one database, always on the same port of loopback."""

    def __init__(self, database_url: str, folder: Path, **settings: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "collector.log"
        self._environ = {
            **os.environ,
            "GRADWATCH_DATABASE_URL": database_url,
            "GRADWATCH_DATA_DIR": str(folder),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> CollectorProcess:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._end(signal.SIGTERM)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start; does not wait until it answers."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gradwatch_server", "--port", str(self.port)],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def kill(self) -> None:
        """As the machine's memory running out would: without a word."""
        self._end(signal.SIGKILL)

    def wait_ready(self) -> None:
        """Raises RuntimeError with its log when it does not answer in time."""
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline and self._process and self._process.poll() is None:
            try:
                if urllib3.request("GET", f"{self.url}/readyz", retries=False).status == 200:
                    return
            except urllib3.exceptions.HTTPError:
                time.sleep(0.05)
        raise RuntimeError(f"the collector did not start:\n{self.log.read_text()}")

    def _end(self, how: int) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None


def cpu_s(pid: int) -> float:
    """Processor seconds that a process and its descendants, living or gone, have taken."""
    ticks = sum(map(int, _stat(pid)[11:15]))
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return ticks / os.sysconf("SC_CLK_TCK") + sum(cpu_s(int(child)) for child in children)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on: the second may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
