"""What arrives: a request's body on its way to the writer, checked and packed.

All of it is done in the request's own thread, so that the writer, of which there is one, has little
more to do than to write.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from gradwatch.wire.codec import Decoded, decode_batch
from gradwatch.wire.frame import Frame, FrameError, Rejection
from gradwatch_server.models import DETAILS, NORMS, SCALARS
from gradwatch_server.packing import digest, pack_frame, unpack_histograms


class ArrivedFrame(NamedTuple):
    """A frame that is ready to be stored."""

    place: int  # in the batch, from 0
    record: Frame
    digest: bytes  # of the frame as it was sent
    body: bytes  # as it is stored
    holds: int  # SCALARS, NORMS or DETAILS
    broken: bool  # tells of a NaN or Inf in a gradient or in the loss


Arrived = ArrivedFrame | Decoded


class Arrivals(NamedTuple):
    """One batch: its good records in their order, and why the others were refused."""

    records: list[Arrived]
    rejected: list[Rejection]


def arrive(body: bytes) -> Arrivals:
    """Read a request's body. Raises BatchError when it is no batch."""
    good, rejected = decode_batch(body)
    records: list[Arrived] = []
    for decoded in good:
        if not isinstance(decoded.record, Frame):
            records.append(decoded)
            continue
        try:
            records.append(arrived(decoded.place, decoded.record, decoded.raw))
        except FrameError as error:
            rejected.append(Rejection(place=decoded.place, reason=str(error)))
    return Arrivals(records, rejected)


def arrived(place: int, frame: Frame, raw: bytes) -> ArrivedFrame:
    """One frame, ready to be stored. Raises FrameError for histograms that are not its layers'."""
    unpack_histograms(frame)
    broken = _is_broken(frame)
    return ArrivedFrame(place, frame, digest(raw), pack_frame(frame), _holds(frame, broken), broken)


def _is_broken(frame: Frame) -> bool:
    counts = frame.row("nonfinite")
    if counts is not None and bool(np.any(counts > 0)):
        return True
    return not math.isfinite(frame.scalars.get("loss", 0.0))


def _holds(frame: Frame, broken: bool) -> int:
    if "mean_abs" in frame.columns:
        return DETAILS
    return NORMS if frame.columns or broken else SCALARS
