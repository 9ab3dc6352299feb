"""Whatever an agent sends, the collector keeps or refuses it, and then still answers everything."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from synthetic_runs import OPTIMIZER, new_run

from gradwatch.wire.codec import compress, encode_batch, encode_record, pack
from gradwatch.wire.frame import (
    ORIGINS,
    Drops,
    Flight,
    Frame,
    LayerInfo,
    Manifest,
    Operand,
    Origin,
    Record,
    RunEnd,
)
from gradwatch.wire.histogram import BUCKETS
from gradwatch.wire.statistics import BY_NAME
from gradwatch_server.packing import pack_histograms

EXPECTED = {200, 400, 409, 413, 422}
FUZZ = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # each example is a conversation: shrinking one takes minutes
    database=None,
    suppress_health_check=list(HealthCheck),
)

texts = st.text(max_size=20) | st.sampled_from(["\0", "a\0b", "é" * 60, "' OR 1=1 --", "%", "*"])
names = texts.filter(bool)
whole = st.sampled_from([0, 1, 2, 5, 100, 2**31, 2**53]) | st.integers(0, 2**53)
numbers = st.floats(width=32) | st.sampled_from([0.0, 1e-45, 3e38, np.nan, np.inf, -np.inf, -1.0])
times = st.floats() | st.just(1.7e9)
ranks = st.sampled_from([0, 0, 0, 1, 3, 1_000_000])
optimizers = st.sampled_from([OPTIMIZER, OPTIMIZER, "Adam"])
versions = st.sampled_from([1, 1, 1, 2, 2**31, 2**60])
columns = st.lists(st.sampled_from([*BY_NAME]), min_size=1, max_size=10, unique=True).map(tuple)
LAYERS = 3


@st.composite
def matrices(draw: st.DrawFn, rows: int) -> memoryview:
    layers = draw(st.sampled_from([LAYERS, LAYERS, LAYERS, 0, 1]))
    values = draw(st.lists(numbers, min_size=rows * layers, max_size=rows * layers))
    return memoryview(np.array(values, dtype="<f4").tobytes())


histograms = st.one_of(
    st.none(),
    st.binary(max_size=30).map(memoryview),
    st.just(memoryview(compress(bytes(8 << 20)))),
    st.integers(0, 2**32 - 1).map(
        lambda count: pack_histograms(np.full((LAYERS, BUCKETS), count, np.uint32))
    ),
)
layer_infos = st.builds(
    LayerInfo,
    name=names,
    shape=st.lists(st.integers(-(2**62), 2**62), max_size=3).map(tuple),
    dtype=texts,
    module=texts,
    role=st.sampled_from(["weight", "bias", "norm", "embedding"]),
    depth=whole,
    trainable=st.booleans(),
    tied_to=st.lists(names, max_size=2).map(tuple),
    sharding=st.sampled_from(["", "Shard(0)", "?"]),
    held=st.none() | whole,
)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    named = draw(columns)
    return Frame(
        optimizer=draw(optimizers),
        rank=draw(ranks),
        step=draw(whole),
        time=draw(times),
        manifest=draw(versions),
        columns=named,
        values=draw(matrices(len(named))),
        scalars=draw(st.dictionaries(st.just("loss") | names, st.floats(), max_size=3)),
        events=tuple(draw(st.lists(names, max_size=3))),
        histograms=draw(histograms),
    )


@st.composite
def flights(draw: st.DrawFn) -> Flight:
    named = draw(columns)
    steps = sorted(draw(st.sets(whole, min_size=1, max_size=3)))
    return Flight(
        optimizer=draw(optimizers),
        rank=draw(ranks),
        manifest=draw(versions),
        step=draw(whole),
        steps=tuple(steps),
        columns=named,
        values=draw(matrices(len(named) * len(steps))),
        scalars={"loss": tuple(draw(st.floats()) for _ in steps)},
    )


records: st.SearchStrategy[Record] = st.one_of(
    frames(),
    frames(),
    st.builds(
        Manifest,
        optimizer=optimizers,
        version=versions,
        layers=st.lists(layer_infos, max_size=LAYERS),
        rank=ranks,
    ),
    flights(),
    st.builds(
        Origin,
        optimizer=optimizers,
        rank=ranks,
        step=whole,
        kind=st.sampled_from(ORIGINS),
        operation=texts,
        module=texts,
        operands=st.lists(
            st.builds(
                Operand,
                shape=st.tuples(st.integers(-(2**62), 2**62)),
                dtype=texts,
                low=st.floats(),
                high=st.floats(),
            ),
            max_size=2,
        ).map(tuple),
        note=texts,
    ),
    st.builds(Drops, rank=ranks, time=times, counts=st.dictionaries(names, whole, max_size=2)),
    st.builds(
        RunEnd,
        rank=ranks,
        time=times,
        status=st.sampled_from(["finished", "failed"]),
        reason=texts,
    ),
)


def everything_answers(collector: Any, run: str) -> None:
    """Every question that can be asked of a run has an answer, or a problem that is the asker's."""
    for accept in ("application/json", "application/x-msgpack"):
        for optimizer in (OPTIMIZER, "Adam"):
            asked = f"optimizer={optimizer}"
            for path in (
                f"/heatmap?{asked}",
                f"/heatmap?{asked}&statistic=std&columns=2",
                f"/flow?{asked}",
                f"/scalars?{asked}",
                f"/frames?{asked}",
                f"/histograms?{asked}&layer=a",
                "/manifests",
                "/events",
                "/findings",
                "",
            ):
                answer = collector.get(f"/api/v1/runs/{run}{path}", Accept=accept)
                assert answer.status in (200, 404), (path, answer.body)
    for path in ("/metrics", "/api/v1/runs", "/api/v1/findings", f"/api/v1/comparison?run={run}"):
        assert collector.get(path).status == 200, path


