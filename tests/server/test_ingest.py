"""What becomes of a batch: stored once, skipped, or refused with the reason."""

from __future__ import annotations

import math
import os
from typing import Any

import msgspec
import numpy as np
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from synthetic_runs import DETAILS, OPTIMIZER, dense, detail, frame, healthy, manifest, new_run

from gradwatch.transport import Transport, Verdict
from gradwatch.wire.codec import (
    MAX_BATCH_BYTES,
    MAX_BODY_BYTES,
    compress,
    encode_batch,
    encode_record,
    pack,
)
from gradwatch.wire.frame import Drops, Frame, RunEnd
from gradwatch.wire.histogram import BUCKETS
from gradwatch_server import intake
from gradwatch_server.models import FrameRow, Run
from gradwatch_server.packing import unpack_frame, unpack_histograms


def stored_frames(collector: Any) -> list[Frame]:
    with Session(collector.engine) as session:
        rows = session.scalars(select(FrameRow).order_by(FrameRow.step, FrameRow.rank))
        return [unpack_frame(row.body, OPTIMIZER, row.rank, row.step) for row in rows]


def stored_bodies(collector: Any) -> list[bytes]:
    """Frames as they were sent."""
    return [encode_record(frame) for frame in stored_frames(collector)]


def test_introducing_a_run_again_changes_nothing(collector):
    run = new_run()
    assert collector.put(run).status == 200
    assert collector.put(run).status == 200
    with Session(collector.engine) as session:
        assert [row.key for row in session.scalars(select(Run))] == [run.id]


def test_a_run_must_be_introduced_under_its_own_id(collector):
    answer = collector.request(
        "PUT", f"/api/v1/runs/{new_run().id}", msgspec.json.encode(new_run())
    )
    assert answer.status == 422
    assert "id" in answer.problem.detail


def test_frames_read_back_byte_for_byte(collector):
    run, frames = new_run(), healthy(range(20))
    collector.store(run, [manifest(dense(4)), *frames])
    assert stored_bodies(collector) == [encode_record(item) for item in frames]


def test_non_finite_numbers_read_back_bit_for_bit(collector):
    run = new_run()
    quiet_nan, payload_nan = 0x7FC00000, 0x7FC12345
    bits = np.array(
        [[0x7F800000, 0xFF800000, quiet_nan, payload_nan], [1, 1, 1, 1]], dtype=np.uint32
    )
    sent = frame(3, bits.view(np.float32), scalars={"loss": math.inf, "lr": math.nan})
    collector.store(run, [manifest(dense(4)), sent])
    read = stored_frames(collector)[0]
    assert np.array_equal(read.matrix().view(np.uint32), bits)
    assert read.scalars["loss"] == math.inf
    assert math.isnan(read.scalars["lr"])


def test_a_repeated_batch_is_a_no_op(collector):
    run, batch = new_run(), [manifest(dense(4)), *healthy(range(10))]
    first = collector.store(run, batch)
    again = collector.post(run, batch).receipt
    assert (first.stored, first.repeated) == (10, 0)
    assert (again.stored, again.repeated) == (0, 10)
    assert len(stored_bodies(collector)) == 10
    assert collector.client.run(run.id).optimizers[0].frames == 10


def test_a_frame_twice_in_one_batch_is_stored_once(collector):
    run, (once,) = new_run(), healthy([5])
    receipt = collector.store(run, [manifest(dense(4)), once, once])
    assert (receipt.stored, receipt.repeated) == (1, 1)


@pytest.mark.parametrize("in_one_batch", [True, False])
def test_another_frame_of_the_same_step_is_refused_by_name(collector, in_one_batch):
    run = new_run()
    first, other = detail(7, [0.1] * 4), detail(7, [0.2] * 4)
    if in_one_batch:
        collector.put(run)
        answer = collector.post(run, [manifest(dense(4)), first, other])
    else:
        collector.store(run, [manifest(dense(4)), first])
        answer = collector.post(run, [other])
    assert answer.status == 409
    assert collector.client.run(run.id).conflicts == 1
    assert "another frame" in answer.problem.rejected[0]["reason"]
    assert stored_bodies(collector) == [encode_record(first)]


