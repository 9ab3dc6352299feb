"""What one collector process says of itself: metrics of its requests and commits, and its log.

Each process counts for itself, as Prometheus expects of its targets. What all of them share stands
in the database (see metrics.py).
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradwatch.wire.frame import Drops, Frame, Manifest, Receipt, Rejection, RunEnd, RunInfo
from gradwatch_server.logs import AT
from gradwatch_server.problems import problem

log = logging.getLogger(__name__)

# When a series began: twice the lines, for what Prometheus sees by itself.
disable_created_metrics()

REQUEST_ID_HEADER = b"x-request-id"
# What a proxy gave is kept when it can stand in a log as it is.
ACCEPTABLE_ID = re.compile(rb"[\w.-]{1,64}")
SLOW_S = 1.0
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
# Why a request was refused, by the status of its answer.
REASONS = {
    400: "malformed",
    401: "no token",
    403: "token without the scope",
    404: "unknown",
    405: "method",
    409: "conflict",
    413: "too large",
    422: "invalid",
    429: "busy",
    503: "database",
}
# Why a record was refused: the field that its rejection names, as long as we know it.
FIELDS = frozenset(
    field.name
    for kind in (Frame, Manifest, RunEnd, Drops, RunInfo)
    for field in msgspec.structs.fields(kind)
)
METHODS = frozenset({"GET", "PUT", "POST", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class Own(NamedTuple):
    """A metric that each process counts for itself. buckets: of a histogram; none for a counter."""

    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


REQUEST_SECONDS = "gradwatch_http_request_duration_seconds"
REQUESTS_REFUSED = "gradwatch_requests_refused"
RECEIVED_BYTES = "gradwatch_received_bytes"
INGESTED_FRAMES = "gradwatch_ingested_frames"
RECORDS_REFUSED = "gradwatch_records_refused"
COMMIT_BATCHES = "gradwatch_commit_batches"
COMMIT_SECONDS = "gradwatch_commit_duration_seconds"
OWN: dict[str, Own] = {
    REQUEST_SECONDS: Own(
        "Time to answer, by route and status.", ("method", "route", "status"), SECONDS
    ),
    REQUESTS_REFUSED: Own("Requests answered with an error, by reason.", ("reason",)),
    RECEIVED_BYTES: Own("Bytes of request bodies, as they were sent."),
    INGESTED_FRAMES: Own(
        "Frames committed by this collector, by whether they were new or known.", ("result",)
    ),
    RECORDS_REFUSED: Own(
        "Records of a batch that could not be stored, by the field that was wrong.", ("reason",)
    ),
    COMMIT_BATCHES: Own("Batches that one commit stored.", (), BATCHES),
    COMMIT_SECONDS: Own("Time to store and commit a group of batches.", (), SECONDS),
}


class Telemetry:
    """The counters and histograms of one collector process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for name, own in OWN.items():
            if own.buckets:
                self._histograms[name] = Histogram(
                    name, own.help, own.labels, buckets=own.buckets, registry=self.registry
                )
            else:
                self._counters[name] = Counter(name, own.help, own.labels, registry=self.registry)
        for result in ("stored", "repeated"):
            self._counters[INGESTED_FRAMES].labels(result)

    def answered(self, method: str, route: str, status: int, seconds: float, size: int) -> None:
        """One request. size: bytes of its body."""
        known = method if method in METHODS else "other"
        self._histograms[REQUEST_SECONDS].labels(known, route, str(status)).observe(seconds)
        self._counters[RECEIVED_BYTES].inc(size)
        if status >= 400:
            self._counters[REQUESTS_REFUSED].labels(REASONS.get(status, "failure")).inc()

    def committed(self, receipts: Sequence[Receipt], seconds: float) -> None:
        """One commit and what it stored."""
        self._histograms[COMMIT_BATCHES].observe(len(receipts))
        self._histograms[COMMIT_SECONDS].observe(seconds)
        self._counters[INGESTED_FRAMES].labels("stored").inc(
            sum(receipt.stored for receipt in receipts)
        )
        self._counters[INGESTED_FRAMES].labels("repeated").inc(
            sum(receipt.repeated for receipt in receipts)
        )

    def rejected(self, rejections: Iterable[Rejection]) -> None:
        """Records that were refused beside others that may have been stored."""
        for item in rejections:
            field = item.reason.partition(":")[0].partition(".")[0]
            reason = "conflict" if item.conflict else field if field in FIELDS else "other"
            self._counters[RECORDS_REFUSED].labels(reason).inc()


class Observed:
    """ASGI middleware: gives each request an id, measures it, logs what went wrong with it."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        AT.set({"request_id": request_id})
        began = time.perf_counter()
        size, status = 0, 0

        async def received() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (REQUEST_ID_HEADER, request_id.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        try:
            await self._app(scope, received, sent)
        except Exception as error:
            log.exception("a request failed")
            if status:
                raise
            # What went wrong is in the log; a stranger is not told.
            answer = problem(500, f"the collector failed: {type(error).__name__}")
            await answer(scope, received, sent)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "none")
            # A client that went away before the answer got none.
            self._telemetry.answered(scope["method"], route, status or 499, seconds, size)
            log.log(
                _level(status, seconds),
                "%s %s: %d",
                scope["method"],
                scope["path"],
                status,
                extra={"seconds": round(seconds, 4), "bytes": size},
            )


def _request_id(scope: Scope) -> str:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    given: Any = next((value for name, value in headers if name == REQUEST_ID_HEADER), b"")
    return given.decode() if ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex


def _level(status: int, seconds: float) -> int:
    if status >= 500:
        return logging.ERROR
    if status >= 400 or seconds > SLOW_S:
        return logging.WARNING
    return logging.DEBUG
