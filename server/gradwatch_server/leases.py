"""Leases: of many processes over one database, one at a time does a thing.

A lease that is not renewed ends by itself, so a holder that was killed is replaced. Times are
those of the machines: their clocks may differ by less than a lease.
"""

from __future__ import annotations

import time

from sqlalchemy import Engine, delete, or_, select, update

from gradwatch_server.database import insert_new, writing
from gradwatch_server.models import Lease, Tick


def take(engine: Engine, name: str, holder: str, seconds: float) -> bool:
    """Take a lease that is free, or renew one's own. Returns whether `holder` has it now."""
    now = time.time()
    until = now + seconds
    with writing(engine) as session:
        free = or_(Lease.holder == holder, Lease.until < now)
        renewed = update(Lease).where(Lease.name == name, free)
        made = insert_new(session, Lease).values(name=name, holder=holder, until=until)
        return any(
            session.scalar(change.returning(Lease.name)) is not None
            for change in (renewed.values(holder=holder, until=until), made)
        )


def give_back(engine: Engine, name: str, holder: str) -> None:
    """End one's own lease, so that nobody has to wait for its end."""
    with writing(engine) as session:
        session.execute(delete(Lease).where(Lease.name == name, Lease.holder == holder))


def holder_of(engine: Engine, name: str) -> str | None:
    """Who has a lease now."""
    with engine.connect() as connection:
        return connection.scalar(
            select(Lease.holder).where(Lease.name == name, Lease.until >= time.time())
        )


def claim_tick(engine: Engine, lease: str, holder: str, task: str, every_s: float) -> int | None:
    """The number of a task's next tick, which nobody else gets.

    None when `holder` has lost the lease, or when the last tick is younger than half of `every_s`:
    a clock that was set back, or a holder that slept through its own replacement.
    """
    now = time.time()
    with writing(engine) as session:
        # Held until the commit, so that ticks of one lease come one after another.
        held = session.scalar(select(Lease).where(Lease.name == lease).with_for_update())
        if held is None or held.holder != holder or held.until < now:
            return None
        tick = session.get(Tick, task)
        if tick is None:
            tick = Tick(task=task, window=0, at=0.0)
            session.add(tick)
        elif 0 <= now - tick.at < every_s / 2:
            return None
        tick.window += 1
        tick.at = now
        return tick.window
