"""The way out: nothing is lost, nothing is stored twice, and nothing reaches the training loop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gradwatch import outlet as outlet_module
from gradwatch import transport
from gradwatch.outlet import QUEUE_LIMIT, Outlet
from gradwatch.settings import Settings
from gradwatch.transport import Transport
from gradwatch.wire.frame import Frame, LayerInfo, Manifest, Record, RunEnd, RunInfo

from .scripted_collector import Answer, Collector, problem

RUN = RunInfo(id="0123456789abcdef" * 2, project="default", name="test", started_at=1.0)
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
MANIFEST = Manifest(
    optimizer="SGD",
    version=1,
    layers=[LayerInfo(name="w", shape=(2,), dtype="float32", module="", role="weight", depth=0)],
)

Open = Callable[..., Outlet]
READ_TIMEOUT_S = transport.READ_TIMEOUT_S  # before the tests shorten it


def frame(step: int, events: tuple[str, ...] = (), layers: int = 1) -> Frame:
    return Frame(
        optimizer="SGD",
        rank=0,
        step=step,
        time=1.0,
        manifest=1,
        columns=("norm",),
        values=memoryview(np.random.default_rng(step).random(layers, dtype="<f4").tobytes()),
        events=events,
    )


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code, in a tenth of the time."""
    monkeypatch.setattr(outlet_module, "FLUSH_EVERY_S", 0.05)
    monkeypatch.setattr(outlet_module, "FIRST_BACKOFF_S", 0.05)
    monkeypatch.setattr(outlet_module, "MAX_BACKOFF_S", 0.2)
    monkeypatch.setattr(transport, "READ_TIMEOUT_S", 0.5)


@pytest.fixture
def opened(spool: Path) -> Iterator[Open]:
    made: list[Outlet] = []

    def make(url: str = "", limit_mb: int = 64, spool: Path = spool, token: str = "") -> Outlet:
        settings = Settings(url=url, token=token, spool=str(spool), spool_limit_mb=limit_mb)
        made.append(Outlet(RUN, 0, settings, lambda: None))
        return made[-1]

    yield make
    for outlet in made:
        outlet.close(1.0)


def put(outlet: Outlet, *records: Record) -> None:
    for record in records:
        outlet.submit(lambda record=record: (record,))


def test_what_is_handed_over_arrives_in_order(opened: Open, collector: Collector) -> None:
    outlet = opened(collector.url)
    put(outlet, MANIFEST, *(frame(step) for step in range(200)))
    assert outlet.close()
    assert collector.runs == {RUN.id: RUN}
    assert collector.records[0] == MANIFEST
    assert collector.steps == list(range(200))
    assert collector.repeated == 0
    assert outlet.drops == {}


