from __future__ import annotations

import numpy as np

from gradwatch.health.dead_units import Thresholds, detect
from gradwatch.health.finding import Severity

from .windows import UNITS, LayerFacts, mlp, rows, window, with_loss, with_statistic

FLAT = np.full(8, 1e-2)


def share_of(layer: int, share: float, bias_agrees: bool = True) -> dict[str, np.ndarray]:
    """Statistics of a network of four layers in which a share of one layer's units is dead."""
    dead, zero = np.zeros(8), np.zeros(8)
    dead[2 * layer] = share
    zero[2 * layer + 1] = share if bias_agrees else 0.0
    return {"dead_fraction": dead, "zero_fraction": zero}


def test_a_partly_dead_layer_is_told_with_its_share() -> None:
    finding = detect(window(mlp(4), FLAT, **share_of(1, 0.75)))
    assert finding is not None
    assert finding.layers == ("1.weight",)
    assert finding.severity is Severity.WARNING
    assert finding.evidence["dead units"] == f"48 of {UNITS}"


def test_severity_is_critical_when_hardly_a_unit_is_left() -> None:
    finding = detect(window(mlp(4), FLAT, **share_of(1, 0.95)))
    assert finding is not None
    assert finding.severity is Severity.CRITICAL


def test_half_of_a_dense_layer_is_born_off_and_that_is_healthy() -> None:
    assert detect(window(mlp(4), FLAT, **share_of(1, 0.6))) is None


def test_half_of_a_convolution_is_told() -> None:
    layers = [
        LayerFacts(f"{depth}.weight", (UNITS, 8, 3, 3), "Conv2d", depth=depth) for depth in range(4)
    ]
    assert detect(window(layers, FLAT[:4], dead_fraction=[0, 0.6, 0, 0])) is not None
    assert detect(window(layers, FLAT[:4], dead_fraction=[0, 0.4, 0, 0])) is None


def test_small_dense_layers_need_more_for_chance_is_larger() -> None:
    layers = [LayerFacts(f"{depth}.weight", (16, 16), depth=depth) for depth in range(4)]
    assert detect(window(layers, FLAT[:4], dead_fraction=[0, 0.75, 0, 0])) is None
    assert detect(window(layers, FLAT[:4], dead_fraction=[0, 0.9375, 0, 0])) is not None


def test_a_whole_dead_layer_is_one_story_of_the_last_dead_layer_in_depth() -> None:
    sizes = FLAT.copy()
    sizes[:6] = 0.0  # layers 0, 1 and 2 get no gradient
    sizes[6] = 0.0  # weight 3 has no input, but its bias learns
    finding = detect(window(mlp(4), sizes))
    assert finding is not None
    assert finding.layers == ("2.weight",)
    assert finding.first_step == 1
    assert finding.evidence["layers before it left without gradient"] == 2


def test_units_behind_a_dead_layer_have_no_story_of_their_own() -> None:
    sizes = FLAT.copy()
    sizes[:2] = 0.0
    sizes[2] = 0.0
    dead, zero = np.zeros(8), np.zeros(8)
    dead[[0, 2, 4]], zero[[0, 1, 2, 3, 5]] = (1.0, 1.0, 0.8), (1.0, 1.0, 1.0, 0.8, 0.8)
    finding = detect(window(mlp(4), sizes, dead_fraction=dead, zero_fraction=zero))
    assert finding is not None
    assert finding.layers == ("0.weight",)


def test_rows_of_zeros_whose_bias_still_learns_are_masked_and_not_dead() -> None:
    assert detect(window(mlp(4), FLAT, **share_of(1, 0.9, bias_agrees=False))) is None


def test_a_norm_after_the_layer_speaks_for_its_units_too() -> None:
    layers = [
        LayerFacts("0.weight", (UNITS, 8, 3, 3), "Conv2d", depth=0),
        LayerFacts("1.bias", (UNITS,), "BatchNorm2d", "norm", 1),
        LayerFacts("2.weight", (UNITS, UNITS), depth=2),
    ]
    dead = {"dead_fraction": [0.9, 0, 0]}
    assert detect(window(layers, FLAT[:3], **dead, zero_fraction=[0, 0.9, 0])) is not None
    assert detect(window(layers, FLAT[:3], **dead, zero_fraction=[0, 0, 0])) is None


def test_a_layer_without_bias_is_taken_at_its_word() -> None:
    finding = detect(window(mlp(4, biases=False), FLAT[:4], dead_fraction=[0, 0.9, 0, 0]))
    assert finding is not None
    assert finding.layers == ("1.weight",)


