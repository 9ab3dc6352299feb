"""Sending to a collector: one request, one outcome. Never raises for what the network does."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec
import urllib3

from gradwatch.wire.api import Problem
from gradwatch.wire.codec import CONTENT_TYPE
from gradwatch.wire.frame import Receipt, RunInfo

CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 15.0
# A collector that says no (401, 403) is asked again this rarely: somebody must act first.
REFUSED_RETRY_S = 30.0


class Verdict(Enum):
    """What became of a request."""

    STORED = "stored"
    RETRY = "try again later"
    UNKNOWN_RUN = "introduce the run first"
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
        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
        self._pool = urllib3.PoolManager(timeout=timeout, retries=False, maxsize=1)

    def introduce(self, run: RunInfo) -> Outcome:
        """Tell the collector of a run; it may know it already."""
        return self._send("PUT", f"/api/v1/runs/{run.id}", msgspec.json.encode(run))

    def deliver(self, run: str, body: bytes) -> Outcome:
        """Send one batch."""
        return self._send("POST", f"/api/v1/runs/{run}/records", body)

    def close(self) -> None:
        self._pool.clear()

    def _send(self, method: str, path: str, body: bytes) -> Outcome:
        headers = self._headers
        if method == "PUT":
            headers = headers | {"Content-Type": "application/json"}
        try:
            response = self._pool.request(method, self.url + path, body=body, headers=headers)
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            return Outcome(Verdict.RETRY, f"no answer from {self.url} ({type(error).__name__})")
        return _outcome(response.status, response.headers.get("Retry-After"), response.data)


def _outcome(status: int, retry_after: str | None, data: bytes) -> Outcome:
    if status in (200, 201):
        return _received(data)
    problem = _problem(data)
    reason = problem.detail if problem else f"the collector answered {status}"
    if status == 404:
        # Another server on that port has no problem to tell; then the run is not what is missing.
        return Outcome(Verdict.UNKNOWN_RUN if problem else Verdict.RETRY, reason)
    if status == 422 and problem and problem.rejected:
        return Outcome(Verdict.STORED, reason, rejected=len(problem.rejected))
    if status in (401, 403):
        return Outcome(Verdict.RETRY, reason, REFUSED_RETRY_S)
    if status in (408, 425, 429) or status >= 500 or status < 400:
        wait = float(retry_after) if retry_after and retry_after.isdigit() else None
        return Outcome(Verdict.RETRY, reason, wait)
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
