"""`gradwatch export` writes what was sent, once, and nothing over what is there."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from synthetic_runs import OPTIMIZER, dense, detail, frame, layer, manifest, new_run

from gradwatch.export import export

LAYERS = 3


def written(collector: Any, *arguments: str | Path) -> Any:
    given = [*map(str, arguments), "--url", collector.url]
    return CliRunner().invoke(export, given)


@pytest.fixture
def sent() -> list[Any]:
    chance = np.random.default_rng(3)
    frames = [detail(step, chance.lognormal(0, 4, LAYERS), loss=1 / step) for step in range(1, 230)]
    broken = [[np.nan, 1.0, np.inf], [4.0, 0.0, 1.0]]
    return [*frames, frame(230, broken, scalars={"loss": float("nan"), "lr": 0.1})]


@pytest.fixture
def run(collector, sent):
    collector.store(info := new_run(), [manifest(dense(LAYERS)), *sent])
    return info


def test_parquet_holds_every_number_that_was_sent(collector, run, sent, tmp_path):
    done = written(collector, run.id, "--to", tmp_path / "run.parquet")
    assert done.exit_code == 0, done.output
    assert f"{len(sent) * LAYERS} rows" in done.output
    table = pq.read_table(tmp_path / "run.parquet")
    assert table["step"].to_pylist() == [item.step for item in sent for _ in range(LAYERS)]
    assert table["layer"].to_pylist() == [item.name for item in dense(LAYERS)] * len(sent)
    for name in ("norm", "absmax", "nonfinite"):
        rows = [item.row(name) for item in sent]
        missing = np.full(LAYERS, np.nan, np.float32)
        expected = np.concatenate([missing if row is None else row for row in rows])
        found = table[name].to_numpy()
        assert np.array_equal(found, np.where(np.isfinite(expected), expected, np.nan), True)
    losses = table["scalar_loss"].to_pylist()[::LAYERS]
    assert losses == [*(item.scalars["loss"] for item in sent[:-1]), None]
    assert table["scalar_lr"].to_pylist()[-1] == 0.1


def test_csv_holds_the_same(collector, run, tmp_path):
    assert written(collector, run.id, "--to", tmp_path / "a.csv").exit_code == 0
    assert written(collector, run.id, "--to", tmp_path / "a.parquet").exit_code == 0
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert list(rows[0]) == list(table[0])
    assert len(rows) == len(table)
    for row, other in zip(rows, table, strict=True):
        told = {name: "" if value is None else value for name, value in other.items()}
        for name in ("norm", "scalar_loss", "step"):
            assert row[name] == told[name] or float(row[name]) == told[name]


def test_a_run_is_found_by_the_beginning_of_its_id_and_cut_by_steps(collector, run, tmp_path):
    target = tmp_path / "few.csv"
    done = written(collector, run.id[:8], "--to", target, "--first", "10", "--last", "12")
    assert done.exit_code == 0, done.output
    with target.open(newline="") as file:
        assert {row["step"] for row in csv.DictReader(file)} == {"10", "11", "12"}


def test_layers_are_named_by_the_manifest_of_their_frame(collector, tmp_path):
    records = [
        manifest([layer("old", 0)]),
        frame(1, [[1.0], [0.0]]),
        manifest([layer("new", 0), layer("old", 1)], version=2),
        frame(2, [[2.0, 3.0], [0.0, 0.0]], manifest=2),
    ]
    collector.store(run := new_run(), records)
    written(collector, run.id, "--to", tmp_path / "a.parquet", "--optimizer", OPTIMIZER)
    table = pq.read_table(tmp_path / "a.parquet")
    rows = zip(*(table[name].to_pylist() for name in ("step", "layer", "norm")), strict=True)
    assert list(rows) == [(1, "old", 1.0), (2, "new", 2.0), (2, "old", 3.0)]


def test_nothing_is_overwritten(collector, run, tmp_path):
    target = tmp_path / "mine.csv"
    target.write_text("mine")
    done = written(collector, run.id, "--to", target)
    assert done.exit_code == 1
    assert "is there already" in done.output
    assert target.read_text() == "mine"


def test_an_export_that_fails_leaves_no_file(collector, run, tmp_path, monkeypatch):
    def fail(*_: Any) -> Any:
        raise OSError("disk full")

    monkeypatch.setattr("gradwatch.export._columns", fail)
    done = written(collector, run.id, "--to", tmp_path / "half.parquet")
    assert isinstance(done.exception, OSError)
    assert list(tmp_path.iterdir()) == []


def test_without_pyarrow_csv_is_named_as_a_way(collector, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = written(collector, run.id, "--to", tmp_path / "a.parquet")
    assert done.exit_code == 1
    assert "gradwatch[arrow]" in done.output
    assert ".csv" in done.output
    assert written(collector, run.id, "--to", tmp_path / "a.csv").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("0" * 32, "--to", "a.csv"), "there is no run"),
        (("0" * 31, "--to", "a.csv"), "no run's id begins with"),
        (("my run", "--to", "a.csv"), "no run's id"),
        (("0" * 32, "--to", "a.xlsx"), ".parquet or .csv"),
        (("0" * 32,), "--to"),
    ],
)
def test_what_cannot_be_exported_is_said(collector, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    done = written(collector, *arguments)
    assert done.exit_code != 0
    assert told in done.output
    assert list(tmp_path.iterdir()) == []