def test_a_batch_with_another_fault_beside_a_conflict_is_refused_as_a_whole_says(collector):
    run = new_run()
    collector.store(run, [manifest(dense(4)), detail(7, [0.1] * 4)])
    answer = collector.post(run, [detail(7, [0.2] * 4), detail(8, [0.2] * 3)])
    assert answer.status == 422
    assert [item["conflict"] for item in answer.problem.rejected] == [True, False]
    assert collector.client.run(run.id).conflicts == 1


def test_the_agent_counts_a_conflict_alone_and_not_the_frames_beside_it(collector):
    run = new_run()
    collector.store(run, [manifest(dense(4)), detail(7, [0.1] * 4)])
    batch = encode_batch([detail(7, [0.2] * 4), *healthy(range(8, 20))])
    outcome = Transport(collector.url).deliver(run.id, batch)
    assert (outcome.verdict, outcome.rejected) == (Verdict.STORED, 1)
    assert collector.client.run(run.id).optimizers[0].frames == 13


@pytest.mark.parametrize(
    "histograms",
    [b"", b"not zstd", compress(bytes(3)), compress(bytes(1 << 26)), compress(bytes(8)) + b"x"],
)
def test_histograms_that_are_none_of_the_frames_layers_are_refused(collector, histograms):
    run = new_run()
    collector.store(run, [manifest(dense(4))])
    bad = msgspec.structs.replace(detail(1, [0.1] * 4), histograms=memoryview(histograms))
    answer = collector.post(run, [bad, detail(2, [0.1] * 4)])
    assert answer.status == 422
    assert [item["place"] for item in answer.problem.rejected] == [0]
    assert "histograms" in answer.problem.rejected[0]["reason"]
    assert len(stored_bodies(collector)) == 1


def test_histograms_read_back_as_they_were_sent(collector):
    run = new_run()
    counts = np.arange(4 * BUCKETS, dtype="<u2")
    sent = msgspec.structs.replace(
        detail(1, [0.1] * 4), histograms=memoryview(compress(counts.tobytes()))
    )
    collector.store(run, [manifest(dense(4)), sent])
    (read,) = stored_frames(collector)
    assert encode_record(read) == encode_record(sent)
    found = unpack_histograms(read)
    assert found is not None
    assert np.array_equal(found.ravel(), counts)


def test_frames_of_other_ranks_and_optimizers_do_not_conflict(collector):
    run = new_run()
    batch = [
        manifest(dense(2), optimizer=name, rank=rank) for name in ("A", "B") for rank in (0, 1)
    ]
    batch += [
        frame(1, [[1, 1], [0, 0]], optimizer=name, rank=rank) for name in "AB" for rank in (0, 1)
    ]
    assert collector.store(run, batch).stored == 4


def test_a_bad_record_is_named_and_the_good_ones_beside_it_are_kept(collector):
    run = new_run()
    collector.put(run)
    good = healthy([1, 2])
    bad = msgspec.msgpack.decode(encode_record(good[0]))
    bad["step"] = -1
    records = [manifest(dense(4)), good[0]]
    body = pack([*map(encode_record, records), msgspec.msgpack.encode(bad), encode_record(good[1])])
    answer = collector.post_bytes(run, body)
    assert answer.status == 422
    assert [item["place"] for item in answer.problem.rejected] == [2]
    assert "$.step" in answer.problem.rejected[0]["reason"]
    assert len(stored_bodies(collector)) == 2


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("columns", ("norm", "loudness"), "columns: 'loudness'"),
        ("columns", ("norm", "norm"), "columns"),
        ("values", b"123", "values: 3 bytes"),
        ("step", "one", "$.step"),
        ("rank", -1, "$.rank"),
        ("nonsense", 1, "nonsense"),
        ("scalars", {"loss": "low"}, "$.scalars"),
        ("optimizer", "", "$.optimizer"),
        ("type", "picture", "picture"),
    ],
)
def test_the_field_that_is_wrong_is_named(collector, field, value, named):
    run = new_run()
    collector.store(run, [manifest(dense(2))])
    record = msgspec.msgpack.decode(encode_record(frame(1, [[1, 2], [0, 0]])))
    answer = collector.post_bytes(run, pack([msgspec.msgpack.encode(record | {field: value})]))
    assert answer.status == 422
    assert named in answer.problem.rejected[0]["reason"]


