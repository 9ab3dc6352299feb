"""Right values in jobs of several processes: what all ranks say, put together, is what one
process would have computed by hand in float64 from the whole batch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest

from gradwatch.wire.codec import decode_batch
from gradwatch.wire.frame import Frame, Manifest, Record, RunInfo
from gradwatch_server.merge import Part, merge_frames, merge_layers

SCRIPT = Path(__file__).parent / "parallel_jobs.py"
STEPS = range(1, 15)
Norms = dict[str, float]


class Trained(NamedTuple):
    """runs: of each job, by rank, what that rank put on disk. expected: by job, at each step."""

    runs: dict[str, dict[int, list[Record]]]
    expected: dict[str, list[Norms]]


def train(ranks: int, spool: Path) -> Trained:
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GRADWATCH_")},
        "GRADWATCH_SPOOL": str(spool),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SCRIPT), str(ranks)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    runs: dict[str, dict[int, list[Record]]] = {}
    ids: dict[str, set[str]] = {}
    for folder in spool.iterdir():
        run = msgspec.msgpack.decode((folder / "run").read_bytes(), type=RunInfo)
        assert run.world_size == ranks
        ids.setdefault(run.name, set()).add(run.id)
        rank = int(folder.name.split("-")[1])
        runs.setdefault(run.name, {})[rank] = [
            item.record
            for segment in sorted(folder.glob("*.batch"))
            for item in decode_batch(segment.read_bytes())[0]
        ]
    assert all(len(found) == 1 for found in ids.values()), "all ranks are of one run"
    assert all(len(found) == ranks for found in runs.values())
    return Trained(runs, json.loads(done.stdout))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(3, tmp_path_factory.mktemp("three"))


def frames(records: Sequence[Record]) -> dict[int, Frame]:
    return {record.step: record for record in records if isinstance(record, Frame)}


def manifests(records: Sequence[Record]) -> dict[int, Manifest]:
    return {record.version: record for record in records if isinstance(record, Manifest)}


def merged(ranks: dict[int, list[Record]], step: int) -> tuple[dict[str, dict[str, float]], Frame]:
    """What all ranks that told of a step say of it: by layer, its statistics."""
    parts: list[Part] = []
    for records in ranks.values():
        frame = frames(records).get(step)
        if frame is not None:
            parts.append(Part(frame, manifests(records)[frame.manifest].layers))
    layers = merge_layers([part.layers for part in parts])
    frame = merge_frames(parts, layers, 1)
    table = {
        layer.name: dict(zip(frame.columns, frame.matrix()[:, place].tolist(), strict=True))
        for place, layer in enumerate(layers)
    }
    return table, frame


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "job"),
    [
        (2, "ddp"),
        (2, "fsdp2"),
        (2, "fsdp2 clipped"),
        (2, "tensor parallel"),
        (2, "pipeline"),
        (3, "fsdp2"),
        (3, "fsdp2 clipped"),
    ],
)
def test_the_ranks_together_say_what_one_process_would_have_computed(
    ranks: int, job: str, request: pytest.FixtureRequest
) -> None:
    trained: Trained = request.getfixturevalue("of_two" if ranks == 2 else "of_three")
    for step in STEPS:
        table, frame = merged(trained.runs[job], step)
        expected = dict(trained.expected[job][step - 1])
        before = expected.pop("", None)
        assert table.keys() == expected.keys()
        for name, norm in expected.items():
            assert table[name]["norm"] == pytest.approx(norm, rel=2e-4, abs=1e-9), (step, name)
            assert table[name]["nonfinite"] == 0
        total = np.sqrt(sum(norm**2 for norm in expected.values()))
        assert frame.scalars["total_norm"] == pytest.approx(total, rel=2e-4)
        if before is not None:
            assert frame.scalars["total_norm_before_clip"] == pytest.approx(before, rel=2e-4)


@pytest.mark.slow
def test_a_rank_without_an_element_says_so_and_counts_for_nothing(of_three: Trained) -> None:
    last = of_three.runs["fsdp2"][2]
    held = {layer.name: layer.held for layer in manifests(last)[1].layers}
    assert held == {"0.weight": 5, "0.bias": 1, "2.weight": 0, "2.bias": 0}
    row: Any = frames(last)[12].row("norm")
    assert list(np.isnan(row)) == [False, False, True, True]


@pytest.mark.slow
def test_replicas_send_the_norms_of_few_steps_and_no_details(of_two: Trained) -> None:
    first, second = (frames(of_two.runs["ddp"][rank]) for rank in (0, 1))
    assert list(first) == list(STEPS)
    assert any("absmax" in frame.columns for frame in first.values())
    assert all("absmax" not in frame.columns for frame in second.values())
    assert second.keys().isdisjoint({11, 13, 14})
    for step, frame in second.items():
        np.testing.assert_allclose(frame.row("norm"), first[step].row("norm"), rtol=1e-6)
