"""Since when collectors have listened: what a job said to nobody is no silence of its own.

Every collector says now and then that it is there. Times are those of the machines, whose clocks
may differ by less than a gap.
"""

from __future__ import annotations

import logging
import threading
import time

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from gradwatch_server.database import insert_new, writing
from gradwatch_server.models import Listening

log = logging.getLogger(__name__)

BEAT_S = 10.0
# After so long without a word nobody listened, and what is heard then begins anew.
GAP_S = 30.0
THE_ROW = 1


def note(engine: Engine) -> None:
    """Say that a collector listens now."""
    now = time.time()
    with writing(engine) as session:
        row = {"id": THE_ROW, "since": now, "until": now}
        session.execute(insert_new(session, Listening), [row])
        known = session.get_one(Listening, THE_ROW, with_for_update=True)
        if now - known.until > GAP_S:
            known.since = now
        known.until = max(known.until, now)


def since(session: Session) -> float | None:
    """Since when somebody has listened without a gap, in Unix seconds; None when nobody does."""
    row = session.get(Listening, THE_ROW)
    return None if row is None or time.time() - row.until > GAP_S else row.since


class Listener:
    """Says it for one collector, in a thread of its own, from now on until it is closed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._closed = threading.Event()
        # A daemon: a database that never answers must not keep this process from ending.
        threading.Thread(target=self._work, name="listener", daemon=True).start()

    def close(self) -> None:
        """Say no more. Does not wait for a word that is being said."""
        self._closed.set()

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                note(self._engine)
            except SQLAlchemyError as error:
                log.warning("that a collector listens could not be noted: %s", error)
            self._closed.wait(BEAT_S)