def test_a_frame_before_its_manifest_is_refused(collector):
    run = new_run()
    collector.put(run)
    answer = collector.post(run, healthy([1]))
    assert answer.status == 422
    assert "manifest" in answer.problem.rejected[0]["reason"]


def test_a_frame_that_counts_layers_otherwise_than_its_manifest_is_refused(collector):
    run = new_run()
    collector.put(run)
    answer = collector.post(run, [manifest(dense(4)), *healthy([1], layers=3)])
    assert "3 layers" in answer.problem.rejected[0]["reason"]


def test_another_manifest_of_the_same_version_is_refused(collector):
    run = new_run()
    collector.store(run, [manifest(dense(4))])
    assert collector.post(run, [manifest(dense(4))]).status == 200
    answer = collector.post(run, [manifest(dense(5))])
    assert answer.status == 409
    assert "version" in answer.problem.rejected[0]["reason"]
    assert collector.client.run(run.id).optimizers[0].layers == 4


def test_a_run_that_nobody_introduced_is_unknown(collector):
    answer = collector.post(new_run(), [manifest(dense(4))])
    assert answer.status == 404
    assert "PUT" in answer.problem.detail


@pytest.mark.parametrize(
    "body", [b"", b"not zstd", compress(b"not msgpack"), compress(msgspec.msgpack.encode({"a": 1}))]
)
def test_garbage_is_refused_as_no_batch(collector, body):
    run = new_run()
    collector.put(run)
    answer = collector.post_bytes(run, body)
    assert answer.status == 400
    assert "the body is not" in answer.problem.detail


