"""`gradwatch doctor` on real scripts: what it says, and what it exits with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gradwatch.checkup.checks import CHECKS, examine
from gradwatch.checkup.command import STEPS, observe
from gradwatch.checkup.observation import Observation
from gradwatch.checkup.verdict import Status, Verdict

SCRIPTS = Path(__file__).parent / "doctor_scripts"
HEALTHY = sorted(path.stem for path in SCRIPTS.glob("*.py"))


class Told(NamedTuple):
    """How the command ended."""

    status: int
    checks: dict[str, dict[str, Any]]
    stderr: str


def doctor(script: Path, *arguments: str) -> Told:
    done = subprocess.run(
        [sys.executable, "-m", "gradwatch", "doctor", "--json", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    report = json.loads(done.stdout) if done.stdout else {"ok": None, "checks": []}
    assert report["ok"] == {0: True, 1: False}.get(done.returncode), done.stderr
    return Told(done.returncode, {item["check"]: item for item in report["checks"]}, done.stderr)


# A training loop with one place for each of its parts.
LOOP = """
import sys
import torch
from torch import nn
{seed}
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
inputs, labels = torch.randn(64, 8), torch.arange(64) % 3
optimizer = torch.optim.SGD(model.parameters(), lr={rate})
{before}
for step in range(1000):
    {zero}
    loss = nn.functional.cross_entropy({output}, {labels})
    loss.backward()
    optimizer.step()
    print("step", step)
"""
SOUND = {
    "seed": "torch.manual_seed(0)",
    "rate": "0.1",
    "before": "",
    "zero": "optimizer.zero_grad()",
    "output": "model(inputs)",
    "labels": "labels",
}
FAULTS = {
    "zero_grad": {"zero": ""},
    "learning_rate": {"rate": "1e4"},
    "eval_mode": {"before": "model.eval()"},
    "softmax": {"output": "model(inputs).softmax(1)"},
    "held": {"before": "model[3] = nn.Linear(16, 3)"},
    "labels": {"labels": "labels + 1"},
    "classes": {"labels": "labels * 0"},
    "input_scale": {"output": "model(inputs * 100)"},
    "frozen": {"before": "model.requires_grad_(False)"},
}


def write(folder: Path, **parts: str) -> Path:
    path = folder / "train.py"
    path.write_text(LOOP.format(**{**SOUND, **parts}))
    return path


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Observation]:
    """Observes a script in this process, which saves the start of another one."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")

    def observed(script: Path, *arguments: str) -> Observation:
        monkeypatch.setattr(sys, "argv", sys.argv[:])
        monkeypatch.setattr(sys, "path", sys.path[:])
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        seen = observe(False, STEPS, str(script), arguments)
        assert seen is not None
        return seen

    return observed


def look(check: str, seen: Observation) -> Verdict:
    return next(item for item in CHECKS if item.name == check).look(seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_script_passes_every_check_that_can_be_made(
    name: str, observed: Callable[..., Observation]
) -> None:
    verdicts = {line.check: line.verdict for line in examine(observed(SCRIPTS / f"{name}.py"))}
    assert not [verdict for verdict in verdicts.values() if verdict.status is Status.WRONG]
    for check in ("backward", "model", "learning_rate", "zero_grad", "held", "seed"):
        assert verdicts[check].status is Status.PASSED, verdicts[check]
    assert verdicts["overfit"].status in (Status.PASSED, Status.ADVICE)


@pytest.mark.parametrize("check", FAULTS)
def test_a_mistake_of_the_loop_is_named(
    check: str, tmp_path: Path, observed: Callable[..., Observation]
) -> None:
    seen = observed(write(tmp_path, **FAULTS[check]))
    verdict = look(check, seen)
    assert verdict.status is Status.WRONG, verdict
    assert verdict.action
    assert look(check, observed(write(tmp_path))).status is Status.PASSED


def test_a_script_without_a_seed_is_advised_and_not_failed(
    tmp_path: Path, observed: Callable[..., Observation]
) -> None:
    torch.seed()
    assert look("seed", observed(write(tmp_path, seed=""))).status is Status.ADVICE


def test_a_script_that_changes_its_weights_by_hand_is_checked_too(
    tmp_path: Path, observed: Callable[..., Observation]
) -> None:
    by_hand = "model.zero_grad()"
    path = write(tmp_path, zero=by_hand)
    update = "[item.data.sub_(0.1 * item.grad) for item in model.parameters()]"
    path.write_text(path.read_text().replace("optimizer.step()", update))
    seen = observed(path)
    for check in ("backward", "model", "overfit", "reached", "weight_scale"):
        assert look(check, seen).status is Status.PASSED, look(check, seen)
    assert look("learning_rate", seen).status is Status.SKIPPED


def test_an_optimizer_that_never_steps_is_named(
    tmp_path: Path, observed: Callable[..., Observation]
) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("optimizer.step()", "pass"))
    verdict = look("held", observed(path))
    assert verdict.status is Status.WRONG
    assert "SGD" in verdict.found
    assert "never steps" in verdict.found


@pytest.mark.parametrize("how", ["by hand", "after hundreds of backward passes"])
def test_an_optimizer_that_is_stepped_otherwise_is_not_accused(
    how: str, tmp_path: Path, observed: Callable[..., Observation]
) -> None:
    path = write(tmp_path, zero="optimizer.zero_grad()" if how == "by hand" else "pass")
    update = "[item.data.sub_(0.1 * item.grad) for item in model.parameters()]"
    path.write_text(
        path.read_text().replace(
            "optimizer.step()", update if how == "by hand" else "step == 300 and optimizer.step()"
        )
    )
    assert look("held", observed(path)).status is Status.SKIPPED


def test_arguments_reach_the_script(observed: Callable[..., Observation]) -> None:
    verdict = look("learning_rate", observed(SCRIPTS / "digits.py", "--lr", "30"))
    assert verdict.status is Status.WRONG
    assert verdict.numbers["rate"] == 30


def test_the_script_is_stopped_after_its_first_steps_and_its_words_go_to_stderr(
    tmp_path: Path,
) -> None:
    told = doctor(write(tmp_path))
    assert told.status == 0
    assert "step 3" in told.stderr  # the fifth optimizer step is its last
    assert "step 4" not in told.stderr


def test_a_script_that_trains_nothing_cannot_be_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text("print('hello')")
    told = doctor(path)
    assert told.status == 2
    assert "nothing to check" in told.stderr


def test_a_script_that_fails_before_it_trains_shows_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError('no data here')")
    told = doctor(path)
    assert told.status == 2
    assert "no data here" in told.stderr


def test_a_script_that_is_not_there_cannot_be_looked_at(tmp_path: Path) -> None:
    told = doctor(tmp_path / "missing.py")
    assert told.status == 2
    assert "there is no script" in told.stderr


def test_the_report_for_people_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradwatch", "doctor", str(write(tmp_path, zero=""))],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "Call optimizer.zero_grad() before each backward()" in done.stdout
