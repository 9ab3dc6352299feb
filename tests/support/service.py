"""The service as a user starts it, and a receiver of its alerts."""

from __future__ import annotations

import http.server
import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradwatch.client import Client

ROOT = Path(__file__).parents[2]


class Service:
    """A running `gradwatch up`."""

    def __init__(self, addresses: dict[str, str], process: subprocess.Popen[str]) -> None:
        self.collector = addresses["collector"]
        self.dashboard = addresses["dashboard"]
        self.client = Client(self.collector)
        self.process = process


class Webhook:
    """A receiver of alerts on loopback."""

    def __init__(self) -> None:
        self.received: queue.Queue[tuple[float, dict[str, Any]]] = queue.Queue()
        received = self.received

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.put((time.time(), json.loads(body)))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"json://127.0.0.1:{self.server.server_port}/alerts"


def wait_until(
    holds: Callable[[], Any], deadline_s: float, otherwise: Callable[[], str] = lambda: "too late"
) -> Any:
    """Wait for a truthy answer; fail with a reason at the deadline."""
    end = time.monotonic() + deadline_s
    while not (answer := holds()):
        assert time.monotonic() < end, otherwise()
        time.sleep(0.1)
    return answer
