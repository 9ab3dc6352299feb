"""A collector's API in Python: what the dashboard, the demo and scripts use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, TypeVar, Unpack
from urllib.parse import quote, urlencode

import msgspec
import urllib3

from gradwatch.wire.api import (
    ChannelPatch,
    ChannelRequest,
    ChannelView,
    Comparison,
    EventPage,
    FindingHistory,
    FindingPage,
    FindingPatch,
    FindingView,
    Flow,
    FramePage,
    FrameView,
    Heatmap,
    Histograms,
    LayersView,
    ManifestView,
    NewToken,
    Problem,
    Question,
    RunFinish,
    RunPage,
    RunPatch,
    RunView,
    Scalars,
    ScopeName,
    TokenRequest,
    TokenView,
)
from gradwatch.wire.audit import Audit, AuditPage, AuditView
from gradwatch.wire.frame import Wire

MSGPACK = "application/x-msgpack"
DEFAULT_TIMEOUT_S = 10.0

T = TypeVar("T")


class StepSpan(TypedDict, total=False):
    """Steps to ask for; without `first` and `last`, all there are."""

    first: int | None
    last: int | None
    columns: int  # at most so many groups of steps


class CollectorError(RuntimeError):
    """The collector refused a request, or could not be reached. `status` is 0 for the latter."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A collector's API. Every method raises CollectorError when it gets no good answer.

    Arrays are numpy's, read-only; names of layers and runs are those of the agent. A run is named
    by its id of 32 hexadecimal digits.
    """

    def __init__(
        self, url: str, token: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """url: of the collector, as http://127.0.0.1:8470. token: of the scope that is needed."""
        self.url = url.rstrip("/")
        self._headers = {"Accept": MSGPACK}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(timeout_s), retries=urllib3.Retry(2, backoff_factor=0.1)
        )

    def runs(
        self,
        *,
        project: str | None = None,
        status: str | None = None,
        verdict: str | None = None,
        name: str | None = None,
        tag: str | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> RunPage:
        """One page of runs, newest first; its `next` is the `after` of the next one.

        status: running, silent, finished or failed. verdict: critical, warning, healthy or waiting.
        name: part of it, in any case.
        """
        return self._get(
            "/api/v1/runs",
            RunPage,
            project=project,
            status=status,
            verdict=verdict,
            name=name,
            tag=tag,
            after=after,
            limit=limit,
        )

    def run(self, run: str) -> RunView:
        """One run with its findings."""
        return self._get(_of(run), RunView)

    def change_run(
        self,
        run: str,
        *,
        name: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
    ) -> RunView:
        """Change what people are told of a run; what is None stays. Needs the scope admin."""
        listed = None if tags is None else list(tags)
        return self._send("PATCH", _of(run), RunView, RunPatch(name=name, tags=listed, notes=notes))

    def finish_run(self, run: str, status: str = "finished", reason: str = "") -> RunView:
        """Say how a run ended whose job did not: finished, or failed for a reason."""
        body = RunFinish(status=status, reason=reason)
        return self._send("POST", f"{_of(run)}/finish", RunView, body)

    def delete_run(self, run: str) -> None:
        """Delete a run with all that was stored of it. Needs the scope admin."""
        self._request("DELETE", _of(run))

    def manifests(self, run: str, optimizer: str | None = None) -> list[ManifestView]:
        """The layers of each optimizer, all versions; rank -1 for all ranks together."""
        return self._get(f"{_of(run)}/manifests", list[ManifestView], optimizer=optimizer)

    def frames(
        self,
        run: str,
        optimizer: str,
        *,
        rank: int | None = None,
        first: int | None = None,
        last: int | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> FramePage:
        """One page of frames with all their numbers, in the order of steps.

        A statistic is a list of one number a layer, in the order of the manifest's layers, None
        where it was not measured or is not finite. rank: -1 for all of them together.
        """
        return self._get(
            f"{_of(run)}/frames",
            FramePage,
            optimizer=optimizer,
            rank=rank,
            first=first,
            last=last,
            after=after,
            limit=limit,
        )

    def all_frames(
        self,
        run: str,
        optimizer: str,
        *,
        rank: int | None = None,
        first: int | None = None,
        last: int | None = None,
    ) -> Iterator[FrameView]:
        """Every frame, fetched page by page; arguments as for `frames`."""
        after: str | None = None
        while True:
            page = self.frames(run, optimizer, rank=rank, first=first, last=last, after=after)
            yield from page.frames
            after = page.next
            if after is None:
                return

    def events(
        self,
        run: str,
        *,
        optimizer: str | None = None,
        first: int | None = None,
        last: int | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> EventPage:
        """One page of what ranks said happened, in the order of steps."""
        return self._get(
            f"{_of(run)}/events",
            EventPage,
            optimizer=optimizer,
            first=first,
            last=last,
            after=after,
            limit=limit,
        )

    def findings(self, run: str) -> list[FindingView]:
        """All findings of a run, open ones first."""
        return self._get(f"{_of(run)}/findings", list[FindingView])

    def all_findings(
        self,
        *,
        project: str | None = None,
        state: str | None = None,
        severity: str | None = None,
        kind: str | None = None,
        muted: bool | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> FindingPage:
        """One page of the findings of all runs, newest first.

        state: open or resolved. severity: critical, warning or info. kind: as "vanishing".
        """
        return self._get(
            "/api/v1/findings",
            FindingPage,
            project=project,
            state=state,
            severity=severity,
            kind=kind,
            muted=None if muted is None else str(muted).lower(),
            after=after,
            limit=limit,
        )

    def finding(self, finding: int) -> FindingHistory:
        """One finding with all that became of it, the oldest change first."""
        return self._get(f"/api/v1/findings/{finding}", FindingHistory)

    def change_finding(
        self,
        finding: int,
        *,
        muted: bool | None = None,
        acknowledged: bool | None = None,
        note: str = "",
    ) -> FindingHistory:
        """Mute or acknowledge a finding, or take it back. Needs the scope admin.

        A muted one counts for no verdict, and no message is sent of it.
        """
        body = FindingPatch(muted=muted, acknowledged=acknowledged, note=note)
        return self._send("PATCH", f"/api/v1/findings/{finding}", FindingHistory, body)

    def audits(
        self,
        run: str,
        *,
        optimizer: str | None = None,
        layer: str | None = None,
        passed: bool | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> AuditPage:
        """One page of a run's gradients compared with a reference, the last received first.

        passed: whether all layers of an audit did; of `layer` alone where one is named.
        """
        return self._get(
            f"{_of(run)}/audits",
            AuditPage,
            optimizer=optimizer,
            layer=layer,
            passed=None if passed is None else str(passed).lower(),
            after=after,
            limit=limit,
        )

    def send_audit(self, run: str, audit: Audit) -> AuditView:
        """Store a comparison of gradients with a reference; again is safe. Scope ingest.

        Raises CollectorError with status 409 when another one of its key was stored before.
        """
        return self._send("POST", f"{_of(run)}/audits", AuditView, audit)

    def heatmap(
        self,
        run: str,
        optimizer: str,
        statistic: str = "norm",
        *,
        layers: str | None = None,
        **span: Unpack[StepSpan],
    ) -> Heatmap:
        """One statistic over layers and steps: low, mean and high as float32[layers, columns].

        layers: pattern of names, as "blocks.0.*". columns: 400 unless told otherwise.
        """
        named: dict[str, Any] = {"statistic": statistic, "layers": layers}
        return self._get(f"{_of(run)}/heatmap", Heatmap, optimizer=optimizer, **named, **span)

    def histograms(
        self, run: str, optimizer: str, layer: str, **span: Unpack[StepSpan]
    ) -> Histograms:
        """One layer's histograms over steps: counts as uint64[columns, buckets].

        columns: 100 unless told otherwise.
        """
        path = f"{_of(run)}/histograms"
        return self._get(path, Histograms, optimizer=optimizer, layer=layer, **span)

    def layers(self, run: str, optimizer: str) -> LayersView:
        """Each layer's health from 0 to 100, what is open of it, and its last gradient norm."""
        return self._get(f"{_of(run)}/layers", LayersView, optimizer=optimizer)

    def flow(self, run: str, optimizer: str, *, step: int | None = None) -> Flow:
        """Every statistic of every layer at the last detail frame at or before `step`."""
        return self._get(f"{_of(run)}/flow", Flow, optimizer=optimizer, step=step)

    def scalars(self, run: str, optimizer: str, **span: Unpack[StepSpan]) -> Scalars:
        """Loss, learning rate and other scalars over steps: float64[columns] each.

        columns: 1,000 unless told otherwise.
        """
        return self._get(f"{_of(run)}/scalars", Scalars, optimizer=optimizer, **span)

    def compare(
        self, runs: Sequence[str], *, scalar: str = "loss", columns: int = 1000
    ) -> Comparison:
        """Runs side by side: how they went, in what their configurations differ, one scalar."""
        path = "/api/v1/comparison"
        return self._get(path, Comparison, run=list(runs), scalar=scalar, columns=columns)

    def tokens(self) -> list[TokenView]:
        """Tokens without their secrets, newest first. Needs the scope admin."""
        return self._get("/api/v1/tokens", list[TokenView])

    def create_token(
        self, name: str, scopes: Sequence[ScopeName], project: str | None = None
    ) -> NewToken:
        """Make a token, which is shown this once. Needs the scope admin.

        scopes: of ingest, read, admin. project: the only one it is good for; None for all.
        """
        body = TokenRequest(name=name, scopes=list(scopes), project=project)
        return self._send("POST", "/api/v1/tokens", NewToken, body)

    def revoke_token(self, key: str) -> None:
        """Make a token worthless. key: as `tokens` lists it. Needs the scope admin."""
        self._request("DELETE", f"/api/v1/tokens/{quote(key, safe='')}")

    def channels(self) -> list[ChannelView]:
        """Where alerts are sent, and what became of them. Needs the scope admin."""
        return self._get("/api/v1/channels", list[ChannelView])

    def create_channel(self, name: str, url: str, project: str | None = None) -> ChannelView:
        """Send alerts to an Apprise URL as well, as "slack://...". Needs the scope admin.

        project: the only one whose alerts it gets; None for all. The URL is never shown again.
        """
        body = ChannelRequest(name=name, url=url, project=project)
        return self._send("POST", "/api/v1/channels", ChannelView, body)

    def change_channel(
        self,
        channel: str,
        *,
        name: str | None = None,
        url: str | None = None,
        paused: bool | None = None,
    ) -> ChannelView:
        """Change a channel that was made so; what is None stays. Needs the scope admin.

        paused: whether no message goes to it.
        """
        body = ChannelPatch(name=name, url=url, paused=paused)
        return self._send("PATCH", _channel(channel), ChannelView, body)

    def delete_channel(self, channel: str) -> None:
        """Send nothing more to a channel that was made so. Needs the scope admin."""
        self._request("DELETE", _channel(channel))

    def test_channel(self, channel: str) -> None:
        """Send a test message to a channel, named as `channels` does. Needs the scope admin."""
        self._request("POST", f"{_channel(channel)}/test")

    def ready(self) -> bool:
        """Whether the collector and its database answer."""
        try:
            return self._pool.request("GET", f"{self.url}/readyz", retries=False).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def _get(self, path: str, answer: type[T], **query: Any) -> T:
        given = {name: value for name, value in query.items() if value is not None}
        asked = f"?{urlencode(given, doseq=True)}" if given else ""
        return msgspec.msgpack.decode(self._request("GET", path + asked), type=answer)

    def _send(self, method: str, path: str, answer: type[T], body: Question | Wire) -> T:
        content = self._request(method, path, msgspec.json.encode(body))
        return msgspec.msgpack.decode(content, type=answer)

    def _request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        try:
            response = self._pool.request(method, self.url + path, body=body, headers=self._headers)
        except urllib3.exceptions.HTTPError as error:
            raise CollectorError(f"no answer from the collector at {self.url}: {error}") from error
        if response.status >= 300:
            raise CollectorError(_reason(response.data, response.status), response.status)
        return response.data


def _of(run: str) -> str:
    return f"/api/v1/runs/{quote(run, safe='')}"


def _channel(key: str) -> str:
    return f"/api/v1/channels/{quote(key, safe='')}"


def _reason(body: bytes, status: int) -> str:
    try:
        return msgspec.json.decode(body, type=Problem).detail
    except msgspec.DecodeError:
        return f"the collector answered {status}"
