from __future__ import annotations

import numpy as np
import pytest

from gradwatch.health.finding import Severity
from gradwatch.health.vanishing import Thresholds, detect

from .windows import UNITS, LayerFacts, mlp, rows, window

CHAIN = np.repeat(10.0 ** -np.arange(6, -1, -1), 2)  # 1e-6 at the input to 1 at the output
FLAT = np.full(14, 1e-2)


def test_a_chain_that_shrinks_towards_the_input_is_told_with_its_first_layers() -> None:
    finding = detect(window(mlp(7), 1e-3 * CHAIN))
    assert finding is not None
    assert finding.layers == ("0.weight", "1.weight", "2.weight")
    assert (finding.first_step, finding.last_step) == (1, 50)
    assert "0.weight" in finding.summary


def test_depth_counts_and_not_the_order_of_registration() -> None:
    layers = mlp(7)
    order = np.random.default_rng(0).permutation(len(layers))
    shuffled = window([layers[place] for place in order], 1e-3 * CHAIN[order])
    assert detect(shuffled) == detect(window(layers, 1e-3 * CHAIN))


def test_a_chain_that_shrinks_towards_the_output_is_not_vanishing() -> None:
    assert detect(window(mlp(7), 1e-3 * CHAIN[::-1])) is None


def test_equal_gradients_are_healthy_however_small() -> None:
    for size in (1e-2, 1e-8, 1e-15):
        assert detect(window(mlp(7), size * np.ones(14))) is None


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_scaled_loss_changes_nothing(scale: float) -> None:
    finding = detect(window(mlp(7), 1e-6 * scale * CHAIN))
    assert finding is not None
    assert finding.layers[0] == "0.weight"


def test_early_layers_that_still_move_their_weights_are_not_told() -> None:
    assert detect(window(mlp(7), 1e-3 * CHAIN)) is not None
    assert detect(window(mlp(7), 1e-3 * CHAIN, weight_rms=1e-9)) is None


def test_severity_is_critical_when_the_weights_cannot_move_at_all() -> None:
    mild = detect(window(mlp(7), 1e-3 * CHAIN))
    grave = detect(window(mlp(7), 1e-3 * CHAIN**2))
    assert mild is not None
    assert grave is not None
    assert (mild.severity, grave.severity) == (Severity.WARNING, Severity.CRITICAL)


def test_one_small_first_layer_is_not_a_chain() -> None:
    one = np.array([1e-7, 1e-7, *FLAT[2:]])
    assert detect(window(mlp(7), one)) is None


def test_small_branches_behind_a_first_layer_that_learns_are_healthy() -> None:
    branches = np.array([1e-2, 1e-2, *np.full(10, 1e-7), 1e-2, 1e-2])
    assert detect(window(mlp(7), branches)) is None


def test_frozen_layers_have_no_gradient_and_are_left_out() -> None:
    frozen = FLAT.copy()
    frozen[:8] = np.nan
    assert detect(window(mlp(7), frozen)) is None
    deep = 1e-3 * CHAIN**2
    deep[:4] = np.nan
    finding = detect(window(mlp(7), deep))
    assert finding is not None
    assert finding.layers[0] == "2.weight"


def test_embeddings_biases_and_norms_are_no_links_of_the_chain() -> None:
    layers = [
        LayerFacts("token", (1000, UNITS), "Embedding", "embedding", 0),
        LayerFacts("position", (1000, UNITS), "Embedding", "embedding", 1),
        LayerFacts("ln", (UNITS,), "LayerNorm", "norm", 2),
        *(LayerFacts(f"{d}.weight", (UNITS, UNITS), depth=d) for d in range(3, 8)),
    ]
    assert detect(window(layers, [1e-9, 1e-9, 1e-9, *np.full(5, 1e-2)])) is None


def test_biases_before_batch_norm_are_no_evidence() -> None:
    sizes = np.full(14, 1e-2)
    sizes[1:-1:2] = 1e-9
    assert detect(window(mlp(7), sizes)) is None


def test_falling_biases_tell_it_where_weights_are_equally_tiny() -> None:
    sizes = np.full(14, 1e-30)
    sizes[1::2] = 1e-2 * 10.0 ** (-4 * np.arange(6, -1, -1))
    assert detect(window(mlp(7), sizes)) is not None


def test_norms_that_underflow_to_0_without_dead_units_are_vanishing() -> None:
    sizes = 1e-3 * CHAIN
    sizes[:4] = 0.0
    finding = detect(window(mlp(7), sizes, dead_fraction=0.0, zero_fraction=0.0))
    assert finding is not None
    assert finding.layers[0] == "0.weight"


def test_layers_that_a_dead_layer_silences_are_not_vanishing() -> None:
    sizes = FLAT.copy()
    sizes[:7] = 0.0  # layers 0 to 2 dead, and weight 3 sees no input
    assert detect(window(mlp(7), sizes)) is None


def test_it_must_last_for_most_of_the_recent_frames() -> None:
    sick, well = 1e-3 * CHAIN, np.full(14, 1e-3)
    mixed = np.array([sick if step % 2 else well for step in range(50)])
    assert detect(window(mlp(7), mixed)) is None
    mostly = np.array([well if step % 8 == 0 else sick for step in range(50)])
    assert detect(window(mlp(7), mostly)) is not None


def test_what_has_healed_is_not_told_and_what_began_late_has_its_first_step() -> None:
    sick, well = np.tile(1e-3 * CHAIN, (100, 1)), np.tile(FLAT, (100, 1))
    assert detect(window(mlp(7), np.vstack([sick, well]), steps=200)) is None
    finding = detect(window(mlp(7), np.vstack([well, sick]), steps=200))
    assert finding is not None
    assert abs(finding.first_step - 101) <= 25


def test_a_ratio_that_grows_fast_heals_by_itself() -> None:
    growing = np.tile(FLAT, (40, 1))
    growing[:, :6] = (1e-9 * 1.15 ** np.arange(40))[:, None]
    assert detect(window(mlp(7), growing, steps=40)) is None


def test_a_ratio_that_grows_because_the_last_layers_get_less_does_not_heal() -> None:
    fading = np.tile(FLAT, (40, 1))
    fading[:, :6] = 1e-9
    fading[:, 6:] *= (0.87 ** np.arange(40))[:, None]
    assert detect(window(mlp(7), fading, steps=40)) is not None


def test_few_frames_few_steps_and_few_layers_say_nothing() -> None:
    settings = Thresholds()
    assert detect(window(mlp(7), 1e-3 * CHAIN, steps=settings.steps - 1)) is None
    assert detect(window(mlp(7), 1e-3 * CHAIN, steps=[1, 50, 100, 150])) is None
    assert detect(window(mlp(7), 1e-3 * CHAIN, steps=[1, 5, 50, 100, 150])) is not None
    assert detect(window(mlp(2), 1e-3 * CHAIN[:4])) is None


def test_missing_frames_give_the_same_layers() -> None:
    whole = window(mlp(7), 1e-3 * CHAIN, steps=100)
    keep = np.sort(np.random.default_rng(1).choice(100, 30, replace=False))
    part, all_of_it = detect(rows(whole, keep)), detect(whole)
    assert part is not None
    assert all_of_it is not None
    assert (part.layers, part.severity) == (all_of_it.layers, all_of_it.severity)


def test_thresholds_are_obeyed() -> None:
    assert detect(window(mlp(7), 1e-3 * CHAIN), Thresholds(ratio=1e-9)) is None
