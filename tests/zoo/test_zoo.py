"""Jobs of the zoo, watched by the real agent: told what they have, in time, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from gradwatch.replay import Recording

from .disturbed import differences
from .fixtures import ZOO, Key, load, train
from .scoring import Score, follow

# Of each kind of finding a fault that brings it, and the healthy jobs that tempt most.
# `make zoo` trains all of them, with five seeds.
FAULTY = (
    "F01 sigmoids", "F02 small tanh", "F04 tanh RNN", "F05 large ReLU", "F07 dead at birth",
    "F08 killed by one step", "F10 log of 0", "F16 no zero_grad", "F16 no zero_grad, RMSprop",
    "F17 Adam x 300", "F20 middle replaced",
    "F18 rate x 20", "F19 rate / 10,000", "F20 head replaced", "F21 cut branch",
    "F24 shuffled labels", "F25 equal units", "F26 fp16 underflow", "F28 clipped to nothing",
    "F29 lost to rounding", "F34 saturated tanh", "F34 saturated convolutions",
    "F36 heavy decay", "F37 one bad batch",
    "F30 no_sync left on", "F42 norms under tensor parallelism",
)  # fmt: skip
HEALTHY = (
    "H01 ReLU MLP", "H06 frozen backbone", "H08 LoRA", "H12 restarts", "H13 GAN", "H14 experts",
    "H16 Q-learning", "H16 bandit", "H18 small batches", "H20 loss x 1e4", "H22 rare head",
    "H23 pruned", "H35 pipeline of twins",
)  # fmt: skip
SEED = 3
ROOT = Path(__file__).parents[2]


@cache
def frames_of(name: str, folder: Path) -> Recording:
    key = Key(name, SEED)
    train(key, folder)
    return load(key, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAULTY, *HEALTHY])
def test_a_job_is_told_what_it_has_in_time_and_nothing_else(name: str, folder: Path) -> None:
    scenario = ZOO[name]
    score = Score()
    told = follow(frames_of(name, folder), at=[each.onset for each in scenario.expected])
    score.add(name, scenario, told.first)
    assert score.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAULTY, *HEALTHY])
@pytest.mark.parametrize("disturbance", range(5))
def test_frames_out_of_order_twice_or_with_one_in_ten_missing_change_nothing(
    name: str, disturbance: int, folder: Path
) -> None:
    onsets = [each.onset for each in ZOO[name].expected]
    assert differences(frames_of(name, folder), f"{name} {disturbance}", onsets) == []


@pytest.mark.slow
def test_the_score_is_printed_of_jobs_that_are_trained_and_judged_in_processes() -> None:
    command = [sys.executable, "-m", "tests.zoo", "--seeds", "1", "--jobs", "F01*", "--train"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert told.returncode == 0, told.stderr
    assert "vanishing" in told.stdout
    assert "1 jobs were judged" in told.stdout
