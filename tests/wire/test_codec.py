"""Batches: decoding inverts encoding, and nothing but a BatchError comes of a bad body."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.wire import codec
from gradwatch.wire.codec import (
    MAX_BATCH_BYTES,
    MAX_BODY_BYTES,
    MAX_RECORDS,
    BatchError,
    BatchTooLargeError,
    compress,
    decode_batch,
    encode_batch,
    encode_record,
    pack,
    split,
)
from gradwatch.wire.frame import Drops, Frame, LayerInfo, Manifest, Record, RunEnd
from gradwatch.wire.statistics import BY_NAME

names = st.text(min_size=1, max_size=40).filter(lambda text: text.isprintable())
seconds = st.floats(0, 4e9)
ranks = st.integers(0, 1_000_000)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    columns = tuple(draw(st.lists(st.sampled_from(sorted(BY_NAME)), unique=True)))
    layers = draw(st.integers(0, 5)) if columns else 0
    cells = len(columns) * layers
    numbers = draw(st.lists(st.floats(width=32), min_size=cells, max_size=cells))
    return Frame(
        optimizer=draw(names),
        rank=draw(ranks),
        step=draw(st.integers(0, 2**53)),
        time=draw(seconds),
        manifest=draw(st.integers(1, 1000)),
        columns=columns,
        values=memoryview(np.array(numbers, dtype="<f4").tobytes()),
        scalars=draw(st.dictionaries(names, st.floats(), max_size=5)),
        events=tuple(draw(st.lists(names, max_size=3))),
        histograms=draw(st.none() | st.binary(max_size=50).map(memoryview)),
    )


layer_infos = st.builds(
    LayerInfo,
    name=names,
    shape=st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16", "complex64"]),
    module=st.sampled_from(["Linear", ""]),
    role=st.sampled_from(["weight", "bias", "norm", "embedding"]),
    depth=st.integers(0, 100_000),
    trainable=st.booleans(),
    optimized=st.booleans(),
    tied_to=st.lists(names, max_size=2).map(tuple),
)
manifests = st.builds(
    Manifest,
    optimizer=names,
    version=st.integers(1, 1000),
    layers=st.lists(layer_infos, max_size=4),
    rank=ranks,
)
ends = st.builds(
    RunEnd, rank=ranks, time=seconds, status=st.sampled_from(["finished", "failed"]), reason=names
)
drops = st.builds(
    Drops, rank=ranks, time=seconds, counts=st.dictionaries(names, st.integers(0, 2**60))
)
records = st.one_of(frames(), manifests, ends, drops)


def a_frame(**changes: Any) -> Frame:
    fields: dict[str, Any] = {
        "optimizer": "SGD",
        "rank": 0,
        "step": 1,
        "time": 1.7e9,
        "manifest": 1,
        "columns": ("norm", "nonfinite"),
        "values": memoryview(np.array([1, 2, 0, 0], dtype="<f4").tobytes()),
        "scalars": {"loss": 0.5},
    }
    return Frame(**fields | changes)


def altered(record: Record, **changes: Any) -> bytes:
    """A record's bytes with fields changed after all checks of the types."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(encode_record(record)) | changes)


def exactly(record: Record) -> bytes:
    """NaN is unequal to itself, its bytes are not."""
    return encode_record(record)


@given(st.lists(records, max_size=6))
def test_decoding_a_batch_gives_back_its_records(sent: list[Record]) -> None:
    good, bad = decode_batch(encode_batch(sent))
    assert not bad
    assert [type(item.record) for item in good] == [type(record) for record in sent]
    assert [exactly(item.record) for item in good] == [exactly(record) for record in sent]
    assert [item.raw for item in good] == [exactly(record) for record in sent]
    assert [item.place for item in good] == list(range(len(sent)))


