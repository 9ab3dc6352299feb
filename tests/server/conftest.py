from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
import urllib3
import uvicorn
from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from gradwatch.client import Client
from gradwatch.wire.api import FindingView, Problem
from gradwatch.wire.codec import CONTENT_TYPE, encode_batch
from gradwatch.wire.frame import Receipt, Record, RunInfo
from gradwatch_server import judging
from gradwatch_server.app import create_app
from gradwatch_server.database import open_database, writing
from gradwatch_server.models import Alert, ChannelRow, Optimizer, Run
from gradwatch_server.settings import Settings

# Test modules here share helpers; importlib mode puts no folder on the path by itself.
sys.path.insert(0, str(Path(__file__).parent))

CHANNEL = "json://127.0.0.1:9/alerts"  # nobody listens on the discard port


@dataclass
class Answer:
    """What the collector said."""

    status: int
    headers: urllib3.HTTPHeaderDict
    body: bytes

    @property
    def problem(self) -> Problem:
        assert self.headers["Content-Type"] == "application/problem+json", self.body
        found = msgspec.json.decode(self.body, type=Problem)
        assert found.status == self.status
        return found

    @property
    def receipt(self) -> Receipt:
        assert self.status == 200, self.body
        return msgspec.json.decode(self.body, type=Receipt)


@dataclass
class Collector:
    """A collector that listens on a free port, and its database."""

    url: str
    settings: Settings
    engine: Engine
    app: Any
    wakes: list[None] = field(default_factory=list[None])
    token: str = ""
    pool: urllib3.PoolManager = field(
        default_factory=lambda: urllib3.PoolManager(retries=False, timeout=60.0, maxsize=16)
    )

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        if self.token:
            headers = {"Authorization": f"Bearer {self.token}"} | headers
        answer = self.pool.request(method, self.url + path, body=body, headers=headers)
        return Answer(answer.status, answer.headers, answer.data)

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, **headers)

    def put(self, run: RunInfo) -> Answer:
        return self.request("PUT", f"/api/v1/runs/{run.id}", msgspec.json.encode(run))

    def post(self, run: RunInfo, records: Sequence[Record]) -> Answer:
        return self.post_bytes(run, encode_batch(records))

    def post_bytes(self, run: RunInfo, body: bytes) -> Answer:
        path = f"/api/v1/runs/{run.id}/records"
        return self.request("POST", path, body, **{"Content-Type": CONTENT_TYPE})

    def store(self, run: RunInfo, records: Sequence[Record]) -> Receipt:
        """Introduce a run, and store its records; fails when one is refused."""
        assert self.put(run).status == 200
        return self.post(run, records).receipt

    @property
    def client(self) -> Client:
        return Client(self.url, self.token or None)

    def judge(self) -> bool:
        """What the worker does at each tick."""
        return judging.judge_due(self.engine, self.settings.channels)

    def findings(self, run: RunInfo) -> dict[str, FindingView]:
        return {finding.kind: finding for finding in self.client.findings(run.id)}

    def alerts(self) -> list[Alert]:
        with Session(self.engine, expire_on_commit=False) as session:
            return list(session.scalars(select(Alert).order_by(Alert.id)))


@contextmanager
def _serving(settings: Settings) -> Generator[Collector]:
    wakes: list[None] = []
    app = create_app(settings, wake=lambda: wakes.append(None))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the collector did not start"
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    engine = open_database(settings.database)
    collector = Collector(
        f"http://127.0.0.1:{port}", settings, engine, app, wakes, settings.server_token
    )
    try:
        yield collector
    finally:
        collector.pool.clear()
        server.should_exit = True
        thread.join()
        engine.dispose()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Every test that stores something runs once on each kind of database."""
    return request.param


@pytest.fixture(scope="session")
def new_database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, database_kind: str
) -> Callable[[], str]:
    """Makes empty databases; gives their URLs."""
    if database_kind == "postgresql":
        return request.getfixturevalue("postgres").new_database
    return lambda: f"sqlite:///{tmp_path_factory.mktemp('database') / 'gradwatch.db'}"


@pytest.fixture
def database_url(new_database: Callable[[], str]) -> str:
    """The URL of a database without a table."""
    return new_database()


StartCollector = Callable[..., Collector]


@pytest.fixture
def start_collector(database_url: str) -> Generator[StartCollector]:
    """Starts a collector with these settings; it stops at the end of the test."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Collector:
            return stack.enter_context(_serving(Settings(database_url=database_url, **settings)))

        yield start


@pytest.fixture(scope="session")
def _lasting_collector(new_database: Callable[[], str]) -> Generator[Collector]:
    with _serving(Settings(database_url=new_database(), notify=CHANNEL)) as collector:
        yield collector


@pytest.fixture(scope="module")
def own_collector(new_database: Callable[[], str]) -> Generator[Collector]:
    """A collector with a token, for one module that does with it what it likes."""
    with _serving(Settings(database_url=new_database(), server_token="a-test-token")) as collector:
        yield collector


@pytest.fixture
def collector(_lasting_collector: Collector) -> Collector:
    """A collector without a run, with one channel for alerts, which nothing delivers by itself."""
    with writing(_lasting_collector.engine) as session:
        session.execute(delete(Run))
        session.execute(delete(Optimizer))
        session.execute(delete(ChannelRow))
    _lasting_collector.wakes.clear()
    return _lasting_collector


@dataclass
class Webhook:
    """A server on loopback that keeps what it is sent."""

    port: int = 0
    received: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    paths: list[str] = field(default_factory=list[str])
    statuses: list[int] = field(default_factory=list[int])  # of the next answers; then 200
    location: str = ""
    hold: threading.Event | None = None  # answers wait for it

    @property
    def url(self) -> str:
        return f"json://127.0.0.1:{self.port}/alerts"


@pytest.fixture
def webhook() -> Generator[Webhook]:
    hook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hook.received.append(json.loads(body))
            hook.paths.append(self.path)
            if hook.hold:
                hook.hold.wait(10)
            self.send_response(hook.statuses.pop(0) if hook.statuses else 200)
            if hook.location:
                self.send_header("Location", hook.location)
            self.end_headers()

        def do_GET(self) -> None:
            hook.paths.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hook.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hook
    server.shutdown()
    thread.join()
    server.server_close()
