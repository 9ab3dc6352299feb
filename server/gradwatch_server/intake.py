"""How much a collector takes in at once: bodies in memory are counted, and refused beyond it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from gradwatch_server.writer import BusyError

# Of requests that are not answered yet: their bodies as they came, and what these unpacked to.
LIMIT_BYTES = 512 << 20


class Room:
    """What one request takes of it."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self.held = 0

    def take(self, size: int) -> None:
        """Raises BusyError when there is no room: the agent has a spool, and this process none."""
        if self._intake.held + size > LIMIT_BYTES:
            raise BusyError(f"{LIMIT_BYTES >> 20} MiB of batches wait for the database")
        self._intake.held += size
        self.held += size


class Intake:
    """All requests of one collector; used in its event loop alone."""

    def __init__(self) -> None:
        self.held = 0

    @contextmanager
    def room(self) -> Generator[Room]:
        """Room for one request's body, until it is answered."""
        room = Room(self)
        try:
            yield room
        finally:
            self.held -= room.held
