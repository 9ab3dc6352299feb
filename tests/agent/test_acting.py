"""Acting in the job: findings told to the script, and training stopped when it asked for that."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import Finding, TrainingStoppedError, acting
from gradwatch.settings import SettingError
from gradwatch.wire.frame import Record

Kept = Callable[[], list[Record]]
BREAKS_AT = 15


def job(**keywords: object) -> tuple[gradwatch.Monitor, Iterator[int]]:
    """A job whose loss takes the logarithm of zero from its 15th step on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    watching = gradwatch.watch(model, optimizer, **keywords)  # pyright: ignore

    def steps() -> Iterator[int]:
        for step in range(1, 500):
            output: Tensor = model(torch.randn(8, 4)).abs()
            loss = torch.log(output * 0 if step >= BREAKS_AT else output + 1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield step
            if step >= BREAKS_AT:
                time.sleep(0.01)  # so that the agent's thread has its turn

    return watching, steps()


def test_findings_are_told_without_a_collector_each_once() -> None:
    told: list[Finding] = []
    watching, steps = job(on_finding=told.append)
    for _ in range(BREAKS_AT + 30):
        next(steps)
    watching.finish()
    (finding,) = told
    assert (finding.kind, finding.first_step) == ("non_finite", BREAKS_AT)
    assert finding.severity == "critical"


def test_findings_can_be_read_at_any_time_and_name_the_operation() -> None:
    watching, steps = job()
    for _ in range(BREAKS_AT - 1):
        next(steps)
    assert watching.findings == []
    for _ in range(30):
        next(steps)
    watching.finish()
    (finding,) = watching.findings
    assert finding.kind == "non_finite"
    assert "log at test_acting.py" in str(finding.evidence["began in"])
    assert "It began in log" in finding.summary


def test_training_stops_at_the_next_step_when_it_is_asked_to() -> None:
    watching, steps = job(stop_on=("non_finite",))
    with pytest.raises(TrainingStoppedError) as raised:
        for _ in steps:
            pass
    assert raised.value.finding.first_step == BREAKS_AT
    text = str(raised.value)
    assert f"at step {BREAKS_AT}" in text
    assert "stop_on='non_finite'" in text
    assert "What to try: " in text
    assert watching.findings[0].last_step < BREAKS_AT + 100


def test_the_script_may_go_on_after_it() -> None:
    _, steps = job(stop_on="non_finite")
    with pytest.raises(TrainingStoppedError):
        for _ in steps:
            pass
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()


def test_by_default_nothing_is_judged_and_nothing_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acting, "judge", lambda window: pytest.fail("judged"))
    watching, steps = job()
    for _ in range(BREAKS_AT + 20):
        next(steps)
    watching.finish()
    assert watching.dropped == {}


def test_kinds_that_were_not_named_do_not_stop_it() -> None:
    watching, steps = job(stop_on=("vanishing", "dead_units"))
    for _ in range(BREAKS_AT + 30):
        next(steps)
    watching.finish()


def test_a_second_watch_adds_its_kinds() -> None:
    job(stop_on=("vanishing",))
    _, steps = job(stop_on=("non_finite",))
    with pytest.raises(TrainingStoppedError):
        for _ in steps:
            pass


def test_a_callback_that_fails_is_said_and_does_no_harm(capfd: pytest.CaptureFixture[str]) -> None:
    def fails(finding: Finding) -> None:
        raise KeyError(finding.kind)

    watching, steps = job(on_finding=fails)
    for _ in range(BREAKS_AT + 30):
        next(steps)
    watching.finish()
    assert "on_finding raised KeyError: 'non_finite'" in capfd.readouterr().err
    assert watching.dropped == {}


def test_a_kind_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(SettingError, match="known are vanishing, exploding"):
        job(stop_on=("nan",))


def test_a_callback_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="on_finding takes a function, not int"):
        job(on_finding=3)


def test_what_is_kept_for_judging_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acting, "MAX_BYTES", 1000)
    watching, steps = job()
    for _ in range(BREAKS_AT - 1):
        next(steps)
    assert watching._job is not None
    judge = watching._job.judge
    watching.finish()
    assert sum(frame.values.nbytes for kept in judge._frames.values() for frame in kept) <= 1000
    assert len(judge._frames["Adam"]) > 1


@pytest.mark.slow
def test_a_script_under_gradwatch_run_ends_with_the_error(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import time, torch
            model = torch.nn.Linear(3, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(500):
                loss = (model(torch.ones(2, 3)) * (0.0 if step > 5 else 1.0)).log1p().mean()
                loss = loss / (0.0 if step > 5 else 1.0)
                optimizer.zero_grad(); loss.backward(); optimizer.step()
                time.sleep(0.01)
            print("trained on")
            """
        )
    )
    command = [sys.executable, "-m", "gradwatch", "run", "--stop-on", "non_finite", str(script)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "TrainingStoppedError: gradwatch stopped the training" in done.stderr
    assert "trained on" not in done.stdout
