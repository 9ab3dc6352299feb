"""docs/api.md names every path of the API, and what it tells people to type works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from synthetic_runs import OPTIMIZER, dense, detail, healthy, manifest, new_run

import gradwatch
from gradwatch.wire.frame import RunInfo
from gradwatch.wire.histogram import BUCKETS
from gradwatch.wire.statistics import BY_NAME
from gradwatch_server.packing import pack_histograms

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
LAYERS = 3


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL
    )


@pytest.fixture
def run(collector: Any) -> RunInfo:
    """A run with all that the examples ask for, and an open finding."""
    broken = detail(12, [0.01] * LAYERS, broken=[1, 0, 0])
    counts = pack_histograms(np.ones((LAYERS, BUCKETS), np.uint32))
    frames = [
        msgspec.structs.replace(item, histograms=counts) for item in healthy(range(12), LAYERS)
    ]
    info = new_run(project="vision", name="resnet", tags=["baseline"])
    collector.store(info, [manifest(dense(LAYERS)), *frames, broken])
    return info


def test_every_path_and_statistic_is_named(collector):
    text = DOCUMENT.read_text().replace("$RUN", "{run}").replace("$ID", "{run}")
    paths = json.loads(collector.get("/openapi.json").body)["paths"]
    assert [path for path in paths if path not in text] == []
    assert [name for name in BY_NAME if f"`{name}`" not in text] == []
    assert OPTIMIZER in text


def test_the_python_examples_run(collector, run, monkeypatch):
    made: list[Any] = []

    def client_of_the_test(url: str, **given: Any) -> Any:
        made.append((url, given))
        return collector.client

    monkeypatch.setattr(gradwatch, "Client", client_of_the_test, raising=False)
    said: dict[str, Any] = {"run": run.id}
    # Making a token would close this collector, which other tests use without one.
    for code in (code for code in blocks("python") if "create_token" not in code):
        exec(compile(code, str(DOCUMENT), "exec"), said)
    assert made == [("http://127.0.0.1:8470", {})]
    assert said["layers"] == [item.name for item in dense(LAYERS)]
    assert said["grid"].mean.shape == (LAYERS, 13)
    assert said["counts"].shape == (12, BUCKETS)
    assert collector.findings(run)["non_finite"].muted


def test_the_python_examples_of_tokens_run(start_collector):
    collector = start_collector(server_token="a-long-random-text")
    (code,) = [code for code in blocks("python") if "create_token" in code]
    said: dict[str, Any] = {"client": collector.client}
    exec(compile(code, str(DOCUMENT), "exec"), said)
    assert said["made"].token.startswith("gw_")
    assert said["made"].view.key in {item.key for item in collector.client.tokens()}


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_shell_examples_run(collector, run, tmp_path):
    examples = [code for code in blocks("sh") if "gradwatch token" not in code]
    assert len(examples) >= 6
    commands = Path(sys.executable).parent
    environ = os.environ | {
        "GRADWATCH_URL": collector.url,
        "RUN": run.id,
        "PATH": f"{commands}:{os.environ['PATH']}",
    }
    for code in examples:
        script = f'set -eu\ncurl() {{ command curl --silent --fail-with-body "$@"; }}\n{code}'
        done = subprocess.run(
            ["bash", "-c", script], env=environ, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, (code, done.stdout, done.stderr)
    assert collector.client.run(run.id).notes == "in the paper"
    assert {path.name for path in tmp_path.iterdir()} == {"run.parquet", "steps.csv"}
    (by_hand,) = collector.client.runs(name="by hand").runs
    assert by_hand.status == "finished"
