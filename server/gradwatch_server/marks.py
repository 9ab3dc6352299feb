"""Marks: which stretches of frames have changed and are to be folded."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from gradwatch_server.models import StretchDue
from gradwatch_server.tiers import stretch_steps


def mark_stretches(
    session: Session, optimizer_id: int, steps: Iterable[int], tier: int = 1
) -> None:
    """Note that what is stored of these steps has changed, within the caller's transaction."""
    span = stretch_steps(tier)
    starts = sorted({step - step % span for step in steps})
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    marking = dialect.insert(StretchDue.__table__).on_conflict_do_update(  # pyright: ignore
        index_elements=["optimizer_id", "tier", "start"],
        set_={"changes": StretchDue.changes + 1},
    )
    rows = [
        {
            "optimizer_id": optimizer_id,
            "tier": tier,
            "start": start,
            "until": start + span,
            "changes": 1,
            "leased_until": 0.0,
        }
        for start in starts
    ]
    if rows:
        session.execute(marking, rows)