def test_a_non_finite_frame_does_not_wait_for_the_next_flush(
    opened: Open, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    outlet = opened(collector.url)
    put(outlet, MANIFEST)
    collector.wait(lambda seen: bool(seen.manifests))
    monkeypatch.setattr(outlet_module, "FLUSH_EVERY_S", 3600)
    put(outlet, frame(1), frame(2, ("non_finite",)))
    collector.wait(lambda seen: seen.steps == [1, 2])


def test_a_non_finite_step_of_hundreds_of_optimizers_goes_in_few_requests(
    opened: Open, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet_module, "URGENT_EVERY_S", 0.5)
    outlet = opened(collector.url)
    put(outlet, MANIFEST, *(frame(step, ("non_finite",)) for step in range(500)))
    collector.wait(lambda seen: seen.steps == list(range(500)))
    assert len(collector.requests) < 50
    assert outlet.drops == {}


def test_nothing_is_lost_or_stored_twice_over_an_outage(
    opened: Open, collector: Collector, spool: Path
) -> None:
    outlet = opened(collector.url)
    put(outlet, MANIFEST, frame(1))
    collector.wait(lambda seen: seen.steps == [1])
    collector.stop()
    for step in range(2, 40):
        put(outlet, frame(step))
    outlet_spooled(spool)
    collector.start()
    put(outlet, frame(40))
    collector.wait(lambda seen: 40 in seen.steps)
    assert outlet.close()
    assert collector.steps == list(range(1, 41))
    assert outlet.drops == {}
    assert list(spool.iterdir()) == []


def outlet_spooled(spool: Path, timeout_s: float = 10.0) -> None:
    """Return once there is a batch on disk; the disk sends no event that could be waited for."""
    end = time.monotonic() + timeout_s
    while not list(spool.glob("*/*.batch")):
        assert time.monotonic() < end
        time.sleep(0.005)


STORED_BUT: dict[str, Answer] = {
    "an answer of 500": Answer(500, store=True),
    "no answer": Answer(cut=True, store=True),
    "an answer that is no collector's": Answer(200, b"<html>hello</html>", store=True),
    "an answer after the timeout": Answer(200, delay_s=1.0, store=True),
}


@pytest.mark.parametrize("what", STORED_BUT)
def test_a_batch_stored_but_acknowledged_with(
    what: str, opened: Open, collector: Collector
) -> None:
    outlet = opened(collector.url)
    put(outlet, MANIFEST)
    collector.wait(lambda seen: bool(seen.manifests))
    collector.answers.append(STORED_BUT[what])
    put(outlet, *(frame(step) for step in range(5)))
    collector.wait(lambda seen: seen.repeated >= 5)
    assert outlet.close()
    assert collector.steps == list(range(5))


REFUSALS: dict[str, Answer] = {
    "500": Answer(500),
    "502 with a page": Answer(502, b"<html>Bad Gateway</html>"),
    "503 with Retry-After as a date": Answer(
        503, headers=(("Retry-After", "Wed, 21 Oct 2026 07:28:00 GMT"),)
    ),
    "404 of another server": Answer(404, b"not found"),
    "a redirect": Answer(307, headers=(("Location", "/elsewhere"),)),
    "a Retry-After that is no number": Answer(429, headers=(("Retry-After", "\u00b2"),)),
    "garbage": Answer(200, os.urandom(1000)),
    "a closed connection": Answer(cut=True),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_batches_are_sent_again_after(what: str, opened: Open, collector: Collector) -> None:
    outlet = opened(collector.url)
    collector.answers.extend([REFUSALS[what]] * 3)
    put(outlet, MANIFEST, frame(1))
    put(outlet, frame(2))
    collector.wait(lambda seen: seen.steps == [1, 2])
    assert outlet.close()
    assert collector.manifests == [MANIFEST]
    assert outlet.drops == {}


def test_a_collector_that_asks_for_a_pause_gets_it(opened: Open, collector: Collector) -> None:
    collector.answers.append(problem(429, "slow down", **{"Retry-After": "1"}))
    outlet = opened(collector.url)
    put(outlet, MANIFEST, frame(1))
    collector.wait(lambda seen: seen.steps == [1])
    first, second, *_ = [when for _, when in collector.requests]
    assert second - first >= 1.0
    assert outlet.close()


def test_a_wrong_token_keeps_everything_on_disk(
    opened: Open, spool: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    guarded = Collector(token="right")
    outlet = opened(guarded.url, token="wrong")
    put(outlet, MANIFEST, frame(1))
    assert not outlet.close()
    assert "a token is needed" in capfd.readouterr().err
    right = opened(guarded.url, token="right")
    put(right, frame(2))
    assert right.close()
    assert guarded.steps == [2]
    assert len(list(spool.glob("*/*.batch"))) >= 1
    guarded.stop()


def test_a_collector_that_lost_its_database_is_told_run_and_layers_again(
    opened: Open, collector: Collector
) -> None:
    outlet = opened(collector.url)
    put(outlet, MANIFEST, frame(1))
    collector.wait(lambda seen: seen.steps == [1])
    collector.forget()
    put(outlet, frame(2))
    collector.wait(lambda seen: seen.steps == [2])
    assert collector.runs == {RUN.id: RUN}
    assert collector.records[0] == MANIFEST
    assert outlet.close()


def test_a_refused_record_is_counted_and_the_others_are_stored(
    opened: Open, collector: Collector
) -> None:
    collector.refuse = lambda record: (
        "step: 2 is no step" if isinstance(record, Frame) and record.step == 2 else ""
    )
    outlet = opened(collector.url)
    put(outlet, MANIFEST, frame(1), frame(2), frame(3))
    collector.wait(lambda seen: seen.steps == [1, 3])
    collector.wait(lambda seen: bool(seen.drops))
    assert outlet.close()
    assert outlet.drops == {"rejected": 1}
    assert collector.drops[0].counts == {"rejected": 1}


def test_a_batch_that_is_refused_whole_is_counted_by_its_records(
    opened: Open, collector: Collector
) -> None:
    outlet = opened(collector.url)
    put(outlet, MANIFEST)
    collector.wait(lambda seen: bool(seen.manifests))
    collector.answers.append(problem(400, "no"))
    outlet.submit(lambda: (frame(1), frame(2), frame(3, ("non_finite",))))
    collector.wait(lambda seen: bool(seen.drops))
    assert outlet.drops == {"rejected": 3}
    assert collector.steps == []
    assert outlet.close()


def test_a_proxy_that_takes_only_small_requests_gets_small_ones(
    opened: Open, collector: Collector
) -> None:
    outlet = opened(collector.url)
    put(outlet, MANIFEST)
    collector.wait(lambda seen: bool(seen.manifests))
    collector.answers.extend([Answer(413), Answer(413)])
    outlet.submit(lambda: tuple(frame(step) for step in range(8)))
    collector.wait(lambda seen: len(seen.steps) == 8)
    assert outlet.close()
    assert collector.steps == list(range(8))
    assert outlet.drops == {}


def test_a_single_record_that_is_too_large_is_dropped_and_counted(
    opened: Open, collector: Collector
) -> None:
    outlet = opened(collector.url)
    put(outlet, MANIFEST)
    collector.wait(lambda seen: bool(seen.manifests))
    collector.answers.append(Answer(413))
    put(outlet, frame(1, ("non_finite",)))
    collector.wait(lambda seen: bool(seen.drops))
    put(outlet, frame(2))
    assert outlet.close()
    assert collector.steps == [2]
    assert outlet.drops == {"rejected": 1}


def test_a_collector_that_hangs_does_not_hold_up_the_end(
    opened: Open, collector: Collector, spool: Path
) -> None:
    collector.always = Answer(hang=True)
    outlet = opened(collector.url)
    put(outlet, MANIFEST, frame(1))
    collector.wait(lambda seen: bool(seen.requests))
    put(outlet, frame(2))
    started = time.monotonic()
    assert not outlet.close(5.0)
    assert time.monotonic() - started < 2.0
    assert len(list(spool.glob("*/*.batch"))) >= 2


def test_a_collector_that_answers_byte_by_byte_holds_nothing_up(
    opened: Open, collector: Collector, spool: Path
) -> None:
    collector.always = Answer(200, b" " * 2000, drip_s=0.1)
    outlet = opened(collector.url)
    put(outlet, MANIFEST, frame(1))
    collector.wait(lambda seen: bool(seen.requests))
    put(outlet, frame(2))
    assert not outlet.close(20.0)
    assert outlet.ended
    assert len(list(spool.glob("*/*.batch"))) >= 2
    assert not outlet.drops


def test_the_end_does_not_wait_until_frames_are_due(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet_module, "FLUSH_EVERY_S", 600.0)
    for _ in range(5):  # what was missed is a wake-up between two instructions
        outlet = opened()
        put(outlet, MANIFEST, frame(1))
        outlet.close(20.0)
        assert outlet.ended


def test_a_fault_at_the_end_is_counted_and_ends_it(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bool:
        raise RuntimeError("no such thing")

    outlet = opened()
    monkeypatch.setattr(outlet, "_keep", fails)
    put(outlet, MANIFEST, frame(1), frame(2))
    outlet.close(20.0)
    assert outlet.ended
    assert outlet.drops["agent_error"] >= 3


def test_what_the_agent_asks_of_a_collector_is_not_in_the_scripts_log(
    opened: Open, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    outlet = opened(collector.url)
    put(outlet, MANIFEST, frame(1))
    assert outlet.close(20.0)
    assert collector.steps == [1]
    assert not caplog.records
    Transport(collector.url).introduce(RUN)
    assert caplog.records, "others who use urllib3 are heard"


def test_the_end_comes_at_its_deadline_whatever_the_thread_is_waiting_for(
    opened: Open, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "READ_TIMEOUT_S", 30.0)
    collector.always = Answer(hang=True)
    outlet = opened(collector.url)
    put(outlet, MANIFEST)
    collector.wait(lambda seen: bool(seen.requests))
    started = time.monotonic()
    assert not outlet.close(0.3)
    assert 0.2 < time.monotonic() - started < 2.0


def test_the_timeouts_together_are_shorter_than_the_end_may_take() -> None:
    assert transport.CONNECT_TIMEOUT_S + READ_TIMEOUT_S < outlet_module.CLOSE_DEADLINE_S


def test_without_a_collector_everything_is_on_disk(
    opened: Open, kept: Callable[[], list[Record]]
) -> None:
    outlet = opened()
    end = RunEnd(rank=0, time=1.0, status="finished")
    put(outlet, MANIFEST, *(frame(step) for step in range(20)), end)
    assert not outlet.close()
    found = kept()
    assert [record.step for record in found if isinstance(record, Frame)] == list(range(20))
    assert found[0] == MANIFEST
    assert found[-1] == end


def test_the_spool_takes_no_more_than_its_limit(opened: Open, spool: Path) -> None:
    outlet = opened(limit_mb=1)
    put(outlet, MANIFEST, *(frame(step, layers=25_000) for step in range(30)))
    outlet.close()
    size = sum(path.stat().st_size for path in spool.glob("*/*"))
    assert 0 < size <= 1 << 20
    assert outlet.drops["spool_full"] >= 10


def test_a_spool_that_cannot_be_made_costs_frames_and_nothing_else(
    opened: Open, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    outlet = opened(spool=file)
    put(outlet, MANIFEST, frame(1))
    outlet.close()
    assert outlet.drops["disk"] >= 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_no_litter(
    opened: Open, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = Path.open

    def full(path: Path, mode: str = "r", *arguments: object, **keywords: object) -> object:
        target = Path("/dev/full") if path.suffix == ".part" else path
        return real_open(target, mode, *arguments, **keywords)  # pyright: ignore

    with monkeypatch.context() as disk:
        disk.setattr(Path, "open", full)
        outlet = opened()
        put(outlet, MANIFEST, frame(1))
        outlet.close()
    assert outlet.drops["disk"] >= 2
    assert list(spool.iterdir()) == []


def test_layers_whose_manifest_was_lost_on_a_broken_disk_are_told_later(
    opened: Open, tmp_path: Path, collector: Collector
) -> None:
    file = tmp_path / "file"
    file.touch()
    collector.stop()
    outlet = opened(collector.url, spool=file)
    put(outlet, MANIFEST, frame(1, ("non_finite",)))
    until(lambda: outlet.drops["disk"] > 0)
    collector.start()
    put(outlet, frame(2))
    collector.wait(lambda seen: 2 in seen.steps)
    assert collector.records[0] == MANIFEST
    collector.wait(lambda seen: bool(seen.drops))
    assert collector.drops[0].counts["disk"] >= 2
    assert outlet.close()


def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_spool_deleted_under_the_job_does_not_stop_it(
    opened: Open, spool: Path, collector: Collector
) -> None:
    collector.stop()
    outlet = opened(collector.url)
    put(outlet, MANIFEST, frame(1))
    outlet_spooled(spool)
    for path in spool.glob("*/*.batch"):
        path.unlink()
    collector.start()
    put(outlet, frame(2))
    put(outlet, frame(3))
    collector.wait(lambda seen: 3 in seen.steps)
    assert outlet.close()
    assert outlet.drops["disk"] >= 1
    assert "agent_error" not in outlet.drops


def test_a_full_queue_drops_frames_and_counts_them_but_never_what_they_need(
    opened: Open, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "READ_TIMEOUT_S", 30.0)
    collector.answers.append(Answer(200, hang=True))
    outlet = opened(collector.url)
    put(outlet, frame(0, ("non_finite",)))
    collector.wait(lambda seen: bool(seen.requests))  # now the thread waits for an answer
    started = time.monotonic()
    put(outlet, *(frame(step) for step in range(1, QUEUE_LIMIT + 500)))
    end = RunEnd(rank=0, time=1.0, status="finished")
    assert outlet.submit(lambda: (MANIFEST,), always=True)
    assert outlet.submit(lambda: (end,), always=True)
    assert time.monotonic() - started < 1.0
    assert outlet.drops["queue_full"] == 499
    collector.stop()  # lets go of the hanging request
    collector.start()
    collector.wait(lambda seen: end in seen.records)
    assert MANIFEST in collector.records
    assert collector.steps == list(range(QUEUE_LIMIT + 1))
    assert outlet.close()


def test_a_record_that_cannot_be_made_is_counted_and_the_rest_goes_on(
    opened: Open, collector: Collector
) -> None:
    def fail() -> tuple[Record, ...]:
        raise RuntimeError("no such device")

    outlet = opened(collector.url)
    put(outlet, MANIFEST)
    outlet.submit(fail)
    put(outlet, frame(1))
    assert outlet.close()
    assert collector.steps == [1]
    assert outlet.drops == {"agent_error": 1}


def test_with_nobody_listening_the_job_ends_quickly_and_nothing_is_lost(
    opened: Open, kept: Callable[[], list[Record]]
) -> None:
    outlet = opened(NOBODY)
    put(outlet, MANIFEST, *(frame(step) for step in range(10)))
    started = time.monotonic()
    assert not outlet.close()
    assert time.monotonic() - started < 2.0
    steps = [record.step for record in kept() if isinstance(record, Frame)]
    assert steps == list(range(10))
