"""A real Prometheus scrapes the collector while a job trains."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import urllib3

from service import Service, wait_until

# Trains until it is told to stop by the end of its standard input.
ENDLESS = """
import select, sys, torch
from torch import nn
torch.set_num_threads(1)
model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
while not select.select([sys.stdin], [], [], 0.01)[0]:
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
"""


@pytest.fixture
def prometheus(service: Service, tmp_path: Path) -> Iterator[str]:
    binary = shutil.which("prometheus")
    if binary is None:
        reason = "prometheus is not installed (Debian package: prometheus)"
        if os.environ.get("GRADWATCH_REQUIRE_SERVICES"):
            pytest.fail(reason)
        pytest.skip(reason)
    target = service.collector.removeprefix("http://")
    config = tmp_path / "prometheus.yml"
    config.write_text(
        f"""
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: gradwatch
    static_configs: [{{targets: ["{target}"]}}]
"""
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [
            *(binary, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"),
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://{address}"
    process.terminate()
    process.wait(20)


def ask(prometheus: str, query: str) -> list[dict[str, Any]]:
    try:
        answer = urllib3.request(
            "GET", f"{prometheus}/api/v1/query?query={quote(query)}", retries=False, timeout=5
        )
    except urllib3.exceptions.HTTPError:
        return []
    return json.loads(answer.data)["data"]["result"] if answer.status == 200 else []


def test_prometheus_follows_a_job_and_forgets_it_when_it_ends(
    service: Service, prometheus: str, tmp_path: Path
) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    job = subprocess.Popen(
        [sys.executable, "-m", "gradwatch", "run", "--name", "endless", str(script)],
        env={**os.environ, "GRADWATCH_URL": service.collector},
        stdin=subprocess.PIPE,
    )
    assert job.stdin is not None
    named = 'gradwatch_run_info{name="endless"}'
    wait_until(lambda: ask(prometheus, named), 40, lambda: f"job {job.poll()}")
    norm = f"gradwatch_run_gradient_norm * on(run) group_left {named}"
    (sample,) = wait_until(lambda: ask(prometheus, norm), 20)
    assert float(sample["value"][1]) > 0
    assert sample["metric"]["optimizer"] == "SGD"
    assert float(ask(prometheus, 'up{job="gradwatch"}')[0]["value"][1]) == 1
    job.stdin.close()
    assert job.wait(30) == 0
    wait_until(lambda: not ask(prometheus, named), 30, lambda: "the ended run is still there")
