"""The spool: batches kept on local disk until a collector has acknowledged them.

A folder a process: `run` introduces the job, and each numbered segment is the body of one request,
ready to send. A lock file, held by the living process, keeps two from draining one folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from gradwatch.wire.frame import RunInfo

RUN_FILE = "run"
LOCK_FILE = "lock"
SUFFIX = ".batch"


class SpoolFullError(OSError):
    """The spool has reached its size limit."""


class Spool:
    """One process's folder of unsent batches, oldest first. Raises OSError when the disk fails."""

    def __init__(self, folder: Path, lock: IO[bytes], limit_bytes: int) -> None:
        self.folder = folder
        self._lock = lock
        self._limit_bytes = limit_bytes
        self._segments = sorted(folder.glob(f"*{SUFFIX}"))
        self._bytes = sum(segment.stat().st_size for segment in self._segments)
        self._next = 1 + (int(self._segments[-1].stem) if self._segments else 0)

    @classmethod
    def create(cls, root: Path, run: RunInfo, rank: int, limit_bytes: int) -> Spool:
        """A new folder below `root` for this process."""
        folder = root / f"{run.id}-{rank}-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        try:
            lock = _lock(folder)
            assert lock is not None
            _write(folder / RUN_FILE, msgspec.msgpack.encode(run))
            return cls(folder, lock, limit_bytes)
        except OSError:
            # A full disk may still take empty folders, one at every attempt.
            shutil.rmtree(folder, ignore_errors=True)
            raise

    @classmethod
    def open(cls, folder: Path) -> Spool | None:
        """An existing folder, or None when a living process holds it."""
        lock = _lock(folder)
        return None if lock is None else cls(folder, lock, 1 << 62)

    @property
    def run(self) -> RunInfo:
        """The run that the batches belong to."""
        return msgspec.msgpack.decode((self.folder / RUN_FILE).read_bytes(), type=RunInfo)

    @property
    def segments(self) -> list[Path]:
        """Unsent batches, oldest first."""
        return list(self._segments)

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def append(self, body: bytes) -> None:
        """Keep one batch. Raises SpoolFullError at the limit, OSError when the disk fails."""
        if self._bytes + len(body) > self._limit_bytes:
            raise SpoolFullError(f"{self.folder} has reached {self._limit_bytes} bytes")
        path = self.folder / f"{self._next:010d}{SUFFIX}"
        _write(path, body)
        self._next += 1
        self._segments.append(path)
        self._bytes += len(body)

    def remove(self, segment: Path) -> None:
        """Forget a batch that was acknowledged. If its file cannot go, it is but sent once more."""
        self._segments.remove(segment)
        with contextlib.suppress(OSError):
            self._bytes -= segment.stat().st_size
            segment.unlink()

    def close(self) -> None:
        """Let go of the folder, and remove it when nothing is left to send."""
        if not self._segments:
            for name in (RUN_FILE, LOCK_FILE):
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        self._lock.close()


def spooled(root: Path) -> Iterator[Path]:
    """Folders below `root` that hold a run, oldest first."""
    if root.is_dir():
        folders = [path for path in root.iterdir() if (path / RUN_FILE).is_file()]
        yield from sorted(folders, key=lambda path: (path / RUN_FILE).stat().st_mtime)


def _write(path: Path, content: bytes) -> None:
    """All of the file or none of it, whenever the process is killed."""
    temporary = path.with_suffix(".part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _lock(folder: Path) -> IO[bytes] | None:
    lock = (folder / LOCK_FILE).open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
