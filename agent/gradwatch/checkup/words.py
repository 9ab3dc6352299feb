"""Names in sentences."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 4


def listed(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
