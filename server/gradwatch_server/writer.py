"""The writer: one thread a process that commits batches in groups.

A request waits for the commit that holds its batch. The queue is bounded: when it is full the
agent is told to come back, since it has a spool and this process has not.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from sqlalchemy import Engine

from gradwatch.wire.frame import Receipt
from gradwatch_server.arrivals import Arrived
from gradwatch_server.database import writing
from gradwatch_server.ingest import Stored, UnknownRunError, store

log = logging.getLogger(__name__)

QUEUE_LIMIT = 256
GROUP_LIMIT = 64


class BusyError(RuntimeError):
    """More batches wait for the database than may."""


class _Waiting(NamedTuple):
    run_key: str
    records: Sequence[Arrived]
    project: str | None
    answer: Future[Receipt]


class Writer:
    """Stores batches in the order of their arrival, many a commit."""

    def __init__(
        self,
        engine: Engine,
        channels: Sequence[str],
        on_alert: Callable[[], None],
        on_commit: Callable[[Sequence[Receipt], float], None] = lambda _receipts, _seconds: None,
    ) -> None:
        self._engine = engine
        self._channels = channels
        self._on_alert = on_alert  # called after a commit that left alerts in the outbox
        self._on_commit = on_commit  # told of each commit and how many seconds it took
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(QUEUE_LIMIT)
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Batches that wait for a commit."""
        return self._queue.qsize()

    def submit(
        self, run_key: str, records: Sequence[Arrived], project: str | None = None
    ) -> Future[Receipt]:
        """Store a batch; the future is done after the commit. Raises BusyError when full.

        project: the only one that the sender may write to; None for any.
        """
        answer: Future[Receipt] = Future()
        try:
            self._queue.put_nowait(_Waiting(run_key, records, project, answer))
        except queue.Full:
            raise BusyError(f"{QUEUE_LIMIT} batches wait for the database") from None
        return answer

    def close(self) -> None:
        """Commit what was taken, then stop."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            group = [first]
            stop = False
            while len(group) < GROUP_LIMIT and not stop:
                try:
                    following = self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    stop = True
                else:
                    group.append(following)
            # From here on nobody can cancel: an answer that cannot be set would end this thread.
            self._commit([item for item in group if item.answer.set_running_or_notify_cancel()])
            if stop:
                return

    def _commit(self, group: list[_Waiting]) -> None:
        """One transaction for the whole group; one by one when it fails, to spare the good."""
        began = time.perf_counter()
        try:
            results = self._store(group)
        except Exception as error:
            if len(group) == 1:
                group[0].answer.set_exception(error)
                return
            for waiting in group:
                self._commit([waiting])
            return
        stored = [result.receipt for result in results if isinstance(result, Stored)]
        self._on_commit(stored, time.perf_counter() - began)
        for waiting, result in zip(group, results, strict=True):
            if isinstance(result, UnknownRunError):
                waiting.answer.set_exception(result)
            else:
                waiting.answer.set_result(result.receipt)
        if any(isinstance(result, Stored) and result.alerted for result in results):
            self.wake()

    def wake(self) -> None:
        """Say that alerts wait in the outbox. Never raises."""
        try:
            self._on_alert()
        except Exception:
            # The schedule finds the alerts without it; this thread must live.
            log.exception("no worker could be woken")

    def _store(self, group: list[_Waiting]) -> list[Stored | UnknownRunError]:
        results: list[Stored | UnknownRunError] = []
        with writing(self._engine) as session:
            for waiting in group:
                try:
                    stored = store(
                        session, waiting.run_key, waiting.records, self._channels, waiting.project
                    )
                    results.append(stored)
                except UnknownRunError as error:
                    results.append(error)
        return results
