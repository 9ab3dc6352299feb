"""Saturation: by what the agent sampled of the activations, else by the gradients around them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gradwatch.health.saturation import Thresholds, detect
from gradwatch.health.window import Window

from .windows import LayerFacts, mlp, rows, window, with_statistic

NAN = float("nan")


def shares(*of: float, steps: int = 50, since: int = 1) -> NDArray[np.float32]:
    """Of the layers "0.weight", "1.weight" and so on, from step `since` on; 0 before."""
    table = np.full((steps, 2 * len(of)), NAN, dtype=np.float32)
    table[:, ::2] = of
    table[: since - 1] = np.where(np.isnan(table[: since - 1]), NAN, 0.0)
    return table


def test_a_layer_whose_outputs_lie_at_the_flat_ends_is_told_by_its_share() -> None:
    finding = detect(window(mlp(3), 1e-3, saturated_fraction=shares(0.1, 0.9, NAN, since=21)))
    assert finding is not None
    assert finding.layers == ("1.weight",)
    assert finding.first_step == 21
    assert finding.evidence["outputs at the flat ends"] == 0.9
    assert "90 % of its outputs" in finding.summary


@pytest.mark.parametrize("kind", ["Conv2d", "ConvTranspose1d", "MyOwn"])
def test_sampled_layers_need_not_be_dense(kind: str) -> None:
    layers = [LayerFacts("body.weight", (8, 4, 3, 3), module=kind), LayerFacts("head", (10, 72))]
    table = np.tile(np.array([0.8, NAN]), (30, 1))
    finding = detect(window(layers, 1e-3, steps=30, saturated_fraction=table))
    assert finding is not None
    assert finding.layers == ("body.weight",)


@pytest.mark.parametrize("share", [0.0, 0.3, Thresholds().ends - 0.01])
def test_fewer_outputs_at_the_ends_are_no_saturation(share: float) -> None:
    assert detect(window(mlp(3), 1e-3, saturated_fraction=shares(share, share, NAN))) is None


def test_a_layer_that_was_saturated_and_is_not_any_more_is_not_told() -> None:
    table = shares(0.9, NAN)
    table[30:, 0] = 0.2
    assert detect(window(mlp(2), 1e-3, saturated_fraction=table)) is None


def flat_by_gradients(steps: int = 50) -> Window:
    """Three dense layers; the second passes a hundredth of what arrives at it."""
    norm_like = np.array([1e-5, 1e-5, 1e-5, 1e-5, 1e-3, 1e-3])
    return window(mlp(3), norm_like, steps=steps, zero_fraction=0.0)


def test_frames_of_an_older_agent_are_judged_by_their_gradients() -> None:
    finding = detect(flat_by_gradients())
    assert finding is not None
    assert finding.layers == ("1.weight",)
    assert "passes about" in finding.summary
    assert "estimated slope of the activation" in finding.evidence


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_was_sampled_overrules_what_gradients_suggest(share: float) -> None:
    base = flat_by_gradients()
    assert detect(with_statistic(base, "saturated_fraction", shares(share, share, NAN))) is None
    # Of the layer itself; another's share says nothing of it.
    others = with_statistic(base, "saturated_fraction", shares(share, NAN, NAN))
    assert detect(others) is not None


def test_both_ways_are_told_in_one_finding() -> None:
    table = shares(0.95, NAN, NAN)
    finding = detect(with_statistic(flat_by_gradients(), "saturated_fraction", table))
    assert finding is not None
    assert finding.layers == ("0.weight", "1.weight")
    assert finding.evidence["outputs at the flat ends"] == 0.95
    assert "estimated slope of the activation" in finding.evidence


def test_few_frames_that_sampled_it_say_nothing_yet() -> None:
    table = shares(0.95, NAN)
    table[Thresholds().detail_frames - 1 :] = NAN
    sampled = window(mlp(2), 1e-3, saturated_fraction=table)
    assert detect(sampled) is None
    assert detect(rows(sampled, slice(0, 3))) is None
