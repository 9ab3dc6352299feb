"""Rows of the zoo that the four detectors must tell, or must not fall for."""

from __future__ import annotations

import pytest
import torch

from gradwatch.health.judge import judge

from .jobs import JOBS, Job
from .recorder import Recorder

SPARSE = ("H08 LoRA", "H22 rare head")  # healthy, with gradients that come and go
SLOW = {"H02 conv with batch-norm", "H05 residual, 50 blocks", "H18 converged", "H13 GAN"}


def trained(job: Job, seed: int, **options: int) -> list[Recorder]:
    """One recorder for each optimizer of the job."""
    recorders: list[Recorder] = []

    def watch(model: torch.nn.Module, optimizer: torch.optim.Optimizer, **_: object) -> Recorder:
        recorders.append(Recorder(**options))
        return recorders[-1](model, optimizer)

    job.train(watch, seed)
    return recorders


CASES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in JOBS]


@pytest.mark.parametrize("name", CASES)
def test_a_job_gets_its_findings_and_no_other_at_any_time(name: str) -> None:
    job = JOBS[name]
    for recorder in trained(job, seed=0):
        last = recorder.steps[-1]
        looks = [*range(1, min(last, 25)), *range(25, last, max(last // 8, 1)), last]
        ever = {f.kind for step in looks for f in judge(recorder.window(until=step))}
        final = {finding.kind for finding in judge(recorder.window())}
        assert job.expected <= final
        assert ever <= job.expected | job.allowed


@pytest.mark.parametrize("name", [*(name for name, job in JOBS.items() if job.expected), *SPARSE])
def test_sampling_one_step_in_five_gives_the_same_findings(name: str) -> None:
    job = JOBS[name]
    for recorder in trained(job, seed=1, keep_every=5, detail_every=20):
        final = {finding.kind for finding in judge(recorder.window())}
        assert job.expected <= final <= job.expected | job.allowed