def test_gradients_of_0_that_faded_out_are_underflow_and_not_death() -> None:
    fading = np.array([0.0, 0.0, 1e-30, 1e-30, 1e-20, 1e-20, 1e-2, 1e-2])
    assert detect(window(mlp(4), fading)) is None


def test_a_zero_norm_without_dead_units_says_nothing() -> None:
    sizes = FLAT.copy()
    sizes[:4] = 0.0
    assert detect(window(mlp(4), sizes, dead_fraction=0.0)) is None


def test_a_loss_that_reached_0_leaves_no_gradient_and_is_healthy() -> None:
    silent = window(mlp(4), np.zeros(8))
    assert detect(with_loss(silent, np.zeros(50))) is None
    finding = detect(with_loss(silent, np.full(50, 2.3)))
    assert finding is not None
    assert finding.layers == ("3.weight",)


def test_an_output_layer_with_unused_outputs_is_healthy() -> None:
    assert detect(window(mlp(4), FLAT, **share_of(3, 0.9))) is None


def test_a_first_frame_of_zeros_is_chance() -> None:
    sizes = np.tile(FLAT, (30, 1))
    sizes[0, :2] = 0.0  # as LoRA's A, whose B starts at 0
    for until in range(1, 31):
        assert detect(rows(window(mlp(4), sizes, steps=30), slice(0, until))) is None


def test_a_head_that_is_used_now_and_then_is_not_dead() -> None:
    sizes = np.tile(FLAT, (100, 1))
    sizes[:, 4:6] = 0.0
    sizes[4::10, 4:6] = 1e-2  # used at steps 5, 15, 25, ...
    detail = np.zeros((100, 8))
    detail[[row for row in range(100) if row > 9 and (row + 1) % 20]] = np.nan
    detail[5:, 4] = np.where(np.isnan(detail[5:, 4]), np.nan, 1.0)
    base = window(mlp(4), sizes, steps=100)
    for until in range(1, 101):
        part = rows(with_statistic(base, "dead_fraction", detail), slice(0, until))
        assert detect(part) is None, until


def test_it_must_last_for_some_steps_and_be_true_now() -> None:
    settings = Thresholds()
    dead = window(mlp(4), FLAT, **share_of(1, 0.9))
    assert detect(rows(dead, slice(0, settings.steps))) is None
    assert detect(rows(dead, slice(0, settings.steps + 1))) is not None
    revived = np.zeros((50, 8))
    revived[:40, 2] = 0.9
    assert detect(with_statistic(dead, "dead_fraction", revived)) is None


def test_death_has_the_step_at_which_it_came() -> None:
    later = np.zeros((100, 8))
    later[60:, 2] = 0.9
    base = window(mlp(4), FLAT, steps=100, zero_fraction=1.0)
    finding = detect(with_statistic(base, "dead_fraction", later))
    assert finding is not None
    assert finding.first_step == 61


def test_the_layer_that_died_first_is_named_first() -> None:
    dead = np.zeros((100, 8))
    dead[20:, 0] = 0.9
    dead[60:, 4] = 0.9
    base = window(mlp(4), FLAT, steps=100, zero_fraction=1.0)
    finding = detect(with_statistic(base, "dead_fraction", dead))
    assert finding is not None
    assert finding.layers == ("0.weight", "2.weight")


def test_rows_of_a_transposed_convolution_are_inputs_and_not_units() -> None:
    layers = [
        LayerFacts(f"{depth}.weight", (UNITS, 8, 3, 3), "ConvTranspose2d", depth=depth)
        for depth in range(4)
    ]
    assert detect(window(layers, FLAT[:4], dead_fraction=[0, 0.9, 0, 0])) is None


def test_frozen_layers_are_left_out() -> None:
    sizes = FLAT.copy()
    sizes[:4] = np.nan
    dead = np.array([np.nan, np.nan, np.nan, np.nan, 0, 0, 0, 0])
    assert detect(window(mlp(4), sizes, dead_fraction=dead)) is None


def test_rare_detail_frames_are_enough() -> None:
    sparse = np.full((100, 8), np.nan)
    sparse[19::20] = share_of(1, 0.9)["dead_fraction"]
    base = window(mlp(4), FLAT, steps=100, zero_fraction=1.0)
    assert detect(with_statistic(base, "dead_fraction", sparse)) is not None
