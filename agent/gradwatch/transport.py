"""Sending to a collector: one request, one outcome. Never raises for what the network does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

import msgspec
import urllib3

from gradwatch.answers import Pools
from gradwatch.wire.api import Problem
from gradwatch.wire.codec import CONTENT_TYPE, BatchError, count_records, halve
from gradwatch.wire.frame import Receipt, RunInfo

# Together less than the time that the end of a run may take, so that what could not be sent by then
# is on disk. The first is also the time to send a request's body.
CONNECT_TIMEOUT_S = 4.0
READ_TIMEOUT_S = 5.0
# A collector that says no (401, 403) is asked again this rarely: somebody must act first.
DENIED_RETRY_S = 30.0
# Whatever it asks for, a collector is tried again this soon.
MAX_RETRY_AFTER_S = 300.0
MAX_ANSWER_BYTES = 4 << 20
# Name of the agent's thread in a job, whose requests are none of what the script logs.
THREAD = "gradwatch"

T = TypeVar("T")


class Verdict(Enum):
    """What became of a request."""

    STORED = "stored"
    RETRY = "try again later"
    DENIED = "try again once somebody has acted"
    UNKNOWN_RUN = "introduce the run first"
    TOO_LARGE = "to be sent in parts"
    REFUSED = "never to be sent again"


@dataclass(frozen=True)
class Outcome:
    """What became of a request, and what to do."""

    verdict: Verdict
    reason: str = ""
    retry_after_s: float | None = None
    rejected: int = 0  # records of the batch that the collector refused


class Transport:
    """Requests to one collector."""

    def __init__(self, url: str, token: str = "") -> None:
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": CONTENT_TYPE}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        for logger in ("urllib3.connectionpool", "urllib3.connection"):
            logging.getLogger(logger).addFilter(_of_the_script)
        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
        self._pool = Pools(timeout=timeout, retries=urllib3.Retry(False), maxsize=1)

    def introduce(self, run: RunInfo) -> Outcome:
        """Tell the collector of a run; it may know it already."""
        return self._send("PUT", f"/api/v1/runs/{run.id}", msgspec.json.encode(run))

    def deliver(self, run: str, body: bytes) -> Outcome:
        """Send one batch; in halves where a proxy takes no requests of its size."""
        outcome = self._send("POST", f"/api/v1/runs/{run}/records", body)
        if outcome.verdict is Verdict.TOO_LARGE:
            halves = _records_of(body, halve)
            if not halves:
                return replace(outcome, verdict=Verdict.REFUSED, rejected=1)
            rejected = 0
            for half in halves:
                outcome = self.deliver(run, half)
                if outcome.verdict not in (Verdict.STORED, Verdict.REFUSED):
                    return outcome
                rejected += outcome.rejected
            return replace(outcome, rejected=rejected)
        if outcome.verdict is Verdict.REFUSED:
            return replace(outcome, rejected=_records_of(body, count_records) or 1)
        return outcome

    def close(self) -> None:
        self._pool.clear()

    def _send(self, method: str, path: str, body: bytes) -> Outcome:
        headers = self._headers
        if method == "PUT":
            headers = headers | {"Content-Type": "application/json"}
        try:
            response = self._pool.request(
                method, self.url + path, body=body, headers=headers, preload_content=False
            )
            answer = response.read(MAX_ANSWER_BYTES)
            response.drain_conn() if len(answer) < MAX_ANSWER_BYTES else response.close()
            response.release_conn()
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            return Outcome(Verdict.RETRY, f"no answer from {self.url} ({type(error).__name__})")
        return _outcome(response.status, response.headers.get("Retry-After", ""), answer)


def _of_the_script(record: logging.LogRecord) -> bool:
    """Whether a record of urllib3's comes from another thread than the agent's."""
    return threading.current_thread().name != THREAD


def _records_of(body: bytes, ask: Callable[[bytes], T]) -> T | None:
    """None for a body that a failing disk has spoilt."""
    try:
        return ask(body)
    except BatchError:
        return None


def _outcome(status: int, retry_after: str, data: bytes) -> Outcome:
    if status in (200, 201):
        return _received(data)
    problem = _problem(data)
    reason = problem.detail if problem else f"the collector answered {status}"
    if status == 404:
        # Another server on that port has no problem to tell; then the run is not what is missing.
        return Outcome(Verdict.UNKNOWN_RUN if problem else Verdict.RETRY, reason)
    if status in (409, 422) and problem and problem.rejected:
        return Outcome(Verdict.STORED, reason, rejected=len(problem.rejected))
    if status in (401, 403):
        return Outcome(Verdict.DENIED, reason, DENIED_RETRY_S)
    if status in (408, 425, 429) or status >= 500 or status < 400:
        known = retry_after.isdecimal()  # it may also be a date
        wait = min(float(retry_after), MAX_RETRY_AFTER_S) if known else None
        return Outcome(Verdict.RETRY, reason, wait)
    if status == 413:
        return Outcome(Verdict.TOO_LARGE, reason)
    return Outcome(Verdict.REFUSED, reason)


def _received(data: bytes) -> Outcome:
    try:
        receipt = msgspec.json.decode(data, type=Receipt)
    except msgspec.DecodeError:
        return Outcome(Verdict.RETRY, "the answer is not a collector's")
    return Outcome(Verdict.STORED, rejected=len(receipt.rejected))


def _problem(data: bytes) -> Problem | None:
    try:
        return msgspec.json.decode(data, type=Problem)
    except msgspec.DecodeError:
        return None
