"""What Prometheus sees: every metric of the table, few labels, no finished runs."""

from __future__ import annotations

import subprocess
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from synthetic_runs import OPTIMIZER, dense, detail, healthy, manifest, new_run

from gradwatch.wire.frame import Drops, RunEnd
from gradwatch_server.metrics import SPECS


def samples(collector: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    text = collector.get("/metrics").body.decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


@pytest.fixture
def run(collector):
    info = new_run(name='a "quoted"\nname')
    lost = detail(9, np.full(4, 0.01), broken=[1, 0, 0, 0])
    collector.store(info, [manifest(dense(4)), *healthy(range(9)), lost])
    collector.post(info, [Drops(rank=0, time=1.0, counts={"spool full": 3})])
    return info


def test_promtool_finds_nothing_to_complain_of(collector, run, promtool):
    text = collector.get("/metrics").body
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_every_metric_of_the_table_is_exposed_and_no_other(collector, run):
    text = collector.get("/metrics").body.decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    assert families == set(SPECS)


def test_every_metric_is_documented():
    for spec in SPECS.values():
        assert spec.name.startswith("gradwatch_")
        assert spec.help.endswith((".", ":"))
        assert not set(spec.labels) & {"layer", "step", "rank"}


def test_labels_are_those_of_the_table(collector, run):
    for name, found in samples(collector).items():
        spec = SPECS[name.removesuffix("_total")]
        for sample in found:
            assert set(sample.labels) == set(spec.labels)


def test_values_are_those_of_the_run(collector, run):
    found = samples(collector)

    def value(metric: str, **labels: str) -> float:
        (sample,) = [item for item in found[metric] if item.labels.items() >= labels.items()]
        return sample.value

    assert value("gradwatch_run_step", run=run.id, optimizer=OPTIMIZER) == 9
    assert value("gradwatch_run_frames_total") == 10
    assert value("gradwatch_run_nonfinite_frames_total") == 1
    assert value("gradwatch_run_dropped_frames_total", reason="spool full") == 3
    assert value("gradwatch_findings_open", kind="non_finite", severity="critical") == 1
    assert value("gradwatch_run_info", name=run.name) == 1
    assert value("gradwatch_run_last_frame_timestamp_seconds") == 1e9 + 9
    assert value("gradwatch_alerts", state="pending") == 1
    assert value("gradwatch_batches_waiting") == 0


def test_a_loss_that_is_not_finite_leaves_no_sample(collector):
    run = new_run()
    lost = detail(1, np.full(4, 0.01), loss=float("nan"))
    collector.store(run, [manifest(dense(4)), *healthy([0])])
    assert samples(collector)["gradwatch_run_loss"][0].value == 1.0
    collector.post(run, [lost])
    assert "gradwatch_run_loss" not in samples(collector)


def test_a_run_that_ended_leaves_no_series(collector, run):
    collector.post(run, [RunEnd(rank=0, time=1.0, status="finished")])
    text = collector.get("/metrics").body.decode()
    assert run.id not in text