@pytest.fixture
def no_failure(caplog: pytest.LogCaptureFixture) -> Any:
    """Nothing that ran in the background failed and was only logged."""
    caplog.set_level(logging.ERROR)
    yield
    assert not caplog.records, caplog.text


def test_records_that_are_well_formed_and_mad_break_nothing(own_collector, no_failure):
    layers = [
        LayerInfo(name=name, shape=(4, 4), dtype="float32", module="L", role="weight", depth=at)
        for at, name in enumerate("abc")
    ]
    first = Manifest(optimizer=OPTIMIZER, version=1, layers=layers)

    @FUZZ
    @given(
        batches=st.lists(st.lists(records, max_size=8), max_size=3), world=st.sampled_from([1, 2])
    )
    def attack(batches: list[list[Record]], world: int) -> None:
        run = new_run(world_size=world)
        own_collector.put(run)
        own_collector.post(run, [msgspec.structs.replace(first, rank=at) for at in range(world)])
        for batch in batches:
            assert own_collector.post(run, batch).status in EXPECTED
        own_collector.judge()
        everything_answers(own_collector, run.id)

    attack()


def test_batches_with_changed_bytes_break_nothing(own_collector, no_failure):
    @FUZZ
    @given(batch=st.lists(records, min_size=1, max_size=3), data=st.data())
    def attack(batch: list[Record], data: st.DataObject) -> None:
        run = new_run()
        own_collector.put(run)
        outside = data.draw(st.booleans())
        body = encode_batch(batch) if outside else b"".join(map(encode_record, batch))
        spoilt = bytearray(body)
        for _ in range(data.draw(st.integers(1, 5))):
            place = data.draw(st.integers(0, len(spoilt) - 1))
            spoilt[place] = data.draw(st.integers(0, 255))
        cut = bytes(spoilt[: data.draw(st.integers(1, len(spoilt)))])
        sent = cut if outside else pack([cut])
        assert own_collector.post_bytes(run, sent).status in EXPECTED
        own_collector.judge()
        assert own_collector.get(f"/api/v1/runs/{run.id}").status == 200

    attack()


def test_a_small_body_that_unpacks_to_a_large_one_is_refused_as_too_large(own_collector):
    run = new_run()
    own_collector.put(run)
    bomb = compress(bytes(200 << 20))
    assert len(bomb) < 100_000
    answer = own_collector.post_bytes(run, bomb)
    assert answer.problem.status == 413
    deep = b"\x91" * (1 << 20)
    assert own_collector.post_bytes(run, compress(deep)).status in (400, 422)
