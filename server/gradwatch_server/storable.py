"""What a well-formed record may still not say, because not every database could hold it."""

from __future__ import annotations

import math

from gradwatch.wire.audit import Audit
from gradwatch.wire.frame import Drops, Flight, Frame, LayerInfo, Manifest, Origin, Record, RunInfo

# The largest of a column of 32 bits.
MAX_VERSION = 2**31 - 1
# As in JSON: sums and products of larger ones fit no column.
MAX_NUMBER = 2**53
# PostgreSQL keeps no text with this character.
NUL = "\x00"


def refusal(record: Record | RunInfo | Audit) -> str | None:
    """Why a record cannot be stored, naming the field; None when it can."""
    match record:
        case RunInfo():
            return _no_nul("project", record.project)
        case Manifest():
            if record.version > MAX_VERSION:
                return f"version: {record.version} is over {MAX_VERSION}"
            refused = _no_nul("optimizer", record.optimizer)
            for layer in record.layers:
                refused = refused or _no_nul("layers.name", layer.name) or _not_a_shape(layer)
            return refused
        case Drops():
            for reason, count in record.counts.items():
                if not 0 <= count <= MAX_NUMBER:
                    return f"counts: {count} frames cannot have been dropped"
                if refused := _no_nul("counts", reason):
                    return refused
            return None
        case Audit():
            named = [("optimizer", record.optimizer), ("dtype", record.dtype)]
            for layer in record.layers:
                named += [("layers.layer", layer.layer), ("layers.module", layer.module)]
            return next((said for each in named if (said := _no_nul(*each))), None)
        case Origin():
            named = {
                name: getattr(record, name) for name in ("operation", "module", "source", "note")
            }
            return next((said for said in map(_no_nul, named, named.values()) if said), None)
        case Flight():
            return next(
                (said for name in record.scalars if (said := _no_nul("scalars", name))), None
            )
        case Frame():
            # Its optimizer and version must be those of a manifest that was stored.
            return None
        case _:
            return None


def _not_a_shape(layer: LayerInfo) -> str | None:
    if min(layer.shape, default=0) < 0 or math.prod(layer.shape) > MAX_NUMBER:
        return f"layers.shape: no tensor has the shape {list(layer.shape)[:8]}"
    return None


def _no_nul(field: str, text: str) -> str | None:
    return f"{field}: {text!r} contains a NUL character" if NUL in text else None


def without_nul(text: str) -> str:
    """Words that matter more than a character in them."""
    return text.replace(NUL, "\N{REPLACEMENT CHARACTER}")
