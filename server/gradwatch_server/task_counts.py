"""How often workers ran each task, how long it took, and how often it failed.

Any worker adds to the same rows, and any collector shows them: workers come and go, and Prometheus
need not know where they are. A worker adds up for some seconds before it writes.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field

from sqlalchemy import Engine, select

from gradwatch_server.database import insert_new, writing
from gradwatch_server.models import TaskCount

# Seconds that a task took at most, by bucket; after the last comes "+Inf".
BOUNDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 120.0)
NAMES = (*map(str, BOUNDS), "+Inf")
WRITE_EVERY_S = 10.0


@dataclass
class Count:
    """What one worker did of one task since it wrote last."""

    failures: int = 0
    seconds: float = 0.0
    buckets: dict[str, int] = field(default_factory=dict[str, int])


class TaskCounts:
    """One worker process's counts, on their way into the database."""

    def __init__(self) -> None:
        self._counts: dict[str, Count] = {}
        self._written_at = time.monotonic()
        self._lock = threading.Lock()

    def add(self, task: str, seconds: float, failed: bool) -> None:
        """One run of a task."""
        name = NAMES[bisect_left(BOUNDS, seconds)]
        with self._lock:
            count = self._counts.setdefault(task, Count())
            count.failures += failed
            count.seconds += seconds
            count.buckets[name] = count.buckets.get(name, 0) + 1

    def write(self, engine: Engine, at_once: bool = False) -> None:
        """Add what was counted to the database, when it is time for that."""
        with self._lock:
            if not at_once and time.monotonic() - self._written_at < WRITE_EVERY_S:
                return
            counts, self._counts = self._counts, {}
            self._written_at = time.monotonic()
        if not counts:
            return
        with writing(engine) as session:
            empty = {"failures": 0, "seconds": 0.0, "buckets": {}}
            session.execute(
                insert_new(session, TaskCount), [{"task": task, **empty} for task in counts]
            )
            # In one order, so that workers that write at once wait and do not lock each other out.
            chosen = select(TaskCount).where(TaskCount.task.in_(counts)).order_by(TaskCount.task)
            for row in session.scalars(chosen.with_for_update()):
                count = counts[row.task]
                row.failures += count.failures
                row.seconds += count.seconds
                row.buckets = {
                    name: row.buckets.get(name, 0) + count.buckets.get(name, 0) for name in NAMES
                }
