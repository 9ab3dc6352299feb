"""What Prometheus sees: every metric of the table, few labels, no finished runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from synthetic_runs import OPTIMIZER, dense, detail, healthy, manifest, new_run

from gradwatch.wire.frame import Drops, RunEnd
from gradwatch_server.metrics import SPECS
from gradwatch_server.telemetry import OWN


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


def test_every_metric_of_the_tables_is_exposed_and_no_other(collector, run):
    text = collector.get("/metrics").body.decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    assert families == {*SPECS, *OWN}


def test_labels_are_few_and_those_of_the_tables(collector, run):
    labels = {name: set(item.labels) for name, item in (SPECS | OWN).items()}
    assert not set().union(*labels.values()) & {"layer", "step", "rank"}
    for family in text_string_to_metric_families(collector.get("/metrics").body.decode()):
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels[family.name]


KINDS = {GaugeMetricFamily: "gauge", CounterMetricFamily: "counter"}


def test_the_document_has_each_metric_and_no_other():
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\| (.+) \|$", text, re.MULTILINE))
    kinds = {name: KINDS.get(spec.kind, "histogram") for name, spec in SPECS.items()}
    kinds |= {name: "histogram" if own.buckets else "counter" for name, own in OWN.items()}
    assert rows == {
        (
            name + ("_total" if kinds[name] == "counter" else ""),
            kinds[name],
            ", ".join(f"`{label}`" for label in item.labels),
            item.help,
        )
        for name, item in (SPECS | OWN).items()
    }


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
