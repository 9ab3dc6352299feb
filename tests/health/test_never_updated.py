from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gradwatch.health import disconnected
from gradwatch.health.finding import Severity
from gradwatch.health.judge import judge
from gradwatch.health.never_updated import detect
from gradwatch.health.window import Window

from .windows import LayerFacts, mlp, window, with_statistic

NONE = np.nan


def replaced(place: int, stray: bool = True) -> Window:
    """One layer of four was replaced: the optimizer holds the tensors that were there before."""
    layers = mlp(4)
    for number in (2 * place, 2 * place + 1):
        layers[number] = replace(layers[number], optimized=False)
    moves = [0.0 if not layer.optimized else 1e-3 for layer in layers]
    sizes = [1e-2] * 8
    if stray:
        layers += [
            LayerFacts("Adam.parameter_6", (64, 64), "", depth=8),
            LayerFacts("Adam.parameter_7", (64,), "", "norm", 9),
        ]
        sizes, moves = [*sizes, NONE, NONE], [*moves, NONE, NONE]
    uneven = 1 + 0.1 * np.cos(np.arange(50))[:, None]
    return window(layers, uneven * np.array(sizes), update_ratio=moves)


def test_a_replaced_head_is_named_and_so_is_what_the_optimizer_holds_in_its_place() -> None:
    (finding,) = judge(replaced(3))
    assert (finding.kind, finding.severity) == ("never_updated", Severity.CRITICAL)
    assert set(finding.layers) == {"3.weight", "3.bias"}
    assert "Adam.parameter_6 and 1 more layer that no model has any more" in finding.summary
    assert finding.evidence["held, but in no model"] == "Adam.parameter_6, Adam.parameter_7"


def test_a_replaced_middle_is_a_mistake_too() -> None:
    finding = detect(replaced(1))
    assert finding is not None
    assert finding.severity is Severity.CRITICAL


def test_a_backbone_left_out_of_the_optimizer_may_be_meant() -> None:
    finding = detect(replaced(1, stray=False))
    assert finding is not None
    assert finding.severity is Severity.INFO


def test_what_another_optimizer_moves_is_updated() -> None:
    moved = with_statistic(replaced(3, stray=False), "update_ratio", np.full((50, 8), 1e-3))
    assert detect(moved) is None


def test_a_layer_that_came_while_training_is_told_once_it_has_been_there_for_a_while() -> None:
    base = replaced(3)
    norm = base.statistics["norm"].copy()
    norm[:30, 6:8] = np.nan
    finding = detect(with_statistic(base, "norm", norm))
    assert finding is not None
    assert finding.first_step == 31


def test_tensors_that_no_model_misses_are_information() -> None:
    """A weight that was tied to another after the optimizer was built rests there for ever."""
    base = replaced(3)
    layers = [replace(layer, optimized=True) for layer in mlp(4)] + list(base.layers[8:])
    tied = replace(base, layers=layers)
    tied = with_statistic(tied, "update_ratio", np.full((50, 10), 1e-3))
    finding = disconnected.detect(tied)
    assert finding is not None
    assert finding.severity is Severity.INFO
    assert finding.summary.startswith("The optimizer holds Adam.parameter_6 and 1 more layer")


@pytest.mark.parametrize("cut", [0, 2])
def test_layers_without_gradient_are_told_without_what_was_replaced(cut: int) -> None:
    base = replaced(3)
    norm = base.statistics["norm"].copy()
    norm[:, cut] = np.nan
    nothing = with_statistic(with_statistic(base, "norm", norm), "nonfinite", np.zeros((50, 10)))
    finding = disconnected.detect(nothing)
    assert finding is not None
    assert finding.layers == (f"{cut // 2}.weight",)
    assert finding.severity is Severity.WARNING


@pytest.mark.parametrize(("zeros", "told"), [(0.3, True), (0.9, False)])
def test_a_sample_of_weights_that_get_no_gradient_says_nothing_of_the_others(
    zeros: float, told: bool
) -> None:
    """Most units of a layer are dead, and all sampled weights are theirs."""
    moves = [1e-3, 1e-3, 0.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]
    shares = [0.0, 0.0, zeros, zeros, 0.0, 0.0, 0.0, 0.0]
    still = window(mlp(4), [1e-2] * 8, update_ratio=moves, zero_fraction=shares)
    assert (detect(still) is not None) is told
