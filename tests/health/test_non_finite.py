from __future__ import annotations

import numpy as np

from gradwatch.health.finding import Severity
from gradwatch.health.non_finite import detect
from gradwatch.health.window import Window

from .windows import mlp, rows, window, with_loss, with_statistic

FLAT = np.full(8, 1e-2)


def broken(first: dict[int, float], later: float = 64.0, at: int = 30) -> Window:
    """A window of 50 steps; from row `at` on elements are non-finite, at first only some."""
    counts = np.zeros((50, 8))
    counts[at + 1 :] = later
    for place, count in first.items():
        counts[at, place] = count
    base = window(mlp(4), np.where(counts > 0, np.nan, FLAT))
    return with_statistic(base, "nonfinite", counts)


def test_finite_gradients_are_healthy() -> None:
    assert detect(window(mlp(4), FLAT)) is None


def test_one_element_is_enough_and_critical_from_its_step_on() -> None:
    finding = detect(broken({4: 1.0}))
    assert finding is not None
    assert finding.severity is Severity.CRITICAL
    assert (finding.first_step, finding.last_step) == (31, 50)
    assert finding.layers == ("2.weight",)
    assert finding.evidence["non-finite elements"] == 1


def test_the_deepest_layer_hit_at_the_first_step_is_where_it_began() -> None:
    finding = detect(broken({0: 5.0, 1: 5.0, 2: 5.0, 3: 5.0}))
    assert finding is not None
    assert finding.layers[0] == "1.weight"
    assert "began in 1.weight" in finding.summary
    assert "4 of 8" in finding.summary


def test_all_layers_at_once_are_told_as_such() -> None:
    finding = detect(broken(dict.fromkeys(range(8), 64.0)))
    assert finding is not None
    assert "all 8 layers at once" in finding.summary
    assert finding.layers[0] == "3.weight"


def test_it_is_told_from_a_window_of_one_step() -> None:
    finding = detect(rows(broken({4: 1.0}), slice(30, 31)))
    assert finding is not None
    assert finding.first_step == 31


def test_a_nan_norm_alone_means_no_gradient() -> None:
    sizes = FLAT.copy()
    sizes[:4] = np.nan
    assert detect(window(mlp(4), sizes)) is None


def test_a_norm_that_overflows_is_not_taken_for_non_finite_elements() -> None:
    assert detect(window(mlp(4), np.array([np.inf, *FLAT[1:]]))) is None


def test_an_infinite_largest_element_counts() -> None:
    absmax = np.full((50, 8), 1e-2)
    absmax[10, 2] = np.inf
    finding = detect(with_statistic(window(mlp(4), FLAT), "absmax", absmax))
    assert finding is not None
    assert finding.layers == ("1.weight",)


def test_a_non_finite_loss_is_told_without_layers() -> None:
    loss = np.full(50, 2.3)
    loss[20:] = np.inf
    finding = detect(with_loss(window(mlp(4), FLAT), loss))
    assert finding is not None
    assert finding.first_step == 21
    assert finding.layers == ()
    assert finding.evidence["loss at that step"] == "inf"


def test_a_nan_loss_is_told_from_one_that_was_not_logged() -> None:
    loss = np.full(50, 2.3)
    loss[20] = np.nan
    base = window(mlp(4), FLAT)
    assert detect(with_loss(base, loss)) is None
    finding = detect(with_loss(base, loss, reported=np.ones(50)))
    assert finding is not None
    assert finding.first_step == 21


def test_a_finite_loss_with_an_infinite_gradient_says_so() -> None:
    finding = detect(broken({4: 1.0}))
    assert finding is not None
    assert finding.evidence["loss at that step"] == 2.3


def test_a_passing_nan_keeps_its_first_and_last_step() -> None:
    finding = detect(broken({4: 1.0}, later=0.0))
    assert finding is not None
    assert (finding.first_step, finding.last_step) == (31, 31)
