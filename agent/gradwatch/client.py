"""Reading from a collector: what the dashboard, the demo and scripts use."""

from __future__ import annotations

from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec
import urllib3

from gradwatch.wire.api import FindingView, Flow, Heatmap, Problem, RunPage, RunView, Scalars

MSGPACK = "application/x-msgpack"
DEFAULT_TIMEOUT_S = 10.0

T = TypeVar("T")


class CollectorError(RuntimeError):
    """The collector refused a request, or could not be reached. `status` is 0 for the latter."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A collector's read API. Every method raises CollectorError when it gets no good answer."""

    def __init__(
        self, url: str, token: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Accept": MSGPACK}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(timeout_s), retries=urllib3.Retry(2, backoff_factor=0.1)
        )

    def runs(self, *, project: str | None = None, after: str | None = None) -> RunPage:
        """One page of runs, newest first."""
        return self._get("/api/v1/runs", RunPage, project=project, after=after)

    def run(self, run: str) -> RunView:
        """One run with its findings."""
        return self._get(f"/api/v1/runs/{quote(run)}", RunView)

    def findings(self, run: str) -> list[FindingView]:
        """All findings of a run, open ones first."""
        return self._get(f"/api/v1/runs/{quote(run)}/findings", list[FindingView])

    def heatmap(
        self,
        run: str,
        optimizer: str,
        statistic: str = "norm",
        *,
        first: int | None = None,
        last: int | None = None,
        columns: int = 400,
    ) -> Heatmap:
        """One statistic over layers and steps."""
        path = f"/api/v1/runs/{quote(run)}/heatmap"
        return self._get(
            path,
            Heatmap,
            optimizer=optimizer,
            statistic=statistic,
            first=first,
            last=last,
            columns=columns,
        )

    def flow(self, run: str, optimizer: str, *, step: int | None = None) -> Flow:
        """The last detail frame at or before `step`."""
        return self._get(f"/api/v1/runs/{quote(run)}/flow", Flow, optimizer=optimizer, step=step)

    def scalars(self, run: str, optimizer: str, *, columns: int = 1000) -> Scalars:
        """Loss, learning rate and other scalars over steps."""
        path = f"/api/v1/runs/{quote(run)}/scalars"
        return self._get(path, Scalars, optimizer=optimizer, columns=columns)

    def ready(self) -> bool:
        """Whether the collector and its database answer."""
        try:
            return self._pool.request("GET", f"{self.url}/readyz", retries=False).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def _get(self, path: str, kind: type[T], **query: Any) -> T:
        given = {name: value for name, value in query.items() if value is not None}
        url = self.url + path + (f"?{urlencode(given)}" if given else "")
        try:
            response = self._pool.request("GET", url, headers=self._headers)
        except urllib3.exceptions.HTTPError as error:
            raise CollectorError(f"no answer from the collector at {self.url}: {error}") from error
        if response.status != 200:
            raise CollectorError(_reason(response.data, response.status), response.status)
        return msgspec.msgpack.decode(response.data, type=kind)


def _reason(body: bytes, status: int) -> str:
    try:
        return msgspec.json.decode(body, type=Problem).detail
    except msgspec.DecodeError:
        return f"the collector answered {status}"
