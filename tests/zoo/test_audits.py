"""Audits tell a job whose gradients are wrong at its first step, and no other."""

from __future__ import annotations

import numpy as np
import pytest

from gradwatch.health import reference_mismatch
from gradwatch.health.window import Compared, Window

from .audited import audits_of
from .fixtures import Key

SEEDS = range(3)


def of_audits(audits: list[Compared]) -> Window:
    return Window(
        steps=np.empty(0, dtype=np.int64), layers=(), statistics={}, scalars={}, audits=audits
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wrong_sign_is_told_at_the_first_step_and_by_its_name(seed: int) -> None:
    audits = audits_of(Key("F39 wrong sign", seed), {1, 40})
    finding = reference_mismatch.detect(of_audits(audits))
    assert finding is not None
    assert finding.layers == ("WrongSign",)
    assert (finding.first_step, finding.last_step) == (1, 40)
    assert finding.evidence["worst relative error"] == 1.0
    # The layers beneath get a wrong gradient, and compute rightly with it.
    assert len({each.layer for each in audits}) == 7


@pytest.mark.parametrize(
    "name", ["H01 ReLU MLP", "F01 sigmoids", "F16 no zero_grad", "F17 rate x 100"]
)
def test_jobs_whose_backward_is_right_pass_whatever_else_they_have(name: str) -> None:
    audits = audits_of(Key(name, 0), {1, 2, 30})
    if name == "F16 no zero_grad":
        # What was left in .grad from the steps before is in no backward.
        audits = [each for each in audits if each.step == 1]
    assert len(audits) >= 4
    assert reference_mismatch.detect(of_audits(audits)) is None
    assert max(each.error for each in audits) < 1e-4, "of 1e-2 that are allowed"
