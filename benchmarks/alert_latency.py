"""From a NaN in training to the finding in the database and to a webhook, by `gradwatch up`.

Each repeat trains a small network under `gradwatch run` in a process of its own; its loss takes
the logarithm of 0 at one step, and the script notes when.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from gradwatch.client import Client

FINDING_BAR_S = 1.0
WEBHOOK_BAR_S = 1.0
START_DEADLINE_S = 60.0
ALERT_DEADLINE_S = 30.0

SCRIPT = """
import sys, time, torch
from torch import nn
torch.manual_seed(int(sys.argv[1]))
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(1, 400):
    output = model(torch.randn(64, 64)).square().mean() + 1
    if step == 300:
        output = output - output.detach()
        print(time.time(), flush=True)
    optimizer.zero_grad()
    torch.log(output).backward()
    optimizer.step()
    time.sleep(0.005)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="NaNs to time (default 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        finding_s, webhook_s = measure(Path(folder), given.repeats, quiet=given.json)
    figures = {
        "repeats": given.repeats,
        "nan_to_finding_median_s": statistics.median(finding_s),
        "nan_to_finding_max_s": max(finding_s),
        "nan_to_webhook_median_s": statistics.median(webhook_s),
        "nan_to_webhook_max_s": max(webhook_s),
    }
    if given.json:
        print(json.dumps(figures))
        return
    print(f"{'NaN in training to ...':28}{'median':>10}{'largest':>10}{'bar':>10}")
    for name, seconds, bar in (
        ("finding in the database", finding_s, FINDING_BAR_S),
        ("message at the webhook", webhook_s, WEBHOOK_BAR_S),
    ):
        middle, largest = statistics.median(seconds), max(seconds)
        print(f"{name:28}{middle:>8.3f} s{largest:>8.3f} s{bar:>8.1f} s")


def measure(folder: Path, repeats: int, quiet: bool) -> tuple[list[float], list[float]]:
    """Seconds from each NaN to its finding and to its message."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    finding_s: list[float] = []
    webhook_s: list[float] = []
    with webhook() as (hook, received), service(folder / "data", hook) as collector:
        client = Client(collector)
        for repeat in range(repeats):
            if not quiet:
                print(f"\r{repeat + 1} of {repeats}", end="", file=sys.stderr, flush=True)
            began = train(script, collector, repeat)
            told_at = received.get(timeout=ALERT_DEADLINE_S)
            (finding,) = client.runs().runs[0].findings
            finding_s.append(finding.opened_at - began)
            webhook_s.append(told_at - began)
    if not quiet:
        print(file=sys.stderr)
    return finding_s, webhook_s


def train(script: Path, collector: str, seed: int) -> float:
    """Train once; when the NaN came, in Unix seconds."""
    trained = subprocess.run(
        [sys.executable, "-m", "gradwatch", "run", str(script), str(seed)],
        env={**os.environ, "GRADWATCH_URL": collector},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return float(trained.stdout)


@contextmanager
def webhook() -> Generator[tuple[str, queue.Queue[float]]]:
    """A receiver on loopback, and the times of its messages in Unix seconds."""
    received: queue.Queue[float] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put(time.time())
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"json://127.0.0.1:{server.server_port}/", received
    server.shutdown()


@contextmanager
def service(data: Path, hook: str) -> Generator[str]:
    """`gradwatch up`; the collector's address."""
    command = [sys.executable, "-m", "gradwatch", "up", "--data", str(data), "--notify", hook]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    ready = data / "addresses.json"
    deadline = time.monotonic() + START_DEADLINE_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the service did not start")
        time.sleep(0.1)
    yield json.loads(ready.read_text())["collector"]
    process.send_signal(signal.SIGINT)
    process.wait()


if __name__ == "__main__":
    main()
