"""The outlet: one daemon thread that takes what the training thread hands over and sends it.

The training thread only ever appends to a bounded queue. All waiting, encoding, network and disk
happen here, and nothing that goes wrong here reaches the training loop.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Sequence

from gradwatch.notice import say, told
from gradwatch.settings import Settings
from gradwatch.spool import Spool, SpoolFullError
from gradwatch.transport import THREAD, Outcome, Transport, Verdict
from gradwatch.wire.codec import encode_record, pack, split
from gradwatch.wire.frame import Drops, Frame, Manifest, Record, RunInfo

# A killed process loses at most this much; each request costs the job's machine a few ms of CPU.
FLUSH_EVERY_S = 1.0
URGENT_EVERY_S = 0.2
QUEUE_LIMIT = 1024
WAKE_AT = 128  # frames that wait, at which the thread is woken
BATCH_BYTES = 2 << 20
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
CLOSE_DEADLINE_S = 10.0

# Made in the training thread, called in this one: may wait for a device.
Parcel = Callable[[], Sequence[Record]]


class Outlet:
    """Sends one run's records from this process, by way of the spool when it must."""

    def __init__(
        self, run: RunInfo, rank: int, settings: Settings, on_tick: Callable[[], None]
    ) -> None:
        self.run = run
        self.rank = rank
        self.drops: collections.Counter[str] = collections.Counter()
        self.cpu_s = 0.0  # processor time that this thread has taken
        self._settings = settings
        self._on_tick = on_tick  # called by the thread at least as often as it sends
        self._transport = Transport(settings.url, settings.token) if settings.url else None
        self._spool: Spool | None = None
        self._introduced = False
        self._manifests_owed = False  # the collector may lack some, which no batch on its way has
        self._manifests: dict[tuple[str, int], bytes] = {}
        self._queue: collections.deque[Parcel] = collections.deque()
        self._wake = threading.Event()
        self._encoded: list[bytes] = []
        self._encoded_bytes = 0
        self._backoff_s = FIRST_BACKOFF_S
        self._try_at = 0.0
        self._reported: collections.Counter[str] = collections.Counter()
        self._closing = threading.Event()
        self._closing_at = 0.0
        self._failed_at = -1.0  # when the collector last could not be reached
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
        self._thread.start()

    def submit(self, parcel: Parcel, always: bool = False, hurry: bool = True) -> bool:
        """Hand over without waiting; False when the queue is full and the parcel is dropped.

        always: for what is rare and what frames are worth nothing without. hurry: wake the thread;
        else it comes when it sends the next time, and costs the training thread no switch.
        """
        waiting = len(self._queue)
        if waiting >= QUEUE_LIMIT and not always:
            self.drops["queue_full"] += 1
            return False
        self._queue.append(parcel)
        if hurry or waiting >= WAKE_AT:
            self._wake.set()
        return True

    def close(self, deadline_s: float = CLOSE_DEADLINE_S) -> bool:
        """Send what is there; False when some of it could not be sent by the deadline."""
        self._closing_at = time.monotonic()
        self._closing.set()
        self._wake.set()
        self._thread.join(deadline_s)
        return self.ended and self._spool is None

    @property
    def ended(self) -> bool:
        """Whether the thread is done: what it could not send is on disk by then, or counted."""
        return not self._thread.is_alive()

    def _work(self) -> None:
        flush_at = urgent_at = 0.0
        urgent = False
        while True:
            parcel = self._next_parcel(flush_at - time.monotonic())
            done = parcel is None and self._closing.is_set() and not self._queue
            try:
                self._on_tick()
                urgent = (parcel is not None and self._take(parcel)) or urgent
                # Hundreds of optimizers may meet one NaN: what comes with it, goes with it.
                hurried = urgent and (not self._queue or time.monotonic() >= urgent_at)
                due = hurried or time.monotonic() >= flush_at
                if due or done or self._encoded_bytes >= BATCH_BYTES:
                    urgent = False
                    self._flush()
                    flush_at = time.monotonic() + FLUSH_EVERY_S
                    urgent_at = time.monotonic() + URGENT_EVERY_S
                self.cpu_s = time.thread_time()
                if done:
                    self._end()
                    return
            except Exception as error:
                # The thread must outlive any fault, and its queue must not grow meanwhile.
                self.drops["agent_error"] += 1
                say(f"a frame was lost to an internal error: {told(error)}")
                if done:  # what fails now would fail until the job's patience is over
                    return

    def _next_parcel(self, wait_s: float) -> Parcel | None:
        if not self._queue and not self._closing.is_set():
            self._wake.wait(max(wait_s, 0.0))
            self._wake.clear()  # before the queue is looked at, so that nothing waits unseen
        with contextlib.suppress(IndexError):
            return self._queue.popleft()
        return None

    def _take(self, parcel: Parcel) -> bool:
        """Encode a parcel's records; True when they should not wait."""
        urgent = False
        for record in parcel():
            encoded = encode_record(record)
            if isinstance(record, Manifest):
                self._manifests[record.optimizer, record.version] = encoded
            self._encoded.append(encoded)
            self._encoded_bytes += len(encoded)
            urgent = urgent or (isinstance(record, Frame) and "non_finite" in record.events)
        return urgent

    def _flush(self) -> None:
        drops = self._report_drops()
        groups = list(split(self._encoded, BATCH_BYTES))
        self._encoded, self._encoded_bytes = [], 0
        safe = True
        try:
            if self._transport and self._spool and time.monotonic() >= self._try_at:
                self._drain()
            while groups:
                body = pack(groups[0])
                # While older batches wait on disk, newer ones queue up behind them.
                safe = not self._spool and self._deliver(body)
                safe = safe or self._keep(body, len(groups[0]))
                del groups[0]
        except Exception as error:
            safe = False
            self._lose(sum(map(len, groups)) or 1, "agent_error")
            say(f"frames were lost to an internal error: {told(error)}")
        if not safe:
            self._reported -= drops  # they stood in the last group: say so again

    def _report_drops(self) -> collections.Counter[str]:
        # The training thread counts too: a copy of a dict is one instruction, a difference is not.
        fresh = collections.Counter(dict(self.drops)) - self._reported
        if fresh:
            self._reported += fresh
            record = Drops(rank=self.rank, time=time.time(), counts=dict(fresh))
            self._encoded.append(encode_record(record))
        return fresh

    def _deliver(self, body: bytes) -> bool:
        """Send one batch; True when it needs no keeping."""
        if self._transport is None or time.monotonic() < self._try_at:
            return False
        if not self._introduced and not self._introduce(self._transport):
            return False
        outcome = self._transport.deliver(self.run.id, body)
        if outcome.verdict is Verdict.UNKNOWN_RUN:
            # The collector lost its database: introduce the run and its layers again.
            self._manifests_owed = True
            if not self._introduce(self._transport):
                return False
            outcome = self._transport.deliver(self.run.id, body)
        return self._settle(outcome)

    def _introduce(self, transport: Transport) -> bool:
        if not self._settle(transport.introduce(self.run)):
            return False
        if self._manifests_owed:
            for group in split(self._manifests.values(), BATCH_BYTES):
                if not self._settle(transport.deliver(self.run.id, pack(group))):
                    return False
            self._manifests_owed = False
        self._introduced = True
        return True

    def _settle(self, outcome: Outcome) -> bool:
        """Account for an outcome; True when the request is dealt with."""
        if outcome.verdict in (Verdict.STORED, Verdict.REFUSED):
            self._backoff_s = FIRST_BACKOFF_S
            self._try_at = 0.0
            if outcome.rejected:
                self.drops["rejected"] += outcome.rejected
            if outcome.rejected or outcome.verdict is Verdict.REFUSED:
                say(f"the collector refused something: {outcome.reason}")
            return True
        wait = outcome.retry_after_s or self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
        self._failed_at = time.monotonic()
        self._try_at = self._failed_at + wait
        say(f"{outcome.reason}; keeping frames on disk and trying again")
        return False

    def _drain(self) -> None:
        """Send the spool's batches in order until one fails or another flush is due."""
        spool = self._spool
        assert spool is not None
        started = time.monotonic()
        for segment in spool.segments:
            try:
                body = segment.read_bytes()
            except OSError as error:
                self.drops["disk"] += 1
                say(f"cannot read frames back from disk: {told(error)}")
            else:
                if not self._deliver(body):
                    return
            spool.remove(segment)
            if time.monotonic() - started > FLUSH_EVERY_S and not self._closing.is_set():
                return
        spool.close()
        self._spool = None

    def _keep(self, body: bytes, records: int) -> bool:
        """Put a batch on disk, or drop and count it. True when it is safe."""
        try:
            if self._spool is None:
                limit = self._settings.spool_limit_mb << 20
                self._spool = Spool.create(self._settings.spool_dir, self.run, self.rank, limit)
                for group in split(self._manifests.values(), BATCH_BYTES):
                    self._spool.append(pack(group))
            self._spool.append(body)
            return True
        except SpoolFullError:
            self._lose(records, "spool_full")
            say(f"the spool has reached its limit of {self._settings.spool_limit_mb} MB")
        except OSError as error:
            self._lose(records, "disk")
            # Without the file's name, which differs at every attempt: it is said but once.
            why = error.strerror or told(error)
            say(f"cannot keep frames in {self._settings.spool_dir}: {why}")
        return False

    def _lose(self, records: int, reason: str) -> None:
        self.drops[reason] += records
        # There may have been a manifest among them, which later frames are worth nothing without.
        self._introduced, self._manifests_owed = False, True

    def _end(self) -> None:
        # One more try, but no second wait for a collector that has just been seen not to answer.
        if self._spool and self._transport and self._failed_at < self._closing_at:
            self._try_at = 0.0
            self._drain()
        if self._spool:
            self._spool.close()
        if self._transport:
            self._transport.close()
