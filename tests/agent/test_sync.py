"""The spool and `gradwatch sync`: what is on disk reaches a collector, once, in order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gradwatch import sync as sync_module
from gradwatch.spool import RUN_FILE, Spool, SpoolFullError, spooled
from gradwatch.sync import sync
from gradwatch.wire.codec import encode_batch
from gradwatch.wire.frame import Frame, RunInfo

from .scripted_collector import Answer, Collector, problem


def run_info(digit: str = "a") -> RunInfo:
    return RunInfo(id=digit * 32, project="default", name=f"run {digit}", started_at=1.0)


def batch(*steps: int) -> bytes:
    return encode_batch(
        [
            Frame(
                optimizer="SGD",
                rank=0,
                step=step,
                time=1.0,
                manifest=1,
                columns=(),
                values=memoryview(b""),
            )
            for step in steps
        ]
    )


def write(root: Path, digit: str = "a", batches: int = 3) -> Path:
    """A spool as a finished process leaves it."""
    spool = Spool.create(root, run_info(digit), 0, 1 << 20)
    for step in range(batches):
        spool.append(batch(2 * step, 2 * step + 1))
    spool.close()
    return spool.folder


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_module, "PAUSE_S", 0.01)


def synced(url: str) -> Result:
    return CliRunner().invoke(sync, ["--url", url])


def test_batches_come_back_in_the_order_they_went_in(tmp_path: Path) -> None:
    folder = write(tmp_path, batches=12)
    spool = Spool.open(folder)
    assert spool is not None
    assert spool.run == run_info()
    assert [path.read_bytes() for path in spool.segments] == [
        batch(2 * step, 2 * step + 1) for step in range(12)
    ]
    assert spool.size_bytes == sum(path.stat().st_size for path in spool.segments)
    spool.append(batch(99))
    assert spool.segments[-1].read_bytes() == batch(99)
    spool.close()


def test_a_spool_at_its_limit_takes_no_more_until_something_is_sent(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, run_info(), 0, 25)
    spool.append(b"x" * 20)
    with pytest.raises(SpoolFullError):
        spool.append(b"y" * 10)
    spool.remove(spool.segments[0])
    spool.append(b"y" * 10)
    assert [path.read_bytes() for path in spool.segments] == [b"y" * 10]
    spool.close()


def test_an_emptied_spool_leaves_no_folder(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, run_info(), 0, 100)
    spool.append(b"x")
    spool.remove(spool.segments[0])
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_a_spool_that_a_process_holds_cannot_be_opened(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, run_info(), 0, 100)
    assert Spool.open(spool.folder) is None
    spool.append(b"x")
    spool.close()
    again = Spool.open(spool.folder)
    assert again is not None
    again.close()


def test_everything_is_sent_run_by_run_and_leaves_the_disk(
    spool: Path, collector: Collector
) -> None:
    write(spool, "a")
    write(spool, "b", batches=1)
    result = synced(collector.url)
    assert result.exit_code == 0, result.output
    assert set(collector.runs) == {"a" * 32, "b" * 32}
    assert collector.steps == [0, 1, 2, 3, 4, 5, 0, 1]
    assert list(spool.iterdir()) == []


def test_syncing_again_finds_nothing_to_send(spool: Path, collector: Collector) -> None:
    write(spool)
    synced(collector.url)
    result = synced(collector.url)
    assert result.exit_code == 0
    assert "Nothing to send" in result.output
    assert collector.repeated == 0


def test_an_interrupted_sync_is_taken_up_where_it_stopped(
    spool: Path, collector: Collector
) -> None:
    write(spool)
    # The run, the first batch, and a second one stored but never acknowledged.
    collector.answers.extend([Answer(200, b'{"stored":1,"repeated":0}', store=True)] * 2)
    collector.answers.extend([Answer(500, store=True)] * sync_module.ATTEMPTS)
    result = synced(collector.url)
    assert result.exit_code == 1
    assert "what is left stays on disk" in result.output
    assert len(list(spool.glob("*/*.batch"))) == 2
    collector.answers.clear()
    assert synced(collector.url).exit_code == 0
    assert collector.steps == [0, 1, 2, 3, 4, 5]


def test_a_run_that_is_being_recorded_is_left_alone(spool: Path, collector: Collector) -> None:
    living = Spool.create(spool, run_info("a"), 0, 1 << 20)
    living.append(batch(1))
    write(spool, "b", batches=1)
    result = synced(collector.url)
    assert result.exit_code == 0
    assert "still being recorded" in result.output
    assert set(collector.runs) == {"b" * 32}
    assert len(living.segments) == 1
    living.close()


@pytest.fixture
def held_by_a_process(spool: Path) -> Iterator[Path]:
    """A spool whose lock another process holds until the test ends."""
    folder = write(spool)
    code = (
        "import sys, pathlib, gradwatch.spool as s\n"
        "held = s.Spool.open(pathlib.Path(sys.argv[1]))\n"
        "print(held is not None, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "True"
        yield folder
        process.kill()


def test_the_lock_holds_between_processes_and_goes_with_a_killed_one(
    held_by_a_process: Path, collector: Collector, request: pytest.FixtureRequest
) -> None:
    assert "still being recorded" in synced(collector.url).output
    assert collector.steps == []


def test_a_spoilt_spool_does_not_hinder_the_others(spool: Path, collector: Collector) -> None:
    spoilt = write(spool, "a")
    (spoilt / RUN_FILE).write_bytes(b"\xc1 not a run")
    write(spool, "b", batches=1)
    result = synced(collector.url)
    assert result.exit_code == 0
    assert "cannot be read" in result.output
    assert set(collector.runs) == {"b" * 32}
    assert spoilt.is_dir()


def test_a_spoilt_batch_is_told_and_the_others_are_sent(spool: Path, collector: Collector) -> None:
    folder = write(spool)
    sorted(folder.glob("*.batch"))[1].write_bytes(b"")
    result = synced(collector.url)
    assert result.exit_code == 0
    assert "refused 1 records" in result.output
    assert collector.steps == [0, 1, 4, 5]


def test_files_of_others_in_the_spools_folder_are_not_runs(spool: Path) -> None:
    spool.mkdir()
    (spool / "notes.txt").touch()
    (spool / "folder").mkdir()
    assert list(spooled(spool)) == []
    assert list(spooled(spool / "missing")) == []


def test_without_a_collectors_address_sync_asks_for_it(spool: Path) -> None:
    write(spool)
    result = CliRunner().invoke(sync, [])
    assert result.exit_code == 2
    assert "GRADWATCH_URL" in result.output


def test_a_wrong_token_ends_sync_with_the_reason_at_once(spool: Path, collector: Collector) -> None:
    write(spool)
    collector.always = problem(401, "this token is not known")
    result = synced(collector.url)
    assert result.exit_code == 1
    assert "this token is not known" in result.output
    assert len(collector.requests) == 1
    assert len(list(spool.glob("*/*.batch"))) == 3
