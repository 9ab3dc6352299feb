"""Acting in the job: the agent judges its own frames, with no collector, and tells the script.

The detectors are those of the collector. They run in the agent's own thread, and only when somebody
asked for it: `on_finding` and `stop_on` have every frame considered, `monitor.findings` judges when
it is read. By default frames are only kept for that.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import msgspec

from gradwatch.health.finding import Finding
from gradwatch.health.judge import judge
from gradwatch.health.kinds import KINDS
from gradwatch.notice import say, told
from gradwatch.windows import BEGINNING_FRAMES, WINDOW_FRAMES, Layout, window_of
from gradwatch.wire.frame import Flight, Frame, Manifest, Origin, Record

OnFinding = Callable[[Finding], object]

MAX_BYTES = 16 << 20
# Judging takes at most a two-hundredth of the time, and not more often than this.
JUDGE_EVERY_S = 2.0
SHARE = 0.005


class TrainingStoppedError(RuntimeError):
    """Raised in the training thread, in `optimizer.step()`, for a finding that `stop_on` names.

    finding: what was found.
    """

    def __init__(self, finding: Finding) -> None:
        kind = KINDS[finding.kind]
        super().__init__(
            f"gradwatch stopped the training, as stop_on={finding.kind!r} asked: "
            f"{finding.summary} What to try: {kind.action}"
        )
        self.finding = finding


class LocalJudge:
    """The frames of this process, and what is wrong with them.

    stop_on: kinds of findings at which the training is to stop. world_size: ranks of the run.
    """

    def __init__(self, stop_on: frozenset[str], world_size: int) -> None:
        self._stop_on = stop_on
        self._world_size = world_size
        self._listeners: list[OnFinding] = []
        self._lock = threading.Lock()
        self._manifests: dict[str, dict[int, Manifest]] = {}
        self._frames: dict[str, collections.deque[Frame]] = {}
        self._bytes = 0
        self._origins: dict[str, Origin] = {}
        self._flights: dict[str, Flight] = {}
        self._open: set[tuple[str, str]] = set()  # optimizer and kind
        self._next_at = 0.0
        self.stop: tuple[str, Finding] | None = None  # why the training is to stop

    @property
    def listening(self) -> bool:
        """Whether somebody asked for judgements."""
        return bool(self._listeners or self._stop_on)

    def listen(self, on_finding: OnFinding) -> None:
        """Have a function called with each finding, once, in the agent's thread."""
        self._listeners.append(on_finding)

    def stop_at(self, kinds: Iterable[str]) -> None:
        """Stop the training at these kinds of findings too."""
        self._stop_on |= frozenset(kinds)

    def take(self, record: Record) -> None:
        """Keep a record, and judge when that is due and somebody asked."""
        with self._lock:
            match record:
                case Manifest():
                    self._manifests.setdefault(record.optimizer, {})[record.version] = record
                case Origin():
                    self._origins.setdefault(record.optimizer, record)
                case Flight():
                    self._flights.setdefault(record.optimizer, record)
                case Frame() if record.columns or record.scalars:
                    self._keep(record)
                case _:
                    return
        if isinstance(record, Frame) and self.listening:
            broken = "non_finite" in record.events
            known = (record.optimizer, "non_finite") in self._open
            if time.monotonic() >= self._next_at or (broken and not known):
                self.tell()

    def tell(self) -> None:
        """Judge now, and act on what is new."""
        started = time.thread_time()
        for optimizer, finding in self._judged():
            if (optimizer, finding.kind) in self._open:
                continue
            self._open.add((optimizer, finding.kind))
            for listener in self._listeners:
                try:
                    listener(finding)
                except Exception as error:
                    say(f"on_finding raised {told(error)}")
            if finding.kind in self._stop_on:
                self.stop = optimizer, finding
        cost_s = time.thread_time() - started
        self._next_at = time.monotonic() + max(JUDGE_EVERY_S, cost_s / SHARE)

    def frames(self, optimizer: str) -> list[Frame]:
        """The frames of one optimizer that were kept, without their histograms."""
        with self._lock:
            return list(self._frames.get(optimizer, ()))

    def layers(self, optimizer: str) -> int:
        """How many layers the newest manifest of one optimizer names."""
        known = self._manifests.get(optimizer, {})
        return len(known[max(known)].layers) if known else 0

    @property
    def findings(self) -> list[Finding]:
        """What is wrong in the frames that were kept, the gravest first. Judges them now."""
        found = [finding for _, finding in self._judged()]
        return sorted(found, key=lambda finding: (-finding.severity.rank, finding.first_step))

    def raise_if_stopped(self) -> None:
        """In the training thread. Raises TrainingStoppedError, once for a finding."""
        if self.stop is None:
            return
        (optimizer, finding), self.stop = self.stop, None
        raise TrainingStoppedError(self._reported(optimizer, finding))

    def _keep(self, frame: Frame) -> None:
        frames = self._frames.setdefault(frame.optimizer, collections.deque())
        # No detector looks at histograms, which are most of a frame.
        frames.append(msgspec.structs.replace(frame, histograms=None))
        self._bytes += frame.values.nbytes
        while len(frames) > WINDOW_FRAMES or (self._bytes > MAX_BYTES and len(frames) > 1):
            # The beginning stays: it says where the run came from.
            oldest = min(BEGINNING_FRAMES, len(frames) // 2)
            self._bytes -= frames[oldest].values.nbytes
            del frames[oldest]

    def _judged(self) -> list[tuple[str, Finding]]:
        with self._lock:
            kept = {name: list(frames) for name, frames in self._frames.items()}
            manifests = {name: list(known.values()) for name, known in self._manifests.items()}
        found: list[tuple[str, Finding]] = []
        for name, frames in kept.items():
            if name not in manifests:
                continue
            window = window_of(Layout(manifests[name]), sorted(frames, key=lambda item: item.step))
            found += [(name, self._reported(name, finding)) for finding in judge(window)]
        return found

    def _reported(self, optimizer: str, finding: Finding) -> Finding:
        """With where a NaN began, and the steps before it, as far as they are known by now."""
        if finding.kind != "non_finite":
            return finding
        told: dict[str, float | int | str] = {}
        summary = finding.summary
        if (origin := self._origins.get(optimizer)) is not None:
            told |= origin.evidence(self._world_size)
            if origin.sentence not in summary:
                summary = f"{summary} {origin.sentence}"
        if (flight := self._flights.get(optimizer)) is not None:
            layers = self._manifests[optimizer][flight.manifest].layers
            told |= flight.evidence([layer.name for layer in layers])
        return replace(finding, summary=summary, evidence={**told, **finding.evidence})
