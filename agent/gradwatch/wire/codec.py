"""Batches of records as bytes: a msgpack array, zstd over it.

Each record is decoded on its own, so that a bad one is refused by name and the good ones beside
it are kept.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from gradwatch.wire.frame import Flight, Frame, FrameError, Manifest, Record, Rejection

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CONTENT_TYPE = "application/x-msgpack+zstd"
MAX_BODY_BYTES = 16 << 20
MAX_BATCH_BYTES = 64 << 20
MAX_RECORDS = 10_000
# Level 1: gradients hardly compress, so a higher level buys nothing and costs the job's CPU.
LEVEL = 1
# What decoding raises for bytes that are no record. Text that is not UTF-8 has its own error in
# msgspec, a ValueError beside its DecodeError; so has a frame that contradicts itself.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, FrameError, RecursionError)

_encoder = msgspec.msgpack.Encoder()
_records: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)
_batch = msgspec.msgpack.Decoder(list[msgspec.Raw])


class BatchError(ValueError):
    """A body that is no batch at all: not zstd, not msgpack, or over a limit."""


class BatchTooLargeError(BatchError):
    """A body or its content is over its size limit."""


class Decoded(NamedTuple):
    """One record that was understood, with the bytes that it came in."""

    place: int  # in the batch, from 0
    record: Record
    raw: bytes


def encode_record(record: Record) -> bytes:
    """One record as msgpack, as it is stored."""
    return _encoder.encode(record)


def encode_batch(records: Sequence[Record]) -> bytes:
    """Records as the body of one request."""
    return pack([encode_record(record) for record in records])


def pack(encoded: Sequence[bytes]) -> bytes:
    """Records that are encoded already, as the body of one request."""
    return compress(_encoder.encode([msgspec.Raw(item) for item in encoded]))


def compress(content: bytes) -> bytes:
    """Bytes as one zstd frame."""
    return zstd.compress(content, level=LEVEL)


def decode_batch(body: bytes) -> tuple[list[Decoded], list[Rejection]]:
    """The records of a request's body, and why the others were refused.

    Raises BatchError when the body is no batch, BatchTooLargeError when it is over a limit.
    """
    good: list[Decoded] = []
    bad: list[Rejection] = []
    for place, raw in enumerate(_items(body)):
        try:
            good.append(Decoded(place, decode_record(raw), raw))
        except UNREADABLE as error:
            bad.append(Rejection(place=place, reason=str(error)))
    return good, bad


def _items(body: bytes) -> list[bytes]:
    """The records of a body, each as it came. Raises BatchError."""
    content = decompress(body)
    announced = _array_length(content)
    if announced > MAX_RECORDS:
        raise BatchTooLargeError(f"{announced} records in a batch; at most {MAX_RECORDS} are taken")
    try:
        return [bytes(item) for item in _batch.decode(content)]
    except UNREADABLE as error:
        raise BatchError(f"the body is not a msgpack array of records: {error}") from None


def decode_record(raw: bytes) -> Record:
    """One record, checked. Raises one of UNREADABLE, naming the field where it can."""
    record = _records.decode(raw)
    if isinstance(record, Frame | Flight):
        record.check()
    return record


def decode_frame(raw: bytes) -> Frame:
    """A frame that was checked when it was stored."""
    record = _records.decode(raw)
    assert isinstance(record, Frame)
    return record


def decode_manifest(raw: bytes) -> Manifest:
    """A manifest that was checked when it was stored."""
    record = _records.decode(raw)
    assert isinstance(record, Manifest)
    return record


def decompress(body: bytes) -> bytes:
    """The content of a zstd body, never more than MAX_BATCH_BYTES of it."""
    if len(body) > MAX_BODY_BYTES:
        raise BatchTooLargeError(f"a body of {len(body)} bytes; at most {MAX_BODY_BYTES} are taken")
    unpacking = zstd.ZstdDecompressor()
    try:
        content = unpacking.decompress(body, MAX_BATCH_BYTES + 1)
    except zstd.ZstdError as error:
        raise BatchError(f"the body is not zstd: {error}") from None
    if len(content) > MAX_BATCH_BYTES:
        raise BatchTooLargeError(f"the body unpacks to more than {MAX_BATCH_BYTES} bytes")
    if not unpacking.eof or unpacking.unused_data:
        raise BatchError("the body is not one whole zstd frame")
    return content


def count_records(body: bytes) -> int:
    """How many records a body says it holds. Raises BatchError."""
    return _array_length(decompress(body))


def halve(body: bytes) -> list[bytes]:
    """The same records as two bodies; none when there is but one record. Raises BatchError."""
    items = _items(body)
    middle = len(items) // 2
    return [pack(items[:middle]), pack(items[middle:])] if middle else []


def _array_length(content: bytes) -> int:
    """How many items a msgpack array says it has, 0 when this is none.

    Asked before decoding: 64 MiB of one-byte items would become gigabytes of objects.
    """
    if content[:1] in (b"\xdc", b"\xdd"):
        size = 2 if content[0] == 0xDC else 4
        return int.from_bytes(content[1 : 1 + size], "big")
    return content[0] & 0x0F if content and content[0] & 0xF0 == 0x90 else 0


def split(records: Iterable[bytes], limit: int = 4 << 20) -> Iterable[list[bytes]]:
    """Encoded records in order, cut into groups of at most `limit` bytes (one at least)."""
    group: list[bytes] = []
    size = 0
    for record in records:
        if group and (size + len(record) > limit or len(group) >= MAX_RECORDS):
            yield group
            group, size = [], 0
        group.append(record)
        size += len(record)
    if group:
        yield group
