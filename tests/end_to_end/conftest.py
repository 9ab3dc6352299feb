"""The service as a user starts it, for tests that look at it from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service import Service, Webhook, wait_until

START_DEADLINE_S = 60.0


@pytest.fixture(scope="session")
def webhook() -> Iterator[Webhook]:
    hook = Webhook()
    yield hook
    hook.server.shutdown()


@pytest.fixture(scope="session")
def service(webhook: Webhook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "gradwatch", "up", "--data", str(folder)),
            *("--notify", webhook.url),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ready = folder / "addresses.json"
    wait_until(ready.exists, START_DEADLINE_S, lambda: f"not up; status {process.poll()}")
    yield Service(json.loads(ready.read_text()), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, process.stdout.read() if process.stdout else ""


@pytest.fixture
def train(service: Service, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script under `gradwatch run` against the service."""

    def run(source: str, name: str, **environ: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "train.py"
        script.write_text(source)
        command = [sys.executable, "-m", "gradwatch", "run", "--name", name, str(script)]
        return subprocess.run(
            command,
            env={**os.environ, "GRADWATCH_URL": service.collector, **environ},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    return run
