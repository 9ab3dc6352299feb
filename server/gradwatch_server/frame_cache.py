"""Frames that a worker has read and unpacked, kept for its next look at the same run.

A judgement looks at hundreds of frames, of which a few are new. A frame is known by its step and
the digest of what is stored, so one that was amended, or that came late, is read anew, and it does
not matter who else judged the run meanwhile.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from gradwatch.wire.frame import Frame

# Of one worker process. 512 frames of 300 layers take about 2 MB: enough for 200 such runs.
LIMIT_BYTES = 400 * 2**20
# An optimizer that was not looked at for so long has ended, or another worker looks after it.
IDLE_S = 60.0
# Of a frame beside its numbers: the object, its scalars, its place in a table.
FRAME_BYTES = 1000

# Step, and digest of the stored frame.
Key = tuple[int, bytes]


class _Entry(NamedTuple):
    frames: Mapping[Key, Frame]
    size: int  # bytes
    used: float  # seconds of the monotonic clock


class FrameCache:
    """The frames that the last look at each optimizer saw, within so many bytes.

    When it is full newcomers are not kept: workers go round all runs, and who drops the one that
    waits longest drops the one that comes next.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES, idle_s: float = IDLE_S) -> None:
        self._limit_bytes = limit_bytes
        self._idle_s = idle_s
        self._entries: dict[int, _Entry] = {}  # by optimizer, the one used last at the end
        self._lock = threading.Lock()
        self.size_bytes = 0

    def frames(self, optimizer_id: int) -> Mapping[Key, Frame]:
        """What is known of an optimizer's frames."""
        with self._lock:
            entry = self._entries.get(optimizer_id)
            return entry.frames if entry is not None else {}

    def keep(self, optimizer_id: int, frames: Mapping[Key, Frame]) -> None:
        """Know these frames of an optimizer, and no others."""
        kept = {key: frame for key, frame in frames.items() if key[1]}
        size = sum(FRAME_BYTES + frame.values.nbytes for frame in kept.values())
        now = time.monotonic()
        with self._lock:
            self._drop(optimizer_id)
            for other in [key for key, it in self._entries.items() if now - it.used > self._idle_s]:
                self._drop(other)
            if self.size_bytes + size <= self._limit_bytes:
                self._entries[optimizer_id] = _Entry(kept, size, now)
                self.size_bytes += size

    def _drop(self, optimizer_id: int) -> None:
        entry = self._entries.pop(optimizer_id, None)
        if entry is not None:
            self.size_bytes -= entry.size


def slim(frame: Frame) -> Frame:
    """A frame without what judgements do not look at, and with names that many frames share."""
    return msgspec.structs.replace(
        frame,
        columns=tuple(map(sys.intern, frame.columns)),
        scalars={sys.intern(name): value for name, value in frame.scalars.items()},
        histograms=None,
    )
