"""A collector on loopback whose answers a test writes beforehand; real HTTP, real decoding."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from gradwatch.wire.api import Problem
from gradwatch.wire.codec import BatchError, decode_batch
from gradwatch.wire.frame import Drops, Frame, Manifest, Receipt, Record, RunEnd, RunInfo


@dataclass(frozen=True)
class Answer:
    """What the next request gets in place of the truth. `store`: keep its records all the same."""

    status: int = 500
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    store: bool = False
    hang: bool = False  # no answer until the collector is closed
    cut: bool = False  # close the connection without an answer
    delay_s: float = 0.0
    drip_s: float = 0.0  # between two bytes of the body


class Collector:
    """Keeps what it is sent, by key, in order of arrival."""

    def __init__(self, token: str = "") -> None:
        self.token = token
        self.answers: deque[Answer] = deque()  # each is given once, before the truth
        self.always: Answer | None = None  # given when `answers` is empty
        self.refuse: Callable[[Record], str] = lambda record: ""  # reason, or "" to store
        self.runs: dict[str, RunInfo] = {}
        self.records: list[Record] = []
        self.repeated = 0
        self.requests: list[tuple[str, float]] = []  # method and when
        self.change = threading.Condition()
        self._keys: set[tuple[object, ...]] = set()
        self._closed = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.start()

    def start(self) -> None:
        """Listen, on the same port as before after a `stop`."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                outer._serve(self)

            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            allow_reuse_address = True

            def handle_error(self, *args: object) -> None:
                pass  # a client that was killed or gave up

        self._closed.clear()
        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Let nobody in any more."""
        self._closed.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def forget(self) -> None:
        """Lose the database."""
        with self.change:
            self.runs.clear()
            self.records.clear()
            self._keys.clear()

    @property
    def frames(self) -> list[Frame]:
        return [record for record in list(self.records) if isinstance(record, Frame)]

    @property
    def steps(self) -> list[int]:
        return [frame.step for frame in self.frames]

    @property
    def manifests(self) -> list[Manifest]:
        return [record for record in list(self.records) if isinstance(record, Manifest)]

    @property
    def ends(self) -> list[RunEnd]:
        return [record for record in list(self.records) if isinstance(record, RunEnd)]

    @property
    def drops(self) -> list[Drops]:
        return [record for record in list(self.records) if isinstance(record, Drops)]

    def wait(self, until: Callable[[Collector], bool], timeout_s: float = 15.0) -> None:
        """Return once `until` holds. Fails after the timeout."""
        with self.change:
            if not self.change.wait_for(lambda: until(self), timeout_s):
                raise AssertionError(f"not within {timeout_s} s; requests: {self.requests}")

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if self._closed.is_set():  # a connection that was kept alive ends with the collector
            request.close_connection = True
            return
        with self.change:
            self.requests.append((request.command, time.monotonic()))
            answer = self.answers.popleft() if self.answers else self.always
            self.change.notify_all()
        if answer is None or answer.store:
            truth = self._true_answer(request, body)
            answer = answer or truth
        if answer.delay_s:
            self._closed.wait(answer.delay_s)
        if answer.hang:
            self._closed.wait()
        if answer.hang or answer.cut:
            request.close_connection = True
            return
        request.send_response(answer.status)
        for name, value in answer.headers:
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(answer.body)))
        request.end_headers()
        if not answer.drip_s:
            request.wfile.write(answer.body)
            return
        for place in range(len(answer.body)):
            request.wfile.write(answer.body[place : place + 1])
            if self._closed.wait(answer.drip_s):
                return

    def _true_answer(self, request: BaseHTTPRequestHandler, body: bytes) -> Answer:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return problem(401, "a token is needed")
        run = request.path.split("/")[4]
        with self.change:
            try:
                if request.command == "PUT":
                    self.runs[run] = msgspec.json.decode(body, type=RunInfo)
                    return Answer(200, msgspec.json.encode(Receipt(stored=1, repeated=0)))
                if run not in self.runs:
                    return problem(404, "no such run")
                return self._store(run, body)
            finally:
                self.change.notify_all()

    def _store(self, run: str, body: bytes) -> Answer:
        try:
            good, bad = decode_batch(body)
        except BatchError as error:
            return problem(422, str(error))
        rejected = [{"place": item.place, "reason": item.reason} for item in bad]
        stored = repeated = 0
        for item in good:
            record = item.record
            if reason := self.refuse(record):
                rejected.append({"place": item.place, "reason": reason})
                continue
            if isinstance(record, Frame):
                key: tuple[object, ...] = (run, record.rank, record.optimizer, record.step)
            else:
                key = (run, item.raw)
            if key in self._keys:
                repeated += 1
                continue
            self._keys.add(key)
            self.records.append(record)
            stored += 1
        self.repeated += repeated
        if rejected:
            return problem(422, f"{len(rejected)} records refused", rejected)
        return Answer(200, msgspec.json.encode(Receipt(stored=stored, repeated=repeated)))


def problem(
    status: int, detail: str, rejected: list[dict[str, object]] | None = None, **headers: str
) -> Answer:
    """An error as the collector tells it."""
    body = Problem(title="no", status=status, detail=detail, rejected=rejected or [])
    return Answer(status, msgspec.json.encode(body), tuple(headers.items()))
