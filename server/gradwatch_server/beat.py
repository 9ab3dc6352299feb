"""Celery's beat for production: any number may run, one of them ticks.

    celery --app gradwatch_server.tasks beat --scheduler gradwatch_server.beat:LeasedScheduler

The one that holds the lease in the database sends the ticks; the others stand by and take over
when it ends. Each tick is claimed in the database before it is sent, and its message is named
after its task and its number: no tick is sent twice, whatever a beat believes of itself.
"""

from __future__ import annotations

import copy
import logging
import os
import socket
import time
import uuid
from functools import cached_property
from typing import Any

from celery.beat import Scheduler
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from gradwatch_server import leases
from gradwatch_server.database import open_database
from gradwatch_server.settings import Settings

log = logging.getLogger(__name__)

LEASE = "beat"
# A beat that was killed is replaced after so long, and a look of the one that stands by.
LEASE_S = 10.0
LOOK_EVERY_S = 3.0


class LeasedScheduler(Scheduler):
    """Ticks while it holds the lease."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._holds: bool | None = None
        self._looked_at = -LOOK_EVERY_S
        super().__init__(*args, **kwargs)

    @cached_property
    def _engine(self) -> Engine:
        return open_database(Settings.load().database)

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Send what is due, when this beat is the one; seconds until the next look."""
        if time.monotonic() - self._looked_at >= LOOK_EVERY_S:
            self._look()
        if not self._holds:
            return LOOK_EVERY_S
        return min(super().tick(*args, **kwargs), LOOK_EVERY_S)

    def _look(self) -> None:
        """Renew the lease, or try to get it."""
        self._looked_at = time.monotonic()
        held = self._holds
        try:
            self._holds = leases.take(self._engine, LEASE, self._holder, LEASE_S)
        except SQLAlchemyError as error:
            self._holds = False
            log.warning("the database does not answer, so this beat stands by: %s", error)
            return
        if self._holds != held:
            log.info("this beat ticks now" if self._holds else "another beat ticks; standing by")

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        """Send one tick, unless it is not this beat's to send. Never raises."""
        every_s = entry.schedule.run_every.total_seconds()
        try:
            window = leases.claim_tick(self._engine, LEASE, self._holder, entry.task, every_s)
        except SQLAlchemyError as error:
            log.warning("the tick of %s is left out: %s", entry.task, error)
            return
        if window is None:
            return
        named = copy.copy(entry)
        named.options = {**entry.options, "task_id": f"{entry.task}/{window}"}
        super().apply_entry(named, producer=producer)

    def close(self) -> None:
        """Let the next beat begin at once."""
        try:
            if self._holds:
                leases.give_back(self._engine, LEASE, self._holder)
        except SQLAlchemyError as error:
            log.warning("the lease ends by itself in %g s: %s", LEASE_S, error)
        finally:
            super().close()
