from __future__ import annotations

import numpy as np
import pytest

from gradwatch.health.exploding import Thresholds, detect
from gradwatch.health.finding import Severity

from .windows import mlp, rows, window, with_statistic

FLAT = np.full(8, 1e-2)


def in_time(factors: np.ndarray) -> np.ndarray:
    """[steps, layers]: all layers grow together."""
    return factors[:, None] * FLAT[None, :]


def test_growth_far_beyond_the_first_frames_is_told_from_its_first_step() -> None:
    finding = detect(window(mlp(4), in_time(np.repeat([1.0, 5e3], [30, 20]))))
    assert finding is not None
    assert finding.severity is Severity.WARNING
    assert (finding.first_step, finding.last_step) == (31, 50)
    assert set(finding.layers) == {f"{depth}.weight" for depth in range(4)}
    assert finding.evidence["times the first frames' norm"] == pytest.approx(5e3)


def test_growth_of_gradients_that_stay_small_beside_the_weights_is_healthy() -> None:
    assert detect(window(mlp(4), 1e-4 * in_time(np.repeat([1.0, 4e3], [30, 20])))) is None


def test_falling_and_level_gradients_are_healthy_at_any_scale() -> None:
    for scale in (1e-8, 1.0, 1e4):
        assert detect(window(mlp(4), scale * FLAT)) is None
        assert detect(window(mlp(4), scale * in_time(np.geomspace(1, 1e-6, 50)))) is None


def test_a_single_spike_that_heals_is_not_told() -> None:
    spike = np.ones(50)
    spike[30] = 5e3
    assert detect(window(mlp(4), in_time(spike))) is None


def test_one_frame_is_enough_when_it_ruins_the_weights() -> None:
    ruin = np.ones(50)
    ruin[30] = 1e6
    finding = detect(window(mlp(4), in_time(ruin)))
    assert finding is not None
    assert finding.severity is Severity.CRITICAL
    assert finding.first_step == 31


def test_early_layers_100_times_the_late_ones_and_large_are_told() -> None:
    front = np.array([5.0, 5.0, 1.0, 1.0, 0.5, 0.5, 1e-2, 1e-2])
    finding = detect(window(mlp(4), front))
    assert finding is not None
    assert finding.layers[0] == "0.weight"
    assert "0.bias" not in finding.layers


def test_early_layers_100_times_the_late_ones_but_small_are_healthy() -> None:
    front = np.array([5.0, 5.0, 1.0, 1.0, 0.5, 0.5, 1e-2, 1e-2])
    assert detect(window(mlp(4), 1e-3 * front)) is None


def test_biases_tell_the_growth_towards_the_input_when_weights_are_level() -> None:
    sizes = np.full(8, 1e2)
    sizes[1::2] = [1e4, 1e3, 1e2, 0.3]
    assert detect(window(mlp(4), sizes)) is not None
    assert detect(window(mlp(4), 1e-4 * sizes)) is None


def test_a_gradient_a_million_times_the_weights_is_absurd_in_itself() -> None:
    assert detect(window(mlp(4), np.full(8, 3e5))) is not None


def test_a_norm_that_overflows_float32_with_finite_elements_is_exploding() -> None:
    overflow = window(mlp(4), FLAT)
    norm = overflow.statistic("norm").copy()
    norm[-5:] = np.inf
    finding = detect(with_statistic(overflow, "norm", norm))
    assert finding is not None
    assert finding.evidence["largest total norm"] == "inf"


def test_growth_that_ends_in_nan_is_told_though_it_did_not_last() -> None:
    sizes = in_time(np.repeat([1.0, 5e3, np.nan], [30, 1, 9]))
    base = window(mlp(4), sizes, steps=40)
    nonfinite = np.where(np.isnan(sizes), 64.0, 0.0)
    finding = detect(with_statistic(base, "nonfinite", nonfinite))
    assert finding is not None
    assert (finding.first_step, finding.last_step) == (31, 31)
    assert finding.severity is Severity.CRITICAL
    assert "step 32" in finding.summary


def test_before_nan_less_growth_is_enough() -> None:
    sizes = in_time(np.repeat([1e2, 3e3, np.nan], [30, 1, 9]))
    base = window(mlp(4), sizes, steps=40)
    assert detect(rows(base, slice(0, 31))) is None
    nonfinite = np.where(np.isnan(sizes), 64.0, 0.0)
    assert detect(with_statistic(base, "nonfinite", nonfinite)) is not None


def test_nan_out_of_good_health_is_not_exploding() -> None:
    sizes = in_time(np.repeat([1.0, np.inf], [30, 10]))
    base = window(mlp(4), sizes, steps=40)
    assert detect(with_statistic(base, "nonfinite", np.where(np.isinf(sizes), 64.0, 0.0))) is None


def test_a_layer_that_starts_to_learn_does_not_count_as_growth() -> None:
    late = np.tile(FLAT, (50, 1))
    late[:25, :4] = np.nan
    assert detect(window(mlp(4), late)) is None


def test_missing_frames_give_the_same_verdict() -> None:
    whole = window(mlp(4), in_time(np.repeat([1.0, 5e3], [60, 60])), steps=120)
    keep = np.sort(np.random.default_rng(2).choice(120, 60, replace=False))
    assert detect(rows(whole, keep)) is not None


def test_nothing_can_be_said_without_weights_or_frames() -> None:
    grown = window(mlp(4), in_time(np.repeat([1.0, 5e3], [30, 20])))
    assert detect(with_statistic(grown, "weight_norm", np.full((50, 8), np.nan))) is None
    assert detect(rows(grown, slice(0, 1))) is None


def test_thresholds_are_obeyed() -> None:
    grown = window(mlp(4), in_time(np.repeat([1.0, 5e3], [30, 20])))
    assert detect(grown, Thresholds(growth=1e9, creeping_growth=1e9, absurd=1e9)) is None


def test_a_layer_of_enormous_weights_is_named_however_small_gradients_are_beside_it() -> None:
    """Its own weights would make every gradient look small: the others are judged without it."""
    wild = np.full((50, 8), 6.4)
    wild[:, 2] = 6.4e4
    large = with_statistic(window(mlp(4), 5.0 * np.ones(8)), "weight_norm", wild)
    finding = detect(large)
    assert finding is not None
    assert finding.layers[0] == "1.weight"
    assert detect(with_statistic(window(mlp(4), FLAT), "weight_norm", wild)) is None
    assert detect(window(mlp(4), 5.0 * np.ones(8))) is None
