"""A collector's read API over HTTP, answering from made-up runs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
from fake_runs import FakeRun

from gradwatch.wire.api import Problem, RunPage

PAGE = 50


class FakeCollector:
    """Serves `runs`, which a test may change while it runs. A context manager.

    asked: the path of each request, in order.
    """

    def __init__(self, runs: Sequence[FakeRun], port: int = 0, token: str | None = None) -> None:
        self.runs = list(runs)
        self.token = token
        self.asked: list[str] = []
        self._down = False
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @contextmanager
    def away(self) -> Generator[None]:
        """Close every connection without an answer, as a collector does that is killed."""
        self._down = True
        try:
            yield
        finally:
            self._down = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeCollector:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, query: dict[str, str]) -> Any:
        """The answer to one request, or a Problem."""
        parts = unquote(path).strip("/").split("/")
        if parts[:3] != ["api", "v1", "runs"]:
            return Problem(title="Not Found", status=404, detail=f"no route {path}")
        if len(parts) == 3:
            start = int(query.get("after", "0"))
            page = self.runs[start : start + PAGE]
            more = start + PAGE < len(self.runs)
            return RunPage(
                runs=[run.view() for run in page], next=str(start + PAGE) if more else None
            )
        run = next((run for run in self.runs if run.id == parts[3]), None)
        if run is None:
            return Problem(title="Not Found", status=404, detail=f"no run {parts[3]}")
        answers: dict[str, Callable[[], Any]] = {
            "": run.view,
            "findings": lambda: run.findings,
            "heatmap": lambda: run.heatmap(query["statistic"], int(query["columns"])),
            "flow": run.flow,
            "layers": run.layers_view,
            "scalars": run.scalars,
        }
        return answers[parts[4] if len(parts) > 4 else ""]()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if collector._down:
                    self.close_connection = True
                    return
                split = urlsplit(self.path)
                collector.asked.append(split.path)
                expected = f"Bearer {collector.token}"
                if collector.token and self.headers.get("Authorization") != expected:
                    told: Any = Problem(title="Unauthorized", status=401, detail="no token")
                else:
                    told = collector.answer(split.path, dict(parse_qsl(split.query)))
                bad = isinstance(told, Problem)
                body = (msgspec.json if bad else msgspec.msgpack).encode(told)
                self.send_response(told.status if bad else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        return Handler


if __name__ == "__main__":
    # For a look at the pages while they are written: `python fake_collector.py`.
    from fake_runs import typical_runs

    with FakeCollector(typical_runs(), port=int(sys.argv[1]) if sys.argv[1:] else 8470) as served:
        print(served.url, flush=True)
        threading.Event().wait()
