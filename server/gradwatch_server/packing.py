"""Frames at rest: smaller than on the wire, and read back bit for bit.

The bytes of a matrix of floats are put in order of significance before zstd sees them: signs and
exponents of neighbouring layers are alike, mantissas are noise. 300 layers with 8 statistics take
19.5 bytes a layer in place of 32, norms alone 4.7 in place of 8.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradwatch.wire.frame import Frame, FrameError
from gradwatch.wire.histogram import BUCKETS

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Higher levels gain 3 % and take twice the time.
LEVEL = 1
DIGEST_BYTES = 16
FLOAT_BYTES = 4

Ranges = tuple[tuple[int, int], ...]


class Packed(msgspec.Struct, array_like=True, frozen=True):
    """What a row holds of a frame beside its key. Fields may be added at the end alone."""

    time: float
    manifest: int
    columns: tuple[str, ...]
    values: memoryview
    scalars: dict[str, float]
    events: tuple[str, ...]
    histograms: memoryview | None
    # Of a merged frame: the ranks that had not reported, as first and last of each range.
    missing: Ranges = ()


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Packed] = msgspec.msgpack.Decoder(Packed)
_local = threading.local()


def digest(raw: bytes) -> bytes:
    """What tells a repeat from another frame of the same key. raw: the frame as it was sent."""
    return hashlib.sha256(raw).digest()[:DIGEST_BYTES]


def pack_frame(frame: Frame, missing: Ranges = ()) -> bytes:
    """A frame's row. missing: of a merged frame, the ranks that had not reported."""
    return _encoder.encode(
        Packed(
            time=frame.time,
            manifest=frame.manifest,
            columns=frame.columns,
            values=memoryview(squeeze(frame.values)),
            scalars=frame.scalars,
            events=frame.events,
            histograms=frame.histograms,
            missing=missing,
        )
    )


def read_packed(body: bytes) -> Packed:
    """A row as it is, of which nothing is unpacked yet."""
    return _decoder.decode(body)


def unpack_frame(body: bytes, optimizer: str, rank: int, step: int) -> Frame:
    """The frame of a row, with its key."""
    packed = read_packed(body)
    return Frame(
        optimizer=optimizer,
        rank=rank,
        step=step,
        time=packed.time,
        manifest=packed.manifest,
        columns=packed.columns,
        values=memoryview(unsqueeze(packed.values)),
        scalars=packed.scalars,
        events=packed.events,
        histograms=packed.histograms,
    )


def without_histograms(body: bytes) -> bytes:
    """A frame's row without its histograms."""
    return _encoder.encode(msgspec.structs.replace(read_packed(body), histograms=None))


def missing_ranks(body: bytes) -> Ranges:
    """Ranks that had not reported when the frame of this row was merged: first and last of each
    range."""
    return read_packed(body).missing


def unpack_statistics(
    rows: Sequence[Packed], statistics: Collection[str]
) -> dict[str, NDArray[np.float32]]:
    """Statistics of frames that have the same columns and layers, and no other statistic.

    Each float32[frames, layers]. What none of the frames measured is left out.
    """
    columns = rows[0].columns
    content = b"".join(_decompressed(row.values) for row in rows)
    planes = np.frombuffer(content, dtype=np.uint8)
    planes = planes.reshape(len(rows), FLOAT_BYTES, len(columns), -1 if content else 0)
    return {
        name: _interleaved(planes[:, :, place].swapaxes(0, 1))
        for place, name in enumerate(columns)
        if name in statistics
    }


def unpack_histograms(frame: Frame) -> NDArray[np.uint32] | None:
    """Counts of each layer's sample. uint32[layers, BUCKETS], None when the frame has none.

    Raises FrameError when they are not those of the frame's layers.
    """
    if frame.histograms is None:
        return None
    return unpack_samples(frame.histograms, frame.layers).astype(np.uint32)


def unpack_samples(histograms: memoryview, layers: int) -> NDArray[Any]:
    """Counts as they were sent: uint16[layers, BUCKETS], or uint32 where ranks were added up.

    Raises FrameError when they are not those of so many layers.
    """
    count = layers * BUCKETS
    try:
        # One byte more than the widest that is right, so that a bomb is seen and not unpacked.
        content = _decompressed(histograms, 4 * count + 1)
    except zstd.ZstdError as error:
        raise FrameError(f"histograms: not zstd: {error}") from None
    if len(content) not in (2 * count, 4 * count):
        raise FrameError(f"histograms: not zstd of uint16[{layers}, {BUCKETS}]")
    width = "<u2" if len(content) == 2 * count else "<u4"
    return np.frombuffer(content, dtype=width).reshape(-1, BUCKETS)


def pack_histograms(counts: NDArray[np.uint32]) -> memoryview:
    """Counts as a frame carries them. counts: uint32[layers, BUCKETS]."""
    width = "<u2" if counts.max(initial=0) < 1 << 16 else "<u4"
    return memoryview(zstd.compress(counts.astype(width).tobytes(), level=LEVEL))


def squeeze(values: memoryview) -> bytes:
    """Numbers of 4 bytes each, made small: their bytes in order of significance, then zstd."""
    planes = np.frombuffer(values, dtype=np.uint8).reshape(-1, FLOAT_BYTES).T
    compressor: zstd.ZstdCompressor | None = getattr(_local, "compressor", None)
    if compressor is None:
        # One a thread: they are not to be shared, and a new one costs more than a frame.
        compressor = _local.compressor = zstd.ZstdCompressor(level=LEVEL)
    return compressor.compress(planes.tobytes(), mode=zstd.ZstdCompressor.FLUSH_FRAME)


def unsqueeze(squeezed: memoryview) -> bytes:
    """What squeeze was given."""
    planes = np.frombuffer(_decompressed(squeezed), dtype=np.uint8).reshape(FLOAT_BYTES, -1)
    return _interleaved(planes).tobytes()


def _interleaved(planes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Numbers from their bytes in order of significance. planes: uint8[FLOAT_BYTES, ...]."""
    numbers = np.empty((*planes.shape[1:], FLOAT_BYTES), dtype=np.uint8)
    # A plane at a time takes a quarter of what a transposed copy does.
    for place, plane in enumerate(planes):
        numbers[..., place] = plane
    return numbers.view("<f4")[..., 0]


def _decompressed(content: memoryview, most: int = -1) -> bytes:
    """One frame of zstd, without the loop around it in zstd.decompress, which costs as much again.

    Raises ZstdError, and also for what ends too early or goes on behind `most` bytes.
    """
    unpacking = zstd.ZstdDecompressor()
    found = unpacking.decompress(content, most)
    if not unpacking.eof or unpacking.unused_data:
        raise zstd.ZstdError("it does not end where it should")
    return found
