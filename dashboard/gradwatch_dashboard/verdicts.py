"""The words, signs and colours of verdicts, severities and states of a run.

Each is said in a word, a sign and a colour, so that none of the three carries it alone. White
text on each colour has a contrast of at least 4.5, so one pill serves light and dark pages.
"""

from __future__ import annotations

from typing import NamedTuple


class Look(NamedTuple):
    """How one verdict or state is shown."""

    word: str
    sign: str
    colour: str


NEUTRAL = "#5b6472"

VERDICTS: dict[str, Look] = {
    "healthy": Look("Healthy", "✓", "#067647"),
    "info": Look("Info", "i", "#175cd3"),
    "warning": Look("Warning", "▲", "#a8500b"),
    "critical": Look("Critical", "✕", "#c4231a"),
    "waiting": Look("Waiting", "…", NEUTRAL),
}

# In rising order, so that a later one is worse.
SEVERITIES: dict[str, Look] = {name: VERDICTS[name] for name in ("info", "warning", "critical")}

STATUSES: dict[str, Look] = {
    "running": Look("Running", "▶", "#175cd3"),
    "finished": Look("Finished", "■", NEUTRAL),
    "failed": Look("Failed", "✕", "#c4231a"),
    "silent": Look("Silent", "‖", "#a8500b"),
}

STATES: dict[str, Look] = {
    "open": Look("Open", "●", "#a8500b"),
    "resolved": Look("Resolved", "✓", "#067647"),
}


def look(table: dict[str, Look], name: str) -> Look:
    """The look of `name`; a name that a newer collector sends is shown as it is."""
    return table.get(name) or Look(name.capitalize() or "Unknown", "?", NEUTRAL)