@given(frames())
def test_a_frames_numbers_come_back_to_the_bit(sent: Frame) -> None:
    received = codec.decode_frame(encode_record(sent))
    assert received.matrix().tobytes() == bytes(sent.values)
    for name in sent.columns:
        row = received.row(name)
        assert row is not None
        assert row.tobytes() == sent.matrix()[sent.columns.index(name)].tobytes()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_non_finite_scalars_survive(number: float) -> None:
    good, _ = decode_batch(encode_batch([a_frame(scalars={"loss": number})]))
    record = good[0].record
    assert isinstance(record, Frame)
    assert repr(record.scalars["loss"]) == repr(number)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown field": ({"colour": "red"}, "colour"),
    "a negative step": ({"step": -1}, "step"),
    "a step that is no number": ({"step": "one"}, "step"),
    "a negative rank": ({"rank": -1}, "rank"),
    "manifest version 0": ({"manifest": 0}, "manifest"),
    "an optimizer without a name": ({"optimizer": ""}, "optimizer"),
    "an unknown statistic": ({"columns": ["norm", "colour"]}, "columns: 'colour'"),
    "a statistic named twice": ({"columns": ["norm", "norm"]}, "columns: .*twice"),
    "bytes that are no float32 matrix": ({"values": b"1234567"}, "values: 7 bytes"),
    "values without columns": ({"columns": []}, "values: 16 bytes"),
    "a scalar that is text": ({"scalars": {"loss": "high"}}, "scalars"),
    "another kind of record": ({"type": "picture"}, "picture"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_record_is_refused_by_its_field_and_the_good_ones_beside_it_are_kept(
    what: str,
) -> None:
    changes, told = BAD[what]
    body = pack(
        [
            encode_record(a_frame(step=1)),
            altered(a_frame(step=2), **changes),
            encode_record(a_frame(step=3)),
        ]
    )
    good, bad = decode_batch(body)
    assert [item.place for item in good] == [0, 2]
    assert [rejection.place for rejection in bad] == [1]
    with pytest.raises(ValueError, match=told):
        raise ValueError(bad[0].reason)


def test_counts_of_drops_cannot_be_negative() -> None:
    sent = altered(Drops(rank=0, time=1.0, counts={"disk": 1}), counts={"disk": -1})
    good, bad = decode_batch(pack([sent]))
    assert not good
    assert "counts" in bad[0].reason


def test_a_record_with_text_that_is_not_utf8_is_refused_alone() -> None:
    spoilt = encode_record(a_frame(optimizer="SGD")).replace(b"SGD", b"\xff\xfe\xfd")
    good, bad = decode_batch(pack([spoilt, encode_record(a_frame())]))
    assert [item.place for item in good] == [1]
    assert "utf-8" in bad[0].reason


def test_an_empty_batch_holds_nothing() -> None:
    assert decode_batch(encode_batch([])) == ([], [])


NO_BATCH: dict[str, bytes] = {
    "nothing": b"",
    "plain text": b"hello, is this the collector?",
    "zstd of nothing": compress(b""),
    "zstd of text": compress(b"hello"),
    "a map instead of an array": compress(msgspec.msgpack.encode({"a": 1})),
    "an array that ends early": compress(b"\x93\x01"),
    "an array of four billion items": compress(b"\xdd\xff\xff\xff\xff"),
    "a batch and something after it": compress(b"\x90") + b"more",
    "nesting without end": compress(b"\x91" * 1_000_000),
}


@pytest.mark.parametrize("what", NO_BATCH)
def test_a_body_that_is_no_batch_is_a_batch_error(what: str) -> None:
    with pytest.raises(BatchError):
        decode_batch(NO_BATCH[what])


def test_nesting_inside_a_record_is_refused_with_the_record() -> None:
    deep = altered(a_frame(), scalars={"loss": 1.0})
    bottomless = deep.replace(b"\xcb\x3f\xf0" + bytes(6), b"\x91" * 100_000 + b"\x90")
    assert bottomless != deep
    try:
        good, bad = decode_batch(pack([encode_record(a_frame()), bottomless]))
    except BatchError:
        return  # too deep even to be skipped: the whole body is refused
    assert len(good) == len(bad) == 1


@given(st.data())
def test_a_truncated_body_is_a_batch_error(data: st.DataObject) -> None:
    body = encode_batch([a_frame(step=step) for step in range(3)])
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(BatchError):
        decode_batch(body[:cut])


@given(
    st.lists(records, min_size=1, max_size=3),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1),
)
def test_changed_bytes_give_records_rejections_or_a_batch_error_and_nothing_else(
    sent: list[Record], changes: list[tuple[float, int]]
) -> None:
    content = bytearray(msgspec.msgpack.encode([msgspec.Raw(encode_record(r)) for r in sent]))
    for where, byte in changes:
        content[int(where * len(content))] = byte
    try:
        good, bad = decode_batch(compress(bytes(content)))
    except BatchError:
        return
    assert sorted([item.place for item in good] + [r.place for r in bad]) == list(
        range(len(good) + len(bad))
    )


@given(st.binary(max_size=200))
def test_any_bytes_at_all_give_a_batch_error_or_records(body: bytes) -> None:
    for attempt in (body, compress(body)):
        try:
            good, bad = decode_batch(attempt)
        except BatchError:
            continue
        assert len(good) + len(bad) <= MAX_RECORDS


def test_a_small_body_that_unpacks_to_a_large_one_is_refused_while_unpacking() -> None:
    bomb = compress(bytes(3 * MAX_BATCH_BYTES))
    assert len(bomb) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(BatchTooLargeError, match="unpacks to more than"):
            decode_batch(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2.1 * MAX_BATCH_BYTES
    finally:
        tracemalloc.stop()


def test_a_body_over_its_limit_is_refused_unread() -> None:
    with pytest.raises(BatchTooLargeError, match="a body of"):
        decode_batch(bytes(MAX_BODY_BYTES + 1))


def test_too_many_records_are_refused_before_they_are_made() -> None:
    count = 5_000_000
    body = compress(b"\xdd" + count.to_bytes(4, "big") + b"\xc0" * count)
    tracemalloc.start()
    try:
        with pytest.raises(BatchTooLargeError, match=f"{count} records"):
            decode_batch(body)
        assert tracemalloc.get_traced_memory()[1] < 4 * count
    finally:
        tracemalloc.stop()


def test_as_many_records_as_are_allowed_are_taken() -> None:
    end = RunEnd(rank=0, time=1.0, status="finished")
    good, bad = decode_batch(encode_batch([end] * MAX_RECORDS))
    assert len(good) == MAX_RECORDS
    assert not bad


@given(st.lists(st.binary(max_size=60), max_size=40), st.integers(1, 200))
def test_splitting_keeps_order_and_limit(items: list[bytes], limit: int) -> None:
    groups = list(split(items, limit))
    assert [item for group in groups for item in group] == items
    assert all(group for group in groups)
    assert all(len(group) == 1 or sum(map(len, group)) <= limit for group in groups)
