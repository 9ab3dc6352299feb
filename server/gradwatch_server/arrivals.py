"""What arrives: a request's body on its way to the writer, checked and packed.

All of it is done in the request's own thread, so that the writer, of which there is one, has little
more to do than to write.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import msgspec
import numpy as np

from gradwatch.wire.codec import (
    MAX_RECORDS,
    UNREADABLE,
    BatchError,
    BatchTooLargeError,
    Decoded,
    decode_batch,
    decode_record,
    encode_record,
)
from gradwatch.wire.frame import Frame, FrameError, Rejection
from gradwatch_server.models import DETAILS, NORMS, SCALARS
from gradwatch_server.packing import digest, pack_frame, unpack_histograms

_json = msgspec.json.Decoder(list[Any])


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

    @property
    def size(self) -> int:
        """Bytes that the good ones take, about."""
        return sum(
            len(item.body) + item.record.values.nbytes
            if isinstance(item, ArrivedFrame)
            else len(item.raw)
            for item in self.records
        )


def arrive(body: bytes) -> Arrivals:
    """Read a request's body. Raises BatchError when it is no batch."""
    return _checked(*decode_batch(body))


def _checked(good: list[Decoded], rejected: list[Rejection]) -> Arrivals:
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


def arrive_json(body: bytes) -> Arrivals:
    """Read a request's body that a person wrote. Raises BatchError when it is no batch.

    A frame may give `statistics`, lists of numbers by name, in place of `columns` and `values`;
    null stands for NaN.
    """
    try:
        items = _json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BatchError(f"the body is not a JSON array of records: {error}") from None
    if len(items) > MAX_RECORDS:
        raise BatchTooLargeError(
            f"{len(items)} records in a batch; at most {MAX_RECORDS} are taken"
        )
    good: list[Decoded] = []
    rejected: list[Rejection] = []
    for place, item in enumerate(items):
        try:
            record = decode_record(msgspec.msgpack.encode(_as_sent(item)))
            # As an agent would have sent it: the same frame in both forms is the same frame.
            good.append(Decoded(place, record, encode_record(record)))
        except (*UNREADABLE, OverflowError) as error:
            rejected.append(Rejection(place=place, reason=str(error)))
    return _checked(good, rejected)


def _as_sent(item: Any) -> Any:
    """A record of JSON with a frame's numbers as an agent sends them. Raises FrameError."""
    if not isinstance(item, dict):
        return item
    told: dict[str, Any] = dict(item)
    if isinstance(told.get("scalars"), dict):
        told["scalars"] = {
            name: math.nan if value is None else value for name, value in told["scalars"].items()
        }
    if "statistics" not in told:
        return told
    statistics = told.pop("statistics")
    if not isinstance(statistics, dict) or "values" in told or "columns" in told:
        raise FrameError("statistics: names with lists of numbers, in place of columns and values")
    try:
        with np.errstate(over="ignore"):
            rows = [np.array(row, dtype=np.float64).astype("<f4") for row in statistics.values()]
    except (TypeError, ValueError):
        raise FrameError("statistics: a value is neither a number nor null") from None
    if any(row.ndim != 1 or len(row) != len(rows[0]) for row in rows):
        raise FrameError("statistics: lists of different lengths; each has one number a layer")
    return told | {"columns": list(statistics), "values": b"".join(map(bytes, rows))}


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
    # Skipped steps are judged too, and of a scaler that skips for ever they are all there is.
    judged = broken or "amp_skipped" in frame.events
    return NORMS if frame.columns or judged else SCALARS