def test_half_a_batch_is_refused_as_no_batch(collector):
    run = new_run()
    collector.put(run)
    whole = compress(msgspec.msgpack.encode([os.urandom(1000)]))
    assert collector.post_bytes(run, whole[: len(whole) // 2]).status == 400


def test_a_run_that_introduces_itself_in_garbage_is_refused(collector):
    path = f"/api/v1/runs/{new_run().id}"
    assert collector.request("PUT", path, b"{").problem.status == 400
    assert collector.request("PUT", path, b"\xff\xfe").problem.status == 400
    assert "$.project" in collector.request("PUT", path, b'{"project": 1}').problem.detail


def test_a_run_nested_beyond_reason_is_refused(collector):
    path = f"/api/v1/runs/{new_run().id}"
    body = b'{"config":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
    assert collector.request("PUT", path, body).problem.status == 400


def test_a_body_over_the_limit_is_refused(collector):
    run = new_run()
    collector.put(run)
    assert collector.post_bytes(run, bytes(MAX_BODY_BYTES + 1)).problem.status == 413


def test_a_body_of_json_has_a_limit_of_its_own(collector):
    run = new_run()
    collector.put(run)
    bomb = b"[" + b"[]," * 1_500_000 + b"[]]"
    assert len(bomb) < MAX_BODY_BYTES
    json_type = {"Content-Type": "application/json"}
    path = f"/api/v1/runs/{run.id}"
    assert collector.request("POST", f"{path}/records", bomb, **json_type).problem.status == 413
    body = b'{"config": {"a": ' + bomb + b"}}"
    assert collector.request("PUT", path, body, **json_type).problem.status == 413


def test_what_bodies_unpack_to_is_bounded_while_it_waits(collector, monkeypatch):
    monkeypatch.setattr(intake, "LIMIT_BYTES", 1 << 20)
    run = new_run()
    collector.store(run, [manifest(dense(1000))])
    flat = [frame(step, np.zeros((2, 1000))) for step in range(200)]
    body = encode_batch(flat)
    assert len(body) < 1 << 16
    answer = collector.post_bytes(run, body)
    assert answer.problem.status == 429
    assert answer.headers["Retry-After"]
    assert collector.post(run, flat[:10]).receipt.stored == 10


def test_a_small_body_that_unpacks_to_a_huge_one_is_refused(collector):
    run = new_run()
    collector.put(run)
    bomb = compress(bytes(2 * MAX_BATCH_BYTES))
    assert len(bomb) < 100_000
    assert collector.post_bytes(run, bomb).problem.status == 413


def test_the_number_of_records_in_a_batch_is_limited(collector):
    run = new_run()
    collector.put(run)
    end = encode_record(RunEnd(rank=0, time=1.0, status="finished"))
    assert collector.post_bytes(run, pack([end] * 10_001)).problem.status == 413


NUL = "a\x00b"


@pytest.mark.parametrize(
    "record",
    [
        manifest(dense(2), optimizer=NUL),
        manifest(dense(2), version=2**40),
        msgspec.structs.replace(
            manifest(dense(2)),
            layers=[msgspec.structs.replace(dense(1)[0], name=NUL)],
        ),
        Drops(rank=0, time=1.0, counts={NUL: 1}),
        Drops(rank=0, time=1.0, counts={"full": -1}),
    ],
)
def test_what_no_database_could_hold_is_refused_and_the_rest_is_kept(collector, record):
    run = new_run()
    collector.put(run)
    answer = collector.post(run, [manifest(dense(4)), record, *healthy([1, 2])])
    assert answer.status == 422
    assert [item["place"] for item in answer.problem.rejected] == [1]
    assert len(stored_bodies(collector)) == 2


def test_a_project_that_no_database_could_hold_is_refused(collector):
    assert collector.put(new_run(project=NUL)).problem.status == 422


def test_a_failed_run_says_why_whatever_its_last_words_contain(collector):
    run = new_run()
    end = RunEnd(rank=0, time=1.0, status="failed", reason=f"ValueError: {NUL}")
    collector.store(run, [end])
    shown = collector.client.run(run.id)
    assert shown.status == "failed"
    assert shown.reason.startswith("ValueError: a")


def test_a_clock_that_is_broken_does_not_break_the_run(collector):
    run = new_run()
    frames = [msgspec.structs.replace(item, time=math.nan) for item in healthy([1, 2])]
    collector.store(run, [manifest(dense(4)), *frames])
    assert collector.client.run(run.id).last_step == 2


def test_drops_add_up_by_reason(collector):
    run = new_run()
    collector.store(run, [Drops(rank=0, time=1.0, counts={"full": 2})])
    collector.post(run, [Drops(rank=1, time=2.0, counts={"full": 3, "late": 1})])
    assert collector.client.run(run.id).dropped == {"full": 5, "late": 1}


def test_frames_far_apart_come_in_one_batch(collector):
    run = new_run()
    steps = [0, 2**40, 2**53]
    receipt = collector.store(run, [manifest(dense(4)), *healthy(steps)])
    assert receipt.stored == 3
    shown = collector.client.run(run.id).optimizers[0]
    assert (shown.first_step, shown.last_step) == (0, 2**53)


def test_a_frame_of_scalars_alone_is_stored(collector):
    run = new_run()
    alone = frame(1, np.empty((0, 0)), columns=(), scalars={"loss": 0.5})
    collector.store(run, [manifest(dense(4)), alone])
    assert collector.client.run(run.id).loss == 0.5


def test_every_statistic_of_the_wire_can_be_sent(collector):
    run = new_run()
    sent = detail(1, [0.1, 0.2])
    collector.store(run, [manifest(dense(2)), sent])
    read = stored_frames(collector)[0]
    assert read.columns == DETAILS
    assert np.array_equal(read.matrix(), sent.matrix())
